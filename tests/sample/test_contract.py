"""What every model of `sample.models` keeps, by discovery: a new file there is covered as it is."""

import copy
import json
import time

import pytest
import torch
from torch import nn

from priorguide.sample.components import own_nulls
from priorguide.sample.guidance import unconditional
from priorguide.sample.loop import make_scheduler, sample
from priorguide.sample.model import DiffusionModel, keep_only
from priorguide.sample.models import find, models

MODELS = {name: model for name, model in models().items() if model.__module__.startswith("priorguide.")}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS.keys())
def model(request) -> DiffusionModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return request.param.tiny().eval()


def random_condition(model, batch=3):
    """Parts like the nulls: whole numbers below the null's (labels, tokens), the rest uniform on [0, 1)."""
    generator = torch.Generator().manual_seed(1)
    parts = {}
    for name, null in model.null({}).items():
        shape = (batch, *null.shape[1:])
        if null.is_floating_point():
            parts[name] = torch.rand(shape, generator=generator)
        else:
            parts[name] = torch.randint(0, int(null.max()), shape, generator=generator)
    return parts


def random_batch(model, batch=3):
    """A batch of data: pictures, and conditions as they come from a data set."""
    pixels = model.decode(torch.zeros(1, *model.shape))
    generator = torch.Generator().manual_seed(2)
    return {"pixels": torch.rand(batch, *pixels.shape[1:], generator=generator), **random_condition(model, batch)}


def random_input(model, batch=3):
    x_t = torch.randn(batch, *model.shape, generator=torch.Generator().manual_seed(3))
    return x_t, torch.tensor([1.0, 500.0, 998.0])[:batch]


def test_there_are_models_and_they_are_found_by_name():
    assert {"PixelUNet", "DiT"} <= MODELS.keys()
    assert all(find(name) is model for name, model in MODELS.items())
    with pytest.raises(ValueError, match="no model is called 'Nobody'; known are .*PixelUNet"):
        find("Nobody")


@pytest.mark.parametrize("kind", MODELS.values(), ids=MODELS.keys())
def test_tiny_is_quick_and_small(kind):
    start = time.process_time()
    model = kind.tiny()
    assert time.process_time() - start < 5
    assert sum(p.numel() for p in model.parameters()) < 5e6
    assert model.network_name in ("unet", "transformer") and isinstance(model.network, nn.Module)


def test_only_the_network_is_trained(model):
    own = {id(p) for p in model.network.parameters()}
    assert own and all(id(p) in own or not p.requires_grad for p in model.parameters())


def test_only_the_network_goes_into_train_mode(model):
    model = copy.deepcopy(model).train()
    inside = set(model.network.modules())
    assert all(module.training == (module in inside) for module in model.modules() if module is not model)
    assert not any(module.training for module in model.eval().modules())


def test_null_is_idempotent(model):
    null = model.null(random_condition(model))
    again = model.null(null)
    assert null.keys() == again.keys()
    assert all(torch.equal(null[name], again[name]) for name in null)


def test_null_fills_in_what_is_absent(model):
    condition, empty = random_condition(model), model.null({})
    full = model.null(condition)
    assert empty.keys() == full.keys() == condition.keys()
    for name, part in full.items():
        assert len(empty[name]) == 1 and part.shape == condition[name].shape and part.dtype == condition[name].dtype
        assert torch.equal(part, condition[name] if name in model.always else empty[name].expand_as(part))
        partly = model.null({name: condition[name]})
        assert all(torch.equal(partly[other], full[other] if other == name else empty[other]) for other in full)


def test_null_leaves_the_condition_as_it_was(model):
    condition = random_condition(model)
    before = {name: part.clone() for name, part in condition.items()}
    model.null(condition)
    assert all(torch.equal(part, before[name]) for name, part in condition.items())


def test_every_part_on_the_ladder_has_a_null(model):
    condition = random_condition(model)
    assert model.ladder and all(low < high for low, high in zip(model.ladder, model.ladder[1:], strict=False))
    for name in model.ladder[-1]:
        assert not torch.equal(model.null(condition)[name], condition[name])
    assert model.always.isdisjoint(model.ladder[-1]) and model.always | model.ladder[-1] == condition.keys()


def test_what_is_never_dropped_is_not_forgotten(model):
    """On a rung it must be there; for the unconditional prediction alone it may be filled in."""
    condition = {name: part for name, part in random_condition(model).items() if name not in model.always}
    assert keep_only(model, condition, (), 3).keys() == model.null({}).keys()
    if model.always:
        with pytest.raises(KeyError, match="condition lacks"):
            keep_only(model, condition, model.ladder[-1], 3)


def test_the_top_of_the_ladder_is_the_condition(model):
    condition = random_condition(model)
    top = keep_only(model, condition, model.ladder[-1], 3)
    assert all(torch.equal(top[name], condition[name]) for name in condition)


def test_every_part_matters(model):
    condition, (x_t, t) = random_condition(model), random_input(model)
    with torch.no_grad():
        full = model.denoise(x_t, t, condition)
        for name in model.ladder[-1] | model.always:
            without = model.denoise(x_t, t, {**condition, name: model.null({})[name].expand_as(condition[name])})
            assert not torch.equal(without, full), name


def test_denoise_keeps_shape_and_sample(model):
    condition, (x_t, t) = random_condition(model), random_input(model)
    with torch.no_grad():
        out = model.denoise(x_t, t, condition)
        assert out.shape == x_t.shape and out.isfinite().all()
        for i in range(3):
            own = {name: part[i : i + 1] for name, part in condition.items()}
            alone = model.denoise(x_t[i : i + 1], t[i : i + 1], own)
            torch.testing.assert_close(alone[0], out[i], rtol=0, atol=1e-5 * max(1, float(out.abs().max())))


def test_denoise_takes_fractions_and_half_precision(model):
    condition, (x_t, t) = random_condition(model), random_input(model)
    with torch.no_grad():
        whole, between, following = (model.denoise(x_t, t + shift, condition) for shift in (0, 0.5, 1))
        assert not torch.equal(between, whole) and not torch.equal(between, following)
        halved = copy.deepcopy(model)
        halved.network.to(torch.bfloat16)
        half = halved.denoise(x_t.bfloat16(), t, condition)
    assert half.dtype == torch.bfloat16
    assert (half.float() - whole).abs().max() < 0.1 * max(1, float(whole.abs().max()))


def test_encode_and_decode(model):
    batch = random_batch(model)
    with torch.no_grad():
        x_0, condition = model.encode(batch)
        assert x_0.shape == (3, *model.shape) and x_0.dtype == torch.float32
        assert condition.keys() == model.null({}).keys() and all(len(part) == 3 for part in condition.values())
        alone = model.encode_condition({name: batch[name] for name in condition})  # no pixels are needed
        assert all(torch.equal(alone[name], condition[name]) for name in condition)
        pixels, far = model.decode(x_0), model.decode(100 * torch.randn(3, *model.shape))
    assert pixels.shape == batch["pixels"].shape
    assert pixels.min() >= 0 and pixels.max() <= 1 and far.min() >= 0 and far.max() <= 1
    if model.space.startswith("pixels"):
        torch.testing.assert_close(pixels, batch["pixels"], rtol=0, atol=1e-6)


def test_it_trains_on_oblong_pictures_where_it_says_so(model):
    """Pictures beside each other's pixels, latents as those pixels' own."""
    if model.side_step is None:
        return
    high, wide = model.side_step * 2, model.side_step * 3
    square = model.decode(torch.zeros(1, *model.shape)).shape
    generator = torch.Generator().manual_seed(4)
    pixels = torch.rand(2, square[1], high, wide, generator=generator)
    batch = {"pixels": pixels, **random_condition(model, 2)}
    with torch.no_grad():
        x_0 = model.encode_pixels(pixels)
        assert x_0.shape[1] == model.shape[0] and x_0.shape[2] * wide == x_0.shape[3] * high
        for name, null in model.null({}).items():
            if null.shape[2:] in (square[2:], model.shape[1:]):
                batch[name] = torch.rand(2, square[1], high, wide, generator=generator)[:, : null.shape[1]]
        x_0, condition = model.encode(batch)
        t = torch.tensor([1.0, 998.0])
        out, empty = (model.denoise(x_0, t, c) for c in (condition, model.null(condition)))
    assert out.shape == empty.shape == x_0.shape and out.isfinite().all() and not torch.equal(out, empty)


def test_saved_and_loaded_it_is_the_same_to_the_bit(model, tmp_path):
    model.network.save_pretrained(tmp_path, safe_serialization=True)
    assert not [file.name for file in tmp_path.rglob("*") if file.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    config = json.loads(json.dumps(model.config()))
    again = type(model).from_components(type(model).load_network(str(tmp_path)), **own_nulls(model), **config).eval()
    for attribute in ("path", "prediction", "ladder", "shape", "space"):
        assert getattr(again, attribute) == getattr(model, attribute)
    assert again.config() == model.config()
    condition, (x_t, t) = random_condition(model), random_input(model)
    with torch.no_grad():
        assert torch.equal(again.denoise(x_t, t, condition), model.denoise(x_t, t, condition))


def test_a_folder_that_names_no_network_is_refused(model, tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "DDIMScheduler"}')
    with pytest.raises((ValueError, OSError), match=r"DDIMScheduler|DiTNetwork|no file|config"):
        type(model).load_network(str(tmp_path))


def test_it_samples_guided_by_itself_and_by_a_copy(model):
    condition, settings = random_condition(model), {"scales": [2.0] * len(model.ladder), "steps": 3}
    base = unconditional(copy.deepcopy(model), onto=model)
    scheduler = make_scheduler(model, timestep_spacing="trailing")
    own = sample(model, condition, [1, 2, 3], scheduler=scheduler, **settings)
    other = sample(model, condition, [1, 2, 3], scheduler=scheduler, prior=base, **settings)
    assert own.isfinite().all()
    torch.testing.assert_close(other, own, rtol=0, atol=1e-4 * max(1, float(own.abs().max())))
