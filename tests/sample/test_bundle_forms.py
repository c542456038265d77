"""The forms in which bundles hold networks: every system, whole and adapted, priors in part, in fewer bits, by name."""

import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_bundle import forge, refused
from torch import nn

from priorguide.sample.adapter import FILE, Adapter
from priorguide.sample.bundle import Bundle, Recorded
from priorguide.sample.candidates import with_network
from priorguide.sample.guidance import Guidance, unconditional
from priorguide.sample.kept import PART, same_tensors
from priorguide.sample.loop import Sampler
from priorguide.sample.models import models
from priorguide.sample.models.instruct_pix2pix import InstructPix2Pix
from priorguide.sample.models.pixel import PixelUNet
from priorguide.sample.models.stable_diffusion import StableDiffusion
from priorguide.sample.precision import PRECISIONS, at_precision, decode, encode, guided_change

SAMPLER = Sampler(steps=2)
SYSTEMS = {name: model for name, model in models().items() if model.__module__.startswith("priorguide.")}
PUBLISHED = {"DiT", "InstructPix2Pix", "Zero123", "VersatileDiffusion", "DynamiCrafter"}
"""The systems that are fine-tuned; the others are priors and bases."""


def test_the_five_systems_are_among_those_that_come_back():
    assert SYSTEMS.keys() >= PUBLISHED


def tiny(kind, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind.tiny().eval()


def condition_of(model, batch=2):
    generator = torch.Generator().manual_seed(1)
    parts = {}
    for name, null in model.null({}).items():
        shape = (batch, *null.shape[1:])
        whole = not null.is_floating_point()
        parts[name] = torch.randint(0, int(null.max()), shape) if whole else torch.rand(shape, generator=generator)
    return parts


def shifted(network: nn.Module, amount=0.05) -> nn.Module:
    """Another network of the same kind."""
    other = copy.deepcopy(network)
    with torch.no_grad():
        for number, parameter in enumerate(other.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter += amount * torch.randn(parameter.shape, generator=generator)
    return other


def adapt(base: nn.Module, rank=2) -> Adapter:
    """A random adapter on the network's attention, and the first convolution."""
    generator = torch.Generator().manual_seed(5)
    factors = {}
    for name, layer in base.named_modules():
        if name.endswith(("to_q", "to_k", "qkv", "conv_in")) and isinstance(layer, nn.Linear | nn.Conv2d):
            out, *rest = layer.weight.shape
            b_shape = (out, rank, *[1] * (len(rest) - 1))
            factors[name] = (
                0.1 * torch.randn(rank, *rest, generator=generator),
                torch.randn(b_shape, generator=generator),
            )
    assert factors
    return Adapter(base, factors)


def save(folder, model, guidance, **options):
    recorded = Recorded.draw(model, condition_of(model), [1, 2], guidance, SAMPLER)
    return Bundle.save(folder, model, guidance=guidance, sampler=SAMPLER, recorded=recorded, **options)


def size(folder: Path, pattern: str = "**/*") -> int:
    return sum(file.stat().st_size for file in folder.glob(pattern) if file.is_file())


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "adapter"])
@pytest.mark.parametrize("kind", SYSTEMS.values(), ids=SYSTEMS.keys())
def test_every_system_comes_back_bit_for_bit(kind, adapted, tmp_path):
    model = tiny(kind)
    prior = with_network(model, model.network if adapted else shifted(model.network))
    adapter = adapt(model.network) if adapted else None
    if adapter:
        model = with_network(model, adapter.merged())
    guidance = Guidance(tuple(2.0 + k for k in range(len(model.ladder))), unconditional(prior, onto=model))
    folder = save(tmp_path / "bundle", model, guidance, adapter=adapter)
    bundle = Bundle.load(folder)
    assert bundle.replay().identical and bundle.recorded().pictures.std() > 0
    loaded = bundle.guidance.prior.model.network
    assert same_tensors(bundle.model.network.state_dict(), model.network.state_dict())
    assert same_tensors(loaded.state_dict(), prior.network.state_dict())
    place = folder / f"unconditional_{model.network_name}"
    if adapted:
        assert load_file(place / PART) == {}  # all of it is the model's own, less the adapter
        plain = Bundle.save(tmp_path / "base", prior)
        assert size(folder, f"{model.network_name}/*") == size(plain, f"{model.network_name}/*")


def test_an_adapters_bundle_is_the_base_and_the_adapter(tmp_path):
    """The prior is another class, with another first convolution: only that is stored again."""
    base = tiny(StableDiffusion)
    tuned = InstructPix2Pix.from_base(base, resolution=16).eval()
    adapter = adapt(tuned.network)
    model = with_network(tuned, adapter.merged())
    folder = save(tmp_path / "bundle", model, Guidance((1.5, 3.0), unconditional(base, onto=model)), adapter=adapter)
    bundle = Bundle.load(folder)
    assert bundle.replay().identical and isinstance(bundle.guidance.prior.model, StableDiffusion)
    assert load_file(folder / "unconditional_unet" / PART).keys() == {"conv_in.weight"}
    names = load_file(folder / FILE).keys()
    assert all(re.fullmatch(r"unet\..*\.lora_[AB]\.weight", name) for name in names)
    ours = Bundle.save(tmp_path / "base", base)
    kernel = base.network.conv_in.weight.nbytes * 2  # the four new input channels
    tensors = size(folder, "**/*.safetensors") - size(folder, "recorded*") - size(folder, "null*")
    assert tensors <= 1.01 * (size(ours, "**/*.safetensors") - size(ours, "null*") + size(folder, FILE)) + kernel


def test_what_does_not_make_the_network_is_refused(tmp_path):
    model = tiny(PixelUNet)
    with pytest.raises(ValueError, match="do not make the model's network"):
        Bundle.save(tmp_path / "bundle", model, adapter=adapt(model.network))
    with pytest.raises(ValueError, match="no second network"):
        Bundle.save(tmp_path / "bundle", model, prior_held="int8")
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_is_not_the_bundles_is_refused(tmp_path):
    adapter = adapt(tiny(PixelUNet).network)
    model = with_network(tiny(PixelUNet), adapter.merged())
    folder = save(tmp_path / "bundle", model, Guidance((2.0,)), adapter=adapter)
    tensors = load_file(folder / FILE)
    first = sorted(tensors)[0]
    for changed, sentence in (
        ({k: v for k, v in tensors.items() if k != first}, "must hold pairs"),
        ({**tensors, "unet.nothing.lora_A.weight": tensors[first].clone()}, "must hold pairs"),
        ({**tensors, first: tensors[first][:, :1].clone()}, "cannot be read"),
    ):
        save_file(changed, folder / FILE)
        forge(folder)
        assert sentence in refused(Bundle.load, folder)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_rounded_is_stored_exactly(precision):
    generator = torch.Generator().manual_seed(0)
    state = {
        "a.weight": torch.randn(37, 5, 3, 3, generator=generator) * torch.logspace(-30, 5, 37)[:, None, None, None],
        "b.weight": torch.randn(64, 128, generator=generator),
        "b.bias": torch.randn(64, generator=generator),
        "zero.weight": torch.zeros(3, 4),
        "mean.scale": torch.randn(4, generator=generator),
        "count": torch.tensor(3),
    }
    state["a.weight"][0] = 0
    rounded = decode(encode(state, precision))
    assert rounded.keys() == state.keys() and all(rounded[k].shape == state[k].shape for k in state)
    assert same_tensors(decode(encode(rounded, precision)), rounded)
    assert all(torch.equal(rounded[name], state[name]) for name in ("b.bias", "zero.weight", "mean.scale", "count"))
    error = (rounded["b.weight"] - state["b.weight"]).norm() / state["b.weight"].norm()
    assert error < {"bfloat16": 2.5e-3, "int8": 1e-2, "nf4": 0.11}[precision]


def test_weights_that_cannot_be_rounded():
    with pytest.raises(ValueError, match="only float32 weights are rounded to int8, w is"):
        encode({"w": torch.zeros(2, 2).half()}, "int8")
    with pytest.raises(ValueError, match="not finite"):
        encode({"w": torch.full((2, 2), torch.inf)}, "nf4")
    with pytest.raises(ValueError, match="precision must be one of bfloat16, int8, nf4"):
        encode({}, "int4")
    model = tiny(PixelUNet)
    with pytest.raises(ValueError, match="not stored again"):
        at_precision(unconditional(model, onto=model, keep=frozenset({"image"})), "int8")


def wide(seed) -> PixelUNet:
    torch.manual_seed(seed)
    return PixelUNet.create(resolution=8, fold=1, block_out_channels=(32, 64)).eval()


def test_a_prior_in_fewer_bits(tmp_path):
    model, base = wide(0), wide(1)
    whole = Guidance((2.0,), unconditional(base, onto=model))
    x_0 = torch.rand(2, *model.shape, generator=torch.Generator().manual_seed(3)) * 2 - 1
    sizes, changes = {}, {}
    sizes["float32"] = size(save(tmp_path / "float32", model, whole), "unconditional_unet/*.safetensors")
    for precision in PRECISIONS:
        guidance = replace(whole, prior=at_precision(whole.prior, precision))
        change = guided_change(model, whole, guidance, x_0, {})
        options = {"prior_held": precision, "prior_change": change}
        folder = save(tmp_path / precision, model, guidance, **options)
        bundle = Bundle.load(folder)
        assert bundle.replay().identical
        stored = bundle.manifest["prior"]["stored"]
        assert stored["form"] == precision and stored["change"] == json.loads(json.dumps(change))
        assert bundle.guidance.prior.model.network.dtype == torch.float32
        changes[precision] = change["mean_relative_rms"]
        sizes[precision] = size(folder, "unconditional_unet/*.safetensors")
        with pytest.raises(ValueError, match=f"the prior is not rounded to {precision}"):
            save(tmp_path / "not", model, whole, prior_held=precision)
    assert guided_change(model, whole, whole, x_0, {})["mean_relative_rms"] == 0
    assert 0 < changes["bfloat16"] < changes["int8"] < changes["nf4"] < 0.5
    bits = {"bfloat16": 16, "int8": 8, "nf4": 4.5}
    assert all(sizes[p] < sizes["float32"] * (bits[p] / 32 + 0.08) for p in bits), sizes


def test_the_measured_change_is_that_of_the_formula(tmp_path):
    """Only p_0 differs, and it weighs 1 - s in the guided prediction."""
    model, base = tiny(PixelUNet), tiny(PixelUNet, 1)
    guidance = Guidance((3.0,), unconditional(base, onto=model))
    other = replace(guidance, prior=at_precision(guidance.prior, "nf4"))
    condition, x_0 = condition_of(model), torch.zeros(2, *model.shape)
    change = guided_change(model, guidance, other, x_0, condition, levels=1)
    t = torch.tensor(change["times"]).expand(2)
    x_t = model.path.coefficients(t.double())[1].float()[0] * torch.randn(
        x_0.shape, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        p_0, rounded = (g.prior.model.denoise(x_t, t, g.prior.condition(condition, 2)) for g in (guidance, other))
        p_1 = model.denoise(x_t, t, condition)
    expected = (2 * (rounded - p_0)).norm() / (p_0 + 3 * (p_1 - p_0)).norm()
    assert change["relative_rms"][0] == pytest.approx(expected.item(), rel=1e-4)


FORGED = {
    "unknown form": ({"form": "pickle"}, "not stored in the form 'pickle'"),
    "adapter for a prior": ({"form": "adapter"}, "not stored in the form 'adapter'"),
    "path for a form": ({"form": "../unet"}, "not stored in the form"),
    "whole where it is in part": ({"form": "whole"}, "cannot be read"),
    "nf4 where it is in part": ({"form": "nf4"}, "cannot be read"),
    "no repository": ({"form": "reference"}, "cannot be read"),
    "a repository elsewhere": (
        {"form": "reference", "repository": "../x", "revision": "0" * 40, "files": {}},
        "named owner/name@revision",
    ),
    "a branch": (
        {"form": "reference", "repository": "a/b", "revision": "main", "files": {}},
        "stored by its commit, got 'main'",
    ),
    "a path in a repository": (
        {"form": "reference", "repository": "a/b", "revision": "0" * 40, "files": {"../c.json": "0" * 64}},
        "made of JSON and safetensors, got '../c.json'",
    ),
    "a pickle in a repository": (
        {"form": "reference", "repository": "a/b", "revision": "0" * 40, "files": {"unet/c.bin": "0" * 64}},
        "made of JSON and safetensors",
    ),
    "no files": ({"form": "reference", "repository": "a/b", "revision": "0" * 40, "files": {}}, "one config.json"),
}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> Path:
    base = tiny(PixelUNet)
    adapter = adapt(base.network)
    model = with_network(base, adapter.merged())
    guidance = Guidance((2.0,), unconditional(base, onto=model))
    return save(tmp_path_factory.mktemp("adapted") / "bundle", model, guidance, adapter=adapter)


@pytest.mark.parametrize("name", FORGED)
def test_a_form_written_by_hand_is_refused(adapted, tmp_path, name):
    folder, (stored, sentence) = shutil.copytree(adapted, tmp_path / "copy"), FORGED[name]
    forge(folder, lambda manifest: manifest["prior"].update(stored=stored))
    assert sentence in refused(Bundle.load, folder)


def test_timesteps_are_the_recorded_ones(adapted, tmp_path):
    manifest = json.loads((adapted / "priorguide.json").read_text())
    assert manifest["timesteps"]["model"] == manifest["timesteps"]["prior"] and len(manifest["timesteps"]["model"]) == 2
    folder = shutil.copytree(adapted, tmp_path / "copy")
    forge(folder, lambda manifest: manifest["timesteps"]["model"].__setitem__(0, 3.0))
    assert "its model was asked at the times" in refused(Bundle.load, folder)


def test_bundles_of_the_first_version_are_read(tmp_path):
    model = tiny(PixelUNet)
    folder = save(tmp_path / "bundle", model, Guidance((2.0,), unconditional(tiny(PixelUNet, 1), onto=model)))

    def first(manifest):
        manifest["format_version"] = 1
        del manifest["timesteps"], manifest["model"]["stored"], manifest["prior"]["stored"]

    forge(folder, first)
    assert Bundle.load(folder).replay().identical
