"""A LoRA on a base in 8 or 4 bits: what it trains, predicts, keeps in checkpoints and leaves behind."""

import sys

import pytest
import torch
from fits import Pictures, same, trainer, weights
from oracle import pixel_model

from priorguide.sample.bits import bytes_of, in_few_bits, reduce_bits, restore_bits
from priorguide.sample.candidates import Candidate
from priorguide.sample.guidance import Guidance
from priorguide.sample.loop import Sampler, trajectories
from priorguide.sample.models.dit import DiT
from priorguide.sample.models.instruct_pix2pix import InstructPix2Pix
from priorguide.sample.models.pixel import PixelUNet
from priorguide.sample.models.stable_diffusion import StableDiffusion
from priorguide.train.adapters import Lora, adapter_of, base_of
from priorguide.train.checkpoint import Checkpoint
from priorguide.train.fine_tune import FineTune
from priorguide.train.objective import Drop

pytestmark = pytest.mark.usefixtures("reproducible")
BITS = ["int8", "nf4"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ERROR = {"int8": 0.02, "nf4": 0.25}
"""Of a layer's or a tiny network's output, relative."""


def tuned(bits, device="cpu", **options):
    torch.manual_seed(0)
    model = InstructPix2Pix.from_base(StableDiffusion.tiny(), resolution=16)
    tuning = FineTune(model, lora=Lora(rank=2, base_bits=bits), ema_decay=0.9, **options)
    return tuning.to(device)


def predict(model, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    x, image = (torch.randn(2, *model.shape, generator=generator).to(device) for _ in range(2))
    condition = {"image": image, "text": model.null_text.expand(2, -1, -1)}
    return model.denoise(x, torch.tensor([100.0, 700.0], device=device), condition)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", BITS)
def test_the_times_of_a_dit_in_fewer_bits(bits, device):
    torch.manual_seed(0)
    embedder = DiT.tiny().network.t_embedder.to(device)
    t = torch.tensor([10.0, 300.0, 900.0], device=device)
    wanted = embedder(t)
    reduce_bits(embedder, bits)
    assert 0 < (embedder(t) - wanted).norm() / wanted.norm() < ERROR[bits]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", BITS)
def test_layers_in_fewer_bits_and_back(bits, device):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8)).to(device)
    x = torch.randn(4, 256, device=device)
    wanted, whole = network(x), bytes_of(network)
    reduce_bits(network, bits, leave=["2"])
    assert [name for name, _ in in_few_bits(network)] == ["0"]
    found = network(x)
    assert 0 < (found - wanted).norm() / wanted.norm() < ERROR[bits]
    small = bytes_of(network)
    assert small < {"int8": 0.3, "nf4": 0.18}[bits] * whole
    restore_bits(network)
    assert type(network[0]) is torch.nn.Linear and network[0].weight.dtype == torch.float32
    assert (network(x) - found).norm() / wanted.norm() < {"int8": 0.01, "nf4": 1e-3}[bits]
    assert network[0].weight.device.type == device


def test_what_int8_computes_with_follows_its_weight():
    """A network's `to` moves weights alone: here the copy that was left elsewhere lies on the meta device."""
    network = torch.nn.Sequential(torch.nn.Linear(256, 8))
    x = torch.randn(4, 256)
    reduce_bits(network, "int8")
    for place in (network[0].weight, network[0].state):  # before the first evaluation, and after it
        wanted = network(x) if place is network[0].state else None
        place.CB = place.CB.to("meta")
        found = network(x)
        assert found.isfinite().all() and (wanted is None or torch.equal(found, wanted))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", BITS)
def test_it_trains_what_a_whole_base_would(bits, device):
    few, whole = tuned(bits, device), tuned(None, device)
    trained = [name for name, p in few.model.network.named_parameters() if p.requires_grad]
    assert trained == [name for name, p in whole.model.network.named_parameters() if p.requires_grad]
    for tuning in (few, whole):
        predict(tuning.model, device).square().mean().backward()
    near = 0.0
    for name in trained:
        got, want = (t.model.network.get_parameter(name).grad for t in (few, whole))
        near = max(near, ((got - want).norm() / want.norm().clamp(min=1e-8)).item()) if want.norm() else near
    assert 0 < near < 1
    own = dict(in_few_bits(few.model.network))
    assert own and all(own[name] is layer for name, layer in in_few_bits(few.average))  # held once


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", BITS)
def test_its_base_is_itself_in_one_batch(bits, device):
    tuning = tuned(bits, device).eval()
    with torch.no_grad():
        before = predict(tuning.model, device)
        for parameter in tuning.model.network.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model, prior = tuning.model, Candidate("base").bind(tuning.model)
    with torch.no_grad():
        torch.testing.assert_close(predict(prior.model, device), before, rtol=0, atol=1e-5)
        assert (predict(model, device) - before).abs().max() > 1e-3
    condition = {"image": torch.randn(2, *model.shape, device=device), "text": model.null_text.expand(2, -1, -1)}
    options = {"scheduler": Sampler(steps=2).make(model), "steps": 2}
    mixed, apart = (
        trajectories(model, condition, [1, 2], [Guidance((2.0, 2.0), prior)], max_batch=rows, **options)
        for rows in (None, 1)
    )
    # Activations in int8 are rounded: a batch of another size may round one the other way.
    near = {"int8": 0.05, "nf4": 1e-4 if device == "cpu" else 2e-3}[bits]  # a GPU has a kernel of its own for one row
    torch.testing.assert_close(mixed, apart, rtol=0, atol=near)


@pytest.mark.parametrize("bits", BITS)
def test_plain_networks_come_back(bits):
    tuning = tuned(bits).eval()
    with torch.no_grad():
        base = predict(tuning.model)
        for name, parameter in tuning.average.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        with tuning.averaged() as model:
            adapted = predict(model)
        plain, merged = base_of(tuning.average), adapter_of(tuning.average).merged()
        names = StableDiffusion.tiny().network.state_dict().keys()
        assert plain.state_dict().keys() == names == merged.state_dict().keys()
        assert {t.dtype for t in merged.state_dict().values()} == {torch.float32}
        for network, wanted in ((plain, base), (merged, adapted)):
            tuning.model.network = network
            torch.testing.assert_close(predict(tuning.model), wanted, rtol=0, atol={"int8": 0.02, "nf4": 1e-5}[bits])


@pytest.mark.parametrize("bits", BITS)
def test_a_run_resumes_exactly(bits, tmp_path):
    def fit(folder, steps, ckpt_path=None):
        torch.manual_seed(0)
        model = PixelUNet.from_base(pixel_model(3, num_classes=0, image_channels=0), num_classes=3, image_channels=1)
        tuning = FineTune(model, [Drop(("image", "label"), 0.3)], 1e-2, lora=Lora(rank=2, base_bits=bits))
        keep = Checkpoint(dirpath=folder, save_last=True, every_n_train_steps=4, enable_version_counter=False)
        run = trainer(folder, steps, callbacks=[keep], enable_checkpointing=True)
        run.fit(tuning, Pictures(), ckpt_path=ckpt_path)
        return {n: t for n, t in weights(tuning).items() if "lora_" in n or "conv_in" in n}

    whole = fit(tmp_path / "whole", 8)
    fit(tmp_path / "half", 4)
    held = torch.load(tmp_path / "half" / "last.ckpt", weights_only=True)["state_dict"]
    assert not any("base_layer" in name or "absmax" in name for name in held)
    assert same(fit(tmp_path / "half", 8, tmp_path / "half" / "last.ckpt"), whole)


def test_without_bitsandbytes_it_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"nf4 weights need bitsandbytes: pip install 'priorguide\[train\]'"):
        tuned("nf4")
