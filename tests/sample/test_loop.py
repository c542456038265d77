"""The sampling loop: batches, network evaluations, candidates that advance together."""

import copy

import pytest
import torch
from oracle import (
    DETERMINISTIC,
    STOCHASTIC,
    TWO,
    Mixture,
    TwoRungs,
    assert_near,
    labels,
    pixel_condition,
    pixel_model,
)

from priorguide.sample.guidance import Guidance, unconditional
from priorguide.sample.loop import make_scheduler, sample, trajectories
from priorguide.sample.noise import FlowPath
from priorguide.sample.planning import evaluations
from priorguide.sample.seeds import SeededNoise


@pytest.fixture(scope="module")
def model():
    return pixel_model()


@pytest.mark.parametrize(("name", "options", "eta"), [*DETERMINISTIC, *STOCHASTIC])
def test_a_batch_equals_its_singles(model, name, options, eta):
    scheduler = make_scheduler(model, name, **options)
    settings = {"scheduler": scheduler, "scales": [3.0], "steps": 5, "eta": eta}
    together = sample(model, pixel_condition(), [4, 5, 6], **settings)
    for i in (0, 2):
        own = {name: part[i : i + 1] for name, part in pixel_condition().items()}
        assert_near(sample(model, own, [4 + i], **settings)[0], together[i])


def test_a_lowest_scale_of_1_evaluates_no_prior(model):
    base, calls = pixel_model(seed=1), []
    base.denoise = lambda *args: calls.append(args)
    settings = {"scheduler": make_scheduler(model), "steps": 4}
    found = sample(model, pixel_condition(), [1, 2, 3], scales=[1.0], prior=unconditional(base, onto=model), **settings)
    assert not calls
    scheduler = settings["scheduler"]
    scheduler.set_timesteps(4)
    x = SeededNoise([1, 2, 3], model.shape).draw()
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model.denoise(x, torch.full((3,), float(t)), pixel_condition()), t, x).prev_sample
    assert torch.equal(found, x)


@pytest.mark.parametrize(
    "guidance",
    [
        Guidance((3.0,)),
        Guidance((1.0,)),
        Guidance((0.0,)),
        Guidance((3.0,), interval=(200, 800)),
        Guidance((3.0,), interval=(1200, 1300)),
        Guidance((3.0,), refresh=3),
        Guidance((0.0,), refresh=3),
        Guidance((3.0,), interval=(200, 800), refresh=2),
        Guidance((3.0,), rescale=0.5),
        Guidance((3.0,), guider="apg"),
    ],
)
@pytest.mark.parametrize("base", [False, True], ids=["self", "base"])
def test_evaluations_are_as_many_as_said(guidance, base):
    fine, other = Mixture(), Mixture()
    if base:
        guidance = Guidance(**{**vars(guidance), "prior": unconditional(other, onto=fine)})
    scheduler = make_scheduler(fine)
    trajectories(fine, labels(0, 3), [0, 1, 2], [guidance], scheduler=scheduler, steps=10)
    scheduler.set_timesteps(10)
    said = evaluations(guidance, scheduler.timesteps.tolist())
    assert sum(fine.rows) + sum(other.rows) == 3 * said
    assert base == (len(other.rows) > 0) or said == 10
    # The self prior shares its network's call.
    assert len(fine.rows) == 10 or guidance.scales == (0.0,)


def test_an_interval_skips_the_prior_outside_it():
    fine, other = Mixture(), Mixture()
    guidance = Guidance((3.0,), unconditional(other, onto=fine), interval=(200, 800))
    trajectories(fine, labels(0, 3), [0, 1, 2], [guidance], scheduler=make_scheduler(fine), steps=10)
    assert fine.rows == [3] * 10 and other.rows == [3] * 7  # t = 800, 700, ..., 200


def test_between_refreshes_the_prior_is_not_asked():
    fine, other = Mixture(), Mixture()
    settings = {"scheduler": make_scheduler(fine), "steps": 10}
    guidance = Guidance((3.0,), unconditional(other, onto=fine), interval=(200, 800), refresh=3)
    trajectories(fine, labels(0, 3), [0, 1, 2], [guidance, Guidance((3.0,), refresh=2)], **settings)
    assert other.rows == [3] * 3  # t = 800, 500, 200
    assert fine.rows == [9, 6] * 5
    with pytest.raises(ValueError, match="refresh must be 1 or more"):
        sample(fine, labels(0, 1), [0], scales=[3.0], refresh=0, **settings)


@pytest.mark.parametrize("refresh", [1, 2, 3])
def test_a_difference_that_is_taken_again(refresh):
    fine, base = TwoRungs(), TwoRungs(seed=1)
    scheduler = make_scheduler(fine)
    prior, settings = unconditional(base, onto=fine), {"scheduler": scheduler, "steps": 5}
    found = sample(fine, TWO, range(4), scales=[1.5, 7.5], prior=prior, refresh=refresh, **settings)
    scheduler.set_timesteps(5)
    x, null = SeededNoise(range(4), fine.shape).draw(), {name: torch.zeros_like(part) for name, part in TWO.items()}
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            times = torch.full((4,), float(t))
            mid, high = (fine.denoise(x, times, {**TWO, "text": null["text"]}), fine.denoise(x, times, TWO))
            if i % refresh == 0:
                difference = mid - base.denoise(x, times, null)
            x = scheduler.step(mid + 0.5 * difference + 7.5 * (high - mid), t, x).prev_sample
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5 * float(x.abs().max()))


def test_rungs_that_share_a_network_share_a_call():
    fine, base = TwoRungs(), TwoRungs(seed=1)
    settings = {"scheduler": make_scheduler(fine), "steps": 3}
    sample(fine, TWO, range(4), scales=[1.5, 7.5], **settings)
    assert fine.rows == [12] * 3
    fine.rows.clear()
    sample(fine, TWO, range(4), scales=[1.5, 7.5], prior=unconditional(base, onto=fine), **settings)
    assert fine.rows == [8] * 3 and base.rows == [4] * 3
    fine.rows.clear(), base.rows.clear()
    for scales, own, others in (([1.0, 7.5], 8, 0), ([2.0, 2.0], 4, 4), ([1.0, 1.0], 4, 0)):
        sample(fine, TWO, range(4), scales=scales, prior=unconditional(base, onto=fine), **settings)
        assert (set(fine.rows), set(base.rows) or {0}) == ({own}, {others})
        fine.rows.clear(), base.rows.clear()


def test_two_rungs_are_guided_by_the_formula():
    fine, base = TwoRungs(), TwoRungs(seed=1)
    scheduler = make_scheduler(fine)
    found = sample(
        fine, TWO, range(4), scales=[1.5, 7.5], prior=unconditional(base, onto=fine), scheduler=scheduler, steps=3
    )
    scheduler.set_timesteps(3)
    x, null = SeededNoise(range(4), fine.shape).draw(), {name: torch.zeros_like(part) for name, part in TWO.items()}
    with torch.no_grad():
        for t in scheduler.timesteps:
            times = torch.full((4,), float(t))
            low, mid, high = (
                base.denoise(x, times, null),
                fine.denoise(x, times, {**TWO, "text": null["text"]}),
                fine.denoise(x, times, TWO),
            )
            x = scheduler.step(low + 1.5 * (mid - low) + 7.5 * (high - mid), t, x).prev_sample
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5 * float(x.abs().max()))


@pytest.mark.parametrize(("name", "options", "eta"), [*DETERMINISTIC, *STOCHASTIC])
def test_candidates_that_advance_together_equal_each_alone(name, options, eta):
    fine = Mixture()
    base = unconditional(Mixture(means=((1.0, 1.0), (0.0, 0.0), (0.0, 1.0)), prediction="epsilon"), onto=fine)
    far = unconditional(Mixture(path=FlowPath(), prediction="flow_prediction"), onto=fine)
    guidances = [
        Guidance((3.0,)),
        Guidance((1.0,), base),
        Guidance((3.0,), base),
        Guidance((5.0,), base, interval=(100, 900)),
        Guidance((3.0,), base, refresh=2),
        Guidance((2.0,), far, rescale=0.7),
        Guidance((2.0,), far, guider="apg", guider_options={"adaptive_projected_guidance_momentum": -0.5}),
    ]
    settings = {"scheduler": make_scheduler(fine, name, **options), "steps": 6, "eta": eta}
    parts = {"label": torch.tensor([0, 1, 2])}
    together = trajectories(fine, parts, [1, 2, 3], guidances, **settings)
    assert together.shape == (7, 3, 2, 1, 1)
    for guidance, found in zip(guidances, together, strict=True):
        alone = trajectories(fine, parts, [1, 2, 3], [guidance], **settings)[0]
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
    assert (together[0] - together[2]).abs().max() > 0.01


def test_max_batch_bounds_the_rows_of_a_call(model):
    settings = {"scheduler": make_scheduler(model), "scales": [3.0], "steps": 3}
    whole = sample(model, pixel_condition(), [1, 2, 3], **settings)
    rows, denoise = [], model.denoise

    def watch(x_t, t, parts):
        assert len(t) == len(x_t) and all(len(part) == len(x_t) for part in parts.values())
        rows.append(len(x_t))
        return denoise(x_t, t, parts)

    model.denoise = watch
    try:
        split = sample(model, pixel_condition(), [1, 2, 3], max_batch=4, **settings)
    finally:
        del model.denoise
    assert rows == [4, 2] * 3
    assert_near(split, whole)


def test_networks_run_in_their_own_precision(model):
    base = pixel_model(seed=1)
    settings = {"scheduler": make_scheduler(model), "scales": [2.0], "steps": 3}
    single = sample(model, pixel_condition(), [1, 2, 3], prior=unconditional(base, onto=model), **settings)
    base.network.to(torch.bfloat16)
    mixed = sample(model, pixel_condition(), [1, 2, 3], prior=unconditional(base, onto=model), **settings)
    halved = copy.deepcopy(model)
    halved.network.to(torch.bfloat16)
    both = sample(halved, pixel_condition(), [1, 2, 3], prior=unconditional(base, onto=halved), **settings)
    for found in (mixed, both):
        assert found.dtype == torch.float32
        assert 0 < (found - single).abs().max() < 0.1 * single.abs().max()


def test_on_step_counts_and_may_end_the_sampling():
    mixture, seen = Mixture(), []
    settings = {"scheduler": make_scheduler(mixture), "steps": 5}
    trajectories(mixture, labels(0, 1), [0], [Guidance((1.0,))], on_step=lambda i, n: seen.append((i, n)), **settings)
    assert seen == [(i, 5) for i in range(5)]

    def stop(i, n):
        raise KeyboardInterrupt

    mixture.rows.clear()
    with pytest.raises(KeyboardInterrupt):
        trajectories(mixture, labels(0, 1), [0], [Guidance((1.0,))], on_step=stop, **settings)
    assert mixture.rows == [1]


def test_ddim_refuses_times_it_would_not_step_along():
    with pytest.raises(ValueError, match="linspace times; choose trailing"):
        make_scheduler(pixel_model(), "ddim", timestep_spacing="linspace")
