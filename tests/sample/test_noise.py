"""Noise paths and the table of predictions."""

import itertools
import math
from typing import get_args

import diffusers
import pytest
import torch
from oracle import zero_terminal

from priorguide.sample.noise import (
    DiscretePath,
    FlowPath,
    Prediction,
    add_noise,
    convert,
    like,
    log_snr,
    split,
    weights,
)

PREDICTIONS = get_args(Prediction)
NAMED = {
    "linear": (DiscretePath.linear, {"beta_start": 1e-4, "beta_end": 0.02}),
    "scaled_linear": (DiscretePath.scaled_linear, {"beta_start": 0.00085, "beta_end": 0.012}),
    "squaredcos_cap_v2": (DiscretePath.cosine, {}),
}


PATHS = {
    "linear": DiscretePath.linear(),
    "scaled_linear": DiscretePath.scaled_linear(),
    "cosine": DiscretePath.cosine(),
    "zero_terminal": zero_terminal(),
    "flow": FlowPath(),
}


def truth(path, t):
    """alpha, sigma, x_0, eps, x_t at times t, all float64."""
    alpha, sigma = path.coefficients(t)
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, len(t), dtype=torch.float64, generator=generator)
    return alpha, sigma, x_0, eps, alpha * x_0 + sigma * eps


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize(("source", "target"), list(itertools.product(PREDICTIONS, PREDICTIONS)))
def test_every_prediction_converts_into_every_other_and_back(path, source, target):
    t = torch.arange(1, 1000)
    alpha, sigma, x_0, eps, x_t = truth(path, t)
    # An epsilon says nothing of x_0 where there is no signal.
    usable = (alpha > 1e-9) if "epsilon" in (source, target) else torch.ones_like(alpha, dtype=torch.bool)
    a, b = weights(source, alpha, sigma)
    c, d = weights(target, alpha, sigma)
    there = convert(a * x_0 + b * eps, x_t, source, target, alpha, sigma)
    back = convert(there, x_t, target, source, alpha, sigma)
    # The 2x2 solve divides by alpha (epsilon), sigma (sample), 1 (v) or alpha + sigma (flow).
    tolerance = 1e-14 / torch.minimum(alpha, sigma).clamp(min=1e-12) + 1e-12
    assert ((there - (c * x_0 + d * eps)).abs() <= tolerance)[usable].all()
    assert ((back - (a * x_0 + b * eps)).abs() <= tolerance)[usable].all()
    assert usable.sum() >= 998


@pytest.mark.parametrize("prediction", ["v_prediction", "sample", "flow_prediction"])
def test_x_0_is_known_where_no_signal_is_left(prediction):
    path = PATHS["zero_terminal"]
    alpha, sigma, x_0, eps, x_t = truth(path, torch.tensor([999]))
    assert path.alphas_cumprod[-1] == 0 and alpha.abs() < 1e-15
    a, b = weights(prediction, alpha, sigma)
    found, noise = split(prediction, a * x_0 + b * eps, x_t, alpha, sigma)
    torch.testing.assert_close(found, x_0, rtol=0, atol=1e-14)
    torch.testing.assert_close(noise, eps, rtol=0, atol=1e-14)


def test_table_of_weights():
    alpha, sigma = torch.tensor([0.8]), torch.tensor([0.6])
    table = {name: tuple(float(w) for w in weights(name, alpha, sigma)) for name in PREDICTIONS}
    assert table == {
        "epsilon": (0, 1),
        "sample": (1, 0),
        "v_prediction": (pytest.approx(-0.6), pytest.approx(0.8)),
        "flow_prediction": (-1, 1),
    }


def test_weights_are_the_training_targets_of_diffusers():
    path = DiscretePath.scaled_linear()
    scheduler = diffusers.DDPMScheduler(**path.scheduler_config())
    x_0, eps = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 1, 500, 998, 999])
    alpha, sigma = path.coefficients(t)
    a, b = weights("v_prediction", alpha, sigma)
    torch.testing.assert_close(add_noise(x_0, eps, alpha, sigma), scheduler.add_noise(x_0, eps, t), rtol=0, atol=1e-5)
    torch.testing.assert_close(add_noise(x_0, eps, a, b), scheduler.get_velocity(x_0, eps, t), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMED)
def test_named_tables_are_those_of_diffusers(name):
    make, betas = NAMED[name]
    theirs = diffusers.DDPMScheduler(beta_schedule=name, **betas).alphas_cumprod.double()
    torch.testing.assert_close(make().alphas_cumprod, theirs, rtol=5e-5, atol=0)


@pytest.mark.parametrize("path", [p for p in PATHS.values() if isinstance(p, DiscretePath)])
def test_coefficients_are_the_table_at_whole_times_and_smooth_between(path):
    t = torch.arange(1000)
    alpha, sigma = path.coefficients(t)
    torch.testing.assert_close(alpha**2, path.alphas_cumprod, rtol=0, atol=1e-15)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-15)
    fine = torch.linspace(0, 999, 100_001, dtype=torch.float64)
    alpha, sigma = path.coefficients(fine)
    assert (alpha.diff() < 0).all() and (sigma.diff() > 0).all()
    assert alpha.isfinite().all() and sigma.isfinite().all()
    assert (
        path.coefficients(torch.tensor([-5.0, 2000.0]))[1].tolist()
        == path.coefficients(torch.tensor([0, 999]))[1].tolist()
    )


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_time_undoes_log_snr_at_continuous_times(path):
    t = torch.linspace(0.5, 998.5, 9_981, dtype=torch.float64)
    torch.testing.assert_close(path.time(log_snr(*path.coefficients(t))), t, rtol=0, atol=1e-6)
    falling = torch.linspace(8, -8, 1001, dtype=torch.float64)
    assert (path.time(falling).diff() >= 0).all()


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_time_is_clamped_to_the_path(path):
    extremes = torch.tensor([math.inf, 60.0, -100.0, -math.inf], dtype=torch.float64)
    last = 1000 if isinstance(path, FlowPath) else 999
    assert path.time(extremes).tolist() == pytest.approx([0, 0, last, last], abs=1e-6)


def test_ranges_of_log_snr():
    low, high = DiscretePath.linear().log_snr_range()
    ends = DiscretePath.linear().alphas_cumprod[[-1, 0]]
    assert [low, high] == pytest.approx((ends / (1 - ends)).log().tolist(), rel=1e-9)
    assert FlowPath().log_snr_range() == (-math.inf, math.inf)
    assert zero_terminal().log_snr_range()[0] < -60


def test_the_flow_is_a_straight_line():
    path = FlowPath(500)
    alpha, sigma = path.coefficients(torch.tensor([0.0, 125.0, 500.0]))
    assert alpha.tolist() == [1, 0.75, 0] and sigma.tolist() == [0, 0.25, 1]
    assert path.time(torch.tensor([0.0])).item() == 250
    assert path == FlowPath(500) and path != FlowPath() and path != DiscretePath.linear()


def test_drawn_times_are_uniform():
    u = (torch.arange(10_000) + 0.5) / 10_000
    drawn = DiscretePath.linear().draw(u)
    assert drawn.dtype == torch.long and torch.bincount(drawn).tolist() == [10] * 1000
    flow = FlowPath().draw(u)
    assert flow.min() >= 0 and flow.max() <= 1000
    assert flow.sort().values.diff().tolist() == pytest.approx([0.1] * 9_999, abs=1e-3)


@pytest.mark.parametrize("path", [p for p in PATHS.values() if isinstance(p, DiscretePath)])
def test_a_scheduler_from_the_config_follows_the_table(path):
    scheduler = diffusers.DDPMScheduler(**path.scheduler_config())
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), path.alphas_cumprod, rtol=1e-4, atol=1e-9)


def test_a_table_without_a_name_is_passed_on_as_betas():
    table = DiscretePath.linear().alphas_cumprod[::2]
    config = DiscretePath(table).scheduler_config()
    assert set(config) == {"num_train_timesteps", "trained_betas"} and config["num_train_timesteps"] == 500
    again = DiscretePath.from_betas(config["trained_betas"])
    torch.testing.assert_close(again.alphas_cumprod, table, rtol=1e-12, atol=0)
    assert again == DiscretePath(table) and again != DiscretePath.linear()
    assert set(DiscretePath.scaled_linear(steps=100).scheduler_config()) == {
        "num_train_timesteps",
        "beta_schedule",
        "beta_start",
        "beta_end",
    }


def test_equality_sees_the_noise_levels_alone():
    named, bare = DiscretePath.linear(), DiscretePath(DiscretePath.linear().alphas_cumprod)
    assert named == bare and hash(named) == hash(bare)
    assert named != DiscretePath.scaled_linear() and named != DiscretePath.linear(steps=999)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: weights("score", torch.ones(1), torch.ones(1)), r"prediction must be one of .*epsilon.*, got 'score'"),
        (lambda: like(torch.ones(4, 1), torch.ones(4, 2)), r"coefficient must have shape \(4,\), got \(4, 1\)"),
        (lambda: like(torch.ones(3), torch.ones(4, 2)), r"coefficient must have shape \(4,\), got \(3,\)"),
        (lambda: DiscretePath(torch.ones(2, 3)), r"shape \(T,\) with T >= 2, got \(2, 3\)"),
        (lambda: DiscretePath([0.5]), r"shape \(T,\) with T >= 2, got \(1,\)"),
        (lambda: DiscretePath([0.5, 0.6]), "alphas_cumprod must fall"),
        (lambda: DiscretePath([0.9, 0.9]), "alphas_cumprod must fall"),
        (lambda: DiscretePath([1.5, 0.5]), "alphas_cumprod must fall"),
        (lambda: DiscretePath([0.5, -0.1]), "alphas_cumprod must fall"),
    ],
)
def test_errors_name_what_was_expected_and_what_was_found(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
