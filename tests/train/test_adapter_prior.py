"""The base prior of a LoRA: the same network with the adapter off, in one batch with the adapted rows."""

import copy

import pytest
import torch
from fits import Pictures, trainer
from oracle import pixel_model

from priorguide.callbacks.comparison import PriorComparison
from priorguide.sample.adapter_rows import Unadapted
from priorguide.sample.bits import bytes_of
from priorguide.sample.candidates import Candidate
from priorguide.sample.compare import compare, cost
from priorguide.sample.guidance import Guidance, unconditional
from priorguide.sample.health import null_health
from priorguide.sample.loop import Sampler, trajectories
from priorguide.sample.models.dit import DiT
from priorguide.sample.models.dynamicrafter import DynamiCrafter
from priorguide.sample.models.image_variations import ImageVariations
from priorguide.sample.models.instruct_pix2pix import InstructPix2Pix
from priorguide.sample.models.pixel import PixelUNet
from priorguide.sample.models.stable_diffusion import StableDiffusion
from priorguide.sample.models.zero123 import Zero123
from priorguide.sample.planning import evaluate, plan, sources
from priorguide.train.adapters import GROUPS, Lora, adapter_of, add_adapter, base_of
from priorguide.train.fine_tune import FineTune
from priorguide.train.objective import Drop

STEPS = Sampler(steps=2)
EVERYTHING = Lora(rank=2, target_modules=tuple(GROUPS))


def pixel() -> PixelUNet:
    return PixelUNet.from_base(pixel_model(3, num_classes=0, image_channels=0), num_classes=3, image_channels=1)


MODELS = {
    "InstructPix2Pix": lambda: InstructPix2Pix.from_base(StableDiffusion.tiny(), resolution=16),
    "DiT": lambda: DiT.from_base(DiT.tiny(), 4),
    "Zero123": lambda: Zero123.from_base(ImageVariations.tiny(), resolution=16),
    "PixelUNet": pixel,
    "DynamiCrafter": DynamiCrafter.tiny,  # as published, with a picture that matters from the start
}


def changed(network: torch.nn.Module, lora: Lora, added: tuple[str, ...]) -> None:
    """An adapter as training leaves it: everything that is trained has moved."""
    add_adapter(network, lora, added)
    generator = torch.Generator().manual_seed(5)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    network.eval()


def condition_of(model, batch: int) -> dict[str, torch.Tensor]:
    """Something other than the null in every part."""
    generator = torch.Generator().manual_seed(6)
    null = {name: part.expand(batch, *part.shape[1:]) for name, part in model.null({}).items()}
    return {
        name: torch.randn(part.shape, generator=generator) if part.is_floating_point() else torch.zeros_like(part)
        for name, part in null.items()
    }


@pytest.fixture(params=MODELS)
def pair(request):
    """(the adapted model, the model that it was, as a network of its own)."""
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    before = copy.deepcopy(model)
    changed(model.network, EVERYTHING, model.added)
    return model, before


def guided(model, prior):
    """Predictions of all rungs at two times, and the rows that each call of the network got."""
    guidance = Guidance(tuple(3.0 + k for k in range(len(model.ladder))), prior)
    rows = []
    hook = model.network.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    x = torch.randn(1, 2, *model.shape, generator=torch.Generator().manual_seed(1))
    calls = plan(model, condition_of(model, 2), 2, [guidance], [sources(guidance, guidance.scales)])
    t = model.path.draw(torch.tensor([0.3, 0.8])).double()
    with torch.no_grad():
        predictions, variances = evaluate(calls, x, t, [guidance], None)
        again, _ = evaluate(calls, x, t, [guidance], 3)  # a batch cut in the middle of a rung
    hook.remove()
    for key, prediction in predictions.items():
        torch.testing.assert_close(again[key], prediction, rtol=0, atol=1e-5)
    return predictions, variances, rows


def test_it_is_what_a_second_network_predicts_and_costs_no_call_of_its_own(pair):
    model, before = pair
    count = 2 * (len(model.ladder) + 1)
    shared, variances, rows = guided(model, Candidate("base").bind(model))
    assert rows == [count, *[3] * (count // 3), *([count % 3] if count % 3 else [])]
    apart, others, rows = guided(model, unconditional(before, onto=model))
    assert rows[0] == count - 2
    own, _, _ = guided(model, None)
    assert (own[0, 0] - shared[0, 0]).abs().max() > 1e-3  # the adapter matters
    for found, wanted in ((shared, apart), (variances, others)):
        assert found.keys() == wanted.keys()
        for key in wanted:
            torch.testing.assert_close(found[key], wanted[key], rtol=1e-5, atol=1e-5)


def test_nothing_of_it_stays(pair):
    model, _ = pair
    before = {name: dict(vars(module)) for name, module in model.network.named_modules()}
    hooks = [len(value) for own in before.values() for key, value in own.items() if key.endswith("_hooks")]
    guided(model, Candidate("base").bind(model))
    modules = model.network.modules()
    assert hooks == [len(value) for m in modules for key, value in vars(m).items() if key.endswith("_hooks")]


def test_plain_networks_come_back(pair):
    model, before = pair
    base, merged = base_of(model.network), adapter_of(model.network).merged()
    names = before.network.state_dict().keys()
    assert base.state_dict().keys() == names == merged.state_dict().keys()
    assert all(torch.equal(base.state_dict()[name], before.network.state_dict()[name]) for name in names)
    places = GROUPS["convolutions"] if isinstance(model, PixelUNet) else ("to_q", "attn.qkv", "proj_in")
    changed_names = {n for n in names if not torch.equal(merged.state_dict()[n], before.network.state_dict()[n])}
    assert any(name.removesuffix(".weight").endswith(places) for name in changed_names)
    condition, x, t = condition_of(model, 2), torch.randn(2, *model.shape), torch.tensor([100.0, 600.0])
    with torch.no_grad():
        wanted = model.denoise(x, t, condition)
        model.network = merged
        torch.testing.assert_close(model.denoise(x, t, condition), wanted, rtol=1e-4, atol=1e-4)


def test_it_starts_as_the_base_itself():
    base = StableDiffusion.tiny().eval()
    model = InstructPix2Pix.from_base(base, resolution=16).eval()
    add_adapter(model.network, EVERYTHING, model.added)
    seeds, condition = [1, 2], condition_of(model, 2)
    priors = {"base": Candidate("base").bind(model), "apart": unconditional(base, onto=model)}
    candidates = {(name, (2.0, 3.0)): Guidance((2.0, 3.0), prior) for name, prior in priors.items()}
    pictures = compare(model, condition, seeds, candidates, STEPS)
    torch.testing.assert_close(*pictures.values(), rtol=0, atol=1e-5)


def test_it_holds_no_memory_of_its_own_and_its_health_is_the_bases():
    model = MODELS["InstructPix2Pix"]().eval()
    before = copy.deepcopy(model)
    changed(model.network, EVERYTHING, model.added)
    prior, apart = Candidate("base").bind(model), unconditional(before, onto=model)
    assert isinstance(prior.model.network, Unadapted)
    condition = condition_of(model, 2)
    assert cost(model, condition, [0, 1], Guidance((2.0, 2.0), prior), STEPS).extra_bytes == 0
    assert cost(model, condition, [0, 1], Guidance((2.0, 2.0), apart), STEPS).extra_bytes > 1e5
    x_0 = torch.randn(2, *model.shape)
    found = null_health(model, {"base": prior, "apart": apart}, x_0, condition, levels=2)
    assert found["base"].loss == pytest.approx(found["apart"].loss, rel=1e-5)
    assert found["base"].excess.value != 0


def test_mixed_with_self_and_with_a_part_kept(pair):
    model, before = pair
    keep = tuple(sorted(model.ladder[0]))
    x = {}
    for name, candidate in {
        "shared": Candidate("base", keep=keep, mix=0.5),
        "apart": Candidate(before, keep=keep, mix=0.5),
    }.items():
        guidance = candidate.guidance(tuple(2.0 for _ in model.ladder), candidate.bind(model))
        scheduler = STEPS.make(model)
        x[name] = trajectories(model, condition_of(model, 2), [1, 2], [guidance], scheduler=scheduler, steps=2)
    torch.testing.assert_close(x["shared"], x["apart"], rtol=1e-4, atol=1e-4)


def test_a_run_compares_with_it(tmp_path):
    torch.manual_seed(0)
    tuning = FineTune(pixel(), [Drop(("image", "label"), 0.3)], 1e-2, lora=EVERYTHING, ema_decay=0.5)
    second = pixel_model(3, num_classes=0, image_channels=0)
    options = {"num_conditions": 4, "num_pictures": 2, "num_reference": 8, "batch_size": 4}
    callback = PriorComparison({"base": "base", "apart": second}, [2.0], STEPS, every_n_steps=3, **options)
    seen = []
    callback.evaluate = lambda *a, **k: seen.append(PriorComparison.evaluate(callback, *a, **k)) or seen[-1]
    trainer(tmp_path, 6, callbacks=[callback]).fit(tuning, Pictures())
    assert len(seen) == 2
    for evaluation in seen:
        shared, apart = evaluation.pictures["base", (2.0,)], evaluation.pictures["apart", (2.0,)]
        torch.testing.assert_close(shared, apart, rtol=0, atol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 1e-3])
def test_a_second_model_of_it_is_let_go(tmp_path, capsys, monkeypatch, weight):
    """A prior that is the base, weight for weight, is the network with the adapter off, by the name that it has; one
    that differs in a weight stays."""
    torch.manual_seed(0)
    tuning = FineTune(pixel(), [Drop(("image", "label"), 0.3)], 1e-2, lora=EVERYTHING, ema_decay=0.5)
    second = pixel_model(3, num_classes=0, image_channels=0)
    second.network.get_parameter("conv_out.bias").data[0] += weight
    options = {"num_conditions": 4, "num_pictures": 2, "num_reference": 8, "batch_size": 4}
    given = {"self": None, "mine": Candidate(second, mix=0.5), "kept": copy.deepcopy(second)}
    callback = PriorComparison(given, [2.0], STEPS, every_n_steps=3, **options)
    seen = []
    callback.evaluate = lambda *a, **k: seen.append(PriorComparison.evaluate(callback, *a, **k)) or seen[-1]
    trainer(tmp_path, 3, callbacks=[callback]).fit(tuning, Pictures())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("prior ")]
    said = [line.split(" is ")[0] for line in lines if "adapter's own base" in line]
    held = [candidate.prior for candidate in callback.priors.values()]
    with tuning.averaged() as model:
        bound = callback.candidates(model)["mine", (2.0,)].prior
        assert (held[1] is second) == bool(weight) and callback.priors["mine"].mix == 0.5
        if weight:
            assert said == [] and bound.model is second
            size = f"{bytes_of(second.network) / 1e6:.2g} MB"
            why = f"is a second network of {size}: its weights are not those of the adapter's base"
            assert lines == [f"prior mine {why}", f"prior kept {why}"]
            return
        assert held == [None, "base", "base"] and said == ["prior mine", "prior kept"]
        assert isinstance(bound.model.network, Unadapted) and bound.model.network.network is model.network
    monkeypatch.setattr("priorguide.callbacks.comparison.without_copies", lambda priors, model, tell_others: priors)
    apart = PriorComparison(given, [2.0], STEPS, every_n_steps=3, **options)
    wanted = apart.evaluate(tuning, Pictures()).pictures
    assert apart.priors["mine"].prior is second and seen[0].pictures.keys() == wanted.keys()
    for arm, pictures in seen[0].pictures.items():
        torch.testing.assert_close(pictures, wanted[arm], rtol=0, atol=1e-5)


def test_without_an_adapter_it_is_refused():
    with pytest.raises(ValueError, match="prior 'base' is a network without its adapter, but UNet2DModel has none"):
        Candidate("base").bind(pixel())
