"""LoRA: what is trained, averaged, kept in checkpoints, and merged into a plain network."""

import pytest
import torch
from fits import same, weights

from priorguide.sample.models.instruct_pix2pix import InstructPix2Pix
from priorguide.sample.models.stable_diffusion import StableDiffusion
from priorguide.train.adapters import Lora, adapter_of
from priorguide.train.fine_tune import FineTune


@pytest.fixture
def tuning():
    torch.manual_seed(0)
    return FineTune(InstructPix2Pix.from_base(StableDiffusion.tiny(), resolution=16), lora=Lora(rank=2), ema_decay=0.9)


def inputs(model):
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(2, *model.shape, generator=generator)
    condition = {"image": torch.randn(2, *model.shape, generator=generator), "text": model.null_text.expand(2, -1, -1)}
    return x_t, torch.tensor([100.0, 700.0]), condition


def trained(module):
    return {name for name, p in module.named_parameters() if p.requires_grad}


def test_the_adapter_and_the_new_channels_are_trained_alone(tuning):
    names = trained(tuning.model.network)
    assert names and all("lora_" in name or name.startswith("conv_in.") for name in names)
    assert {"conv_in.weight", "conv_in.bias"} <= names
    assert not trained(tuning.average) and tuning.model.vae.training is False


def test_it_starts_as_the_base(tuning):
    base = StableDiffusion.tiny().eval()
    x_t, t, condition = inputs(tuning.model)
    tuning.eval()
    with torch.no_grad():
        found = tuning.model.denoise(x_t, t, tuning.model.null(condition))
        assert torch.equal(found, base.denoise(x_t, t, {"text": condition["text"]}))


def test_the_average_shares_what_is_frozen(tuning):
    live, mean = dict(tuning.model.network.named_parameters()), dict(tuning.average.named_parameters())
    names = trained(tuning.model.network)
    assert all((mean[name] is live[name]) == (name not in names) for name in live)


def test_merged_it_is_a_plain_network_that_predicts_the_same(tuning):
    with torch.no_grad():
        for name, parameter in tuning.model.network.named_parameters():
            if name in trained(tuning.model.network):
                parameter += 0.1 * torch.randn_like(parameter)
    before, (x_t, t, condition) = weights(tuning.model.network), inputs(tuning.model)
    tuning.eval()
    with torch.no_grad():
        adapted = tuning.model.denoise(x_t, t, condition)
        plain = adapter_of(tuning.model.network).merged()
        assert plain.state_dict().keys() == StableDiffusion.tiny().network.state_dict().keys()
        assert same(weights(tuning.model.network), before)
        tuning.model.network = plain
        torch.testing.assert_close(tuning.model.denoise(x_t, t, condition), adapted, rtol=0, atol=1e-5)


def test_checkpoints_hold_what_is_trained_alone(tuning):
    checkpoint = {"state_dict": tuning.state_dict()}
    tuning.on_save_checkpoint(checkpoint)
    names = trained(tuning.model.network)
    wanted = {f"{place}.{name}" for place in ("model.network", "average") for name in names}
    assert checkpoint["state_dict"].keys() == wanted
    tuning.on_load_checkpoint(checkpoint)
    del checkpoint["state_dict"]["average.conv_in.weight"]
    with pytest.raises(ValueError, match=r"lacks 1 of the network's tensors, average\.conv_in\.weight"):
        tuning.on_load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        (Lora(0), "rank must be at least 1"),
        *(
            (Lora(target_modules=names), "called none, to be adapted: .* attention, projections, convolutions, or")
            for names in (("none",), ("attention", "none"))
        ),
    ],
)
def test_adapters_that_fit_nothing_are_refused(lora, sentence):
    with pytest.raises(ValueError, match=sentence):
        FineTune(InstructPix2Pix.tiny(), lora=lora)
