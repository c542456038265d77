"""A prior that is the base of the model's own adapter is known by its weights, and by nothing less."""

import copy

import pytest
import torch
from oracle import pixel_model

from priorguide.sample import own_base
from priorguide.sample.models.dit import DiT
from priorguide.sample.models.dynamicrafter import DynamiCrafter
from priorguide.sample.models.image_variations import ImageVariations
from priorguide.sample.models.instruct_pix2pix import InstructPix2Pix
from priorguide.sample.models.pixel import PixelUNet
from priorguide.sample.models.stable_diffusion import StableDiffusion
from priorguide.sample.models.videocrafter import VideoCrafter
from priorguide.sample.models.zero123 import Zero123
from priorguide.sample.open_clip import tiny_tower
from priorguide.sample.own_base import why_another
from priorguide.train.adapters import Lora, add_adapter

PAIRS = {
    "InstructPix2Pix": (StableDiffusion.tiny, lambda base: InstructPix2Pix.from_base(base, resolution=16)),
    "DiT": (DiT.tiny, lambda base: DiT.from_base(base, 4)),
    "Zero123": (ImageVariations.tiny, lambda base: Zero123.from_base(base, resolution=16)),
    "PixelUNet": (
        lambda: pixel_model(3, num_classes=2, image_channels=0),
        lambda base: PixelUNet.from_base(base, num_classes=3, image_channels=1),
    ),
    "DynamiCrafter": (
        VideoCrafter.tiny,  # without frame rates: its time embedding has other names than the fine-tune's
        lambda base: DynamiCrafter.from_base(base, tiny_tower(), resolution=(16, 16)),
    ),
}


def adapted(make, base, lora: Lora | None = None):
    """A model whose adapter has been trained: everything that is trained has moved."""
    model = make(base)
    add_adapter(model.network, lora or Lora(rank=2, target_modules=("attention", "convolutions")), model.added)
    for parameter in model.network.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    return model.train()


@pytest.fixture(params=PAIRS)
def pair(request):
    """(the base, a model that was adapted from it)."""
    torch.manual_seed(0)
    base, make = PAIRS[request.param]
    prior = base()
    return prior, adapted(make, prior)


def test_the_base_itself_is_known_and_nothing_changes(pair):
    base, model = pair
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    assert why_another(copy.deepcopy(base), model) is None
    assert modes == [m.training for m in model.modules()] and torch.equal(state, torch.get_rng_state())


def test_one_weight_makes_another_network(pair):
    base, model = pair
    for name, tensor in base.network.state_dict().items():
        before = tensor.clone()
        tensor.view(-1)[-1] += 1e-4  # of a table of classes that is in the row of the null
        assert why_another(base, model) in (WEIGHTS, NULL), name
        tensor.copy_(before)
    assert why_another(base, model) is None


WEIGHTS, NULL = "its weights are not those of the adapter's base", "its null condition is not that of the model"


def small():
    base = StableDiffusion.tiny()
    return base, adapted(PAIRS["InstructPix2Pix"][1], base)


def test_other_terms_make_another_prior():
    base, model = small()
    (other := copy.deepcopy(base)).null_text[0, 0, 0] += 1e-4
    assert why_another(other, model) == NULL
    (other := copy.deepcopy(base)).prediction = "v_prediction"
    assert why_another(other, model) == "its prediction is not that of the adapter's base"
    (other := copy.deepcopy(base)).space = "others"
    assert why_another(other, model) == "its space of latents is not that of the adapter's base"
    (other := copy.deepcopy(base)).path = DiT.tiny().path
    assert why_another(other, model) == "its noise schedule is not that of the adapter's base"
    for module in (other := copy.deepcopy(base)).network.modules():  # which no weight tells
        if hasattr(module, "heads"):
            module.heads *= 2
    assert why_another(other, model) == "it does not predict what the adapter's base does"


def test_new_channels_that_are_not_zero_make_another_prior():
    base, model = small()
    model.network.conv_in.untuned.weight.data[0, -1, 0, 0] = 1e-4
    assert why_another(base, model) == WEIGHTS


def test_without_an_adapter_or_with_a_base_that_is_trained_or_in_few_bits_there_is_none():
    base, model = small()
    assert own_base.adapted(model) and not own_base.adapted(PAIRS["InstructPix2Pix"][1](base))
    model.network.get_parameter("conv_norm_out.weight").requires_grad_(True)
    assert why_another(base, model) == WEIGHTS
    pytest.importorskip("bitsandbytes")
    for bits in ("int8", "nf4"):
        said = why_another(base, adapted(PAIRS["InstructPix2Pix"][1], base, Lora(rank=2, base_bits=bits)))
        assert said == f"the base below the adapter is in {bits}, which no other network is (`base: base` shares it)"
