import math

import pytest
import torch

from priorguide.sample.distances import Estimate
from priorguide.sample.matched import Measured, across, at_agreement, conditions_needed, matched, needed
from priorguide.sample.metrics import Scores
from priorguide.sample.verdict import Rule, decide


def curve(*points: tuple[float, float, float], error: float = 0.0) -> list[Measured]:
    return [Measured(scale, Estimate(x, 0.0), Estimate(y, error)) for scale, x, y in points]


def row(prior: str, scales: list[float], psnr: float, kid: float) -> dict:
    return {
        "prior": prior,
        "scales": scales,
        "metrics": {"psnr": {"value": psnr, "error": 0.1}, "kid": {"value": kid, "error": 0.2}},
    }


def test_a_point_between_two_is_interpolated():
    found = at_agreement(curve((1, 10, 5), (2, 14, 3), (3, 15, 9)), Estimate(13, 0.0))
    assert (found.scale, found.distance, found.error) == pytest.approx((1.75, 3.5, 0.0))


def test_the_error_has_the_distances_and_the_agreements_along_the_slope():
    line = [
        Measured(1, Estimate(10, 0.3), Estimate(5, 1.0)),
        Measured(2, Estimate(14, 0.5), Estimate(3, 2.0)),
    ]
    found = at_agreement(line, Estimate(12, 0.4))
    assert found.error == pytest.approx(math.hypot(1.5, 0.5 * math.hypot(0.4, 0.4)))
    # Never below what independent neighbours would give.
    assert found.error >= math.hypot(0.5 * 1.0, 0.5 * 2.0)


def test_the_error_bounds_what_repetitions_show():
    """Neighbours that share half their noise: the bound holds, and is not twice too wide."""
    draw = torch.Generator().manual_seed(0)
    shared, own = torch.randn(4000, 4, generator=draw), torch.randn(4000, 4, generator=draw)
    noise = ((shared[:, :1] + own) * math.sqrt(0.5)).tolist()
    found = []
    for a, b, c, d in noise:
        line = [
            Measured(1, Estimate(10 + 0.3 * a, 0.3), Estimate(5 + 0.3 * b, 0.3)),
            Measured(2, Estimate(14 + 0.3 * c, 0.3), Estimate(4 + 0.3 * d, 0.3)),
        ]
        found.append(at_agreement(line, Estimate(12, 0.0)))
    spread = torch.tensor([f.distance for f in found]).std().item()
    assert spread < torch.tensor([f.error for f in found]).mean() < 2 * spread


@pytest.mark.parametrize("level", [9.9, 14.1])
def test_what_the_curve_does_not_reach_is_none(level):
    assert at_agreement(curve((1, 10, 5), (2, 14, 3)), Estimate(level, 0.0)) is None


def test_its_ends_and_a_single_point_are_reached():
    assert at_agreement(curve((1, 10, 5), (2, 14, 3)), Estimate(14, 0.0)).scale == 2
    assert at_agreement(curve((1, 10, 5)), Estimate(10, 0.0)).distance == 5
    assert at_agreement(curve((1, 10, 5), (2, 10, 4)), Estimate(10, 0.0)).distance == 4
    assert at_agreement([], Estimate(10, 0.0)) is None


def test_a_curve_that_turns_back_gives_its_better_crossing():
    assert at_agreement(curve((1, 10, 5), (2, 14, 3), (3, 10, 9)), Estimate(12, 0.0)).distance == 4


def test_every_candidate_is_read_at_the_agreement_of_the_baselines_own_scale():
    rows = [row("none", [1], 10, 5), row("self", [2], 12, 6), row("self", [3], 11, 9)]
    rows += [row("base", [2], 14, 4), row("far", [2], 11, 7)]
    chosen = {"self": [2], "base": [2], "far": [2]}
    (entry,) = matched(rows, chosen, "self", "kid", ["psnr", "accuracy"])
    assert (entry["agreement"], entry["scales"]) == ("psnr", [2])
    assert entry["level"] == {"value": 12, "error": 0.1} and entry["own"]["value"] == 6
    assert entry["priors"]["base"]["distance"] == pytest.approx(4.5)  # half way from "none" to its scale 2
    assert entry["priors"]["base"]["scale"] == pytest.approx(1.5)
    assert entry["priors"]["far"] is None and entry["reached"] == {"base": [10, 14], "far": [10, 11]}


def test_a_baseline_at_scale_1_is_the_row_of_none():
    rows = [row("none", [1], 10, 5), row("self", [2], 12, 6), row("base", [2], 14, 4)]
    (entry,) = matched(rows, {"self": [1], "base": [2]}, "self", "kid", ["psnr"])
    assert entry["own"]["value"] == 5 and entry["priors"]["base"]["distance"] == 5


def test_longer_ladders_have_a_curve_for_each_of_the_other_scales():
    rows = [row("self", [1.5, 7], 10, 5)]
    rows += [row("base", [1.5, 7], 9, 5), row("base", [2, 7], 11, 7), row("base", [1.5, 3], 9, 2)]
    rows += [row("base", [2, 3], 11, 4)]
    (entry,) = matched(rows, {"self": [1.5, 7], "base": [2, 7]}, "self", "kid", ["psnr"])
    assert across(rows) == 0 and entry["priors"]["base"]["distance"] == pytest.approx(3.0)
    assert across([row("self", [1.5, 7], 0, 0), row("self", [1.5, 3], 0, 0)]) == 1


def test_rows_that_are_not_finite_are_left_out():
    rows = [row("self", [2], 12, 6), row("base", [1.5], 10, 5), row("base", [2], 14, 3), row("base", [3], math.nan, 0)]
    rows[1]["metrics"]["kid"]["error"] = None
    (entry,) = matched(rows, {"self": [2], "base": [2]}, "self", "kid", ["psnr"])
    assert entry["priors"]["base"]["distance"] == pytest.approx(4.0)


@pytest.mark.parametrize("candidates", [1, 3])
def test_so_many_conditions_just_settle_it(candidates):
    """Against the verdict itself: the same differences over more conditions."""

    def interval(repeats: int) -> tuple[float, tuple[float, float], str]:
        draw = torch.Generator().manual_seed(1)
        half = torch.randn(20, generator=draw, dtype=torch.float64)
        half = 0.15 + (half - half.mean()) / half.std(correction=0)  # the same mean and spread, however often repeated
        gain = half.repeat_interleave(2).repeat(repeats)
        arms = {("self", (2.0,)): Scores(None, {"psnr": torch.zeros_like(gain)})}
        arms |= {(f"base{i}", (2.0,)): Scores(None, {"psnr": gain}) for i in range(candidates)}
        (first, *_) = decide(arms, rule=Rule("psnr", {})).comparisons
        return first.difference, first.interval, first.outcome

    difference, ends, outcome = interval(1)
    assert outcome == "no difference"
    count = conditions_needed(difference, ends, 40, 0.95, candidates)
    assert interval(-(-count // 40) + 1)[2] == "better" and interval(count // 40 - 1)[2] == "no difference"
    assert count % 2 == 0


def test_none_where_no_number_would_do():
    assert conditions_needed(0.0, (-1, 1), 100, 0.95) is None
    assert conditions_needed(-0.1, (-1, 1), 100, 0.95) is None
    assert conditions_needed(0.1, (-math.inf, math.inf), 100, 0.95) is None
    assert conditions_needed(1.01, (-1, 1), 100, 0.95) <= 100


def entry(outcome: str, difference: float, interval: tuple[float, float], **guards) -> dict:
    return {"prior": "base", "metric": "kid", "difference": difference, "interval": interval, "outcome": outcome,
            "guards": guards}  # fmt: skip


def settled(margin: float, *entries: dict) -> dict:
    rule = {"level": 0.95, "margin": margin}
    return needed({"rule": rule, "comparisons": entries, "conditions": 1000})


def test_only_what_is_open_needs_more():
    assert settled(0.0, entry("better", -3.0, (-4.0, -2.0)), entry("worse", 3.0, (2.0, 4.0))) == {}
    assert (
        3980 < settled(0.0, entry("no difference", -0.5, (-1.5, 0.5)))["base"] < 4000
    )  # half the width: about four times
    assert 3980 < settled(0.0, entry("no difference", 0.5, (-0.5, 1.5)))["base"] < 4000  # to know that it is worse
    assert 15900 < settled(0.25, entry("no difference", -0.5, (-1.5, 0.5)))["base"] < 16000
    assert settled(1.0, entry("no difference", -0.5, (-1.5, 0.5))) == {"base": None}


def test_a_guard_that_is_too_wide_needs_more_and_one_that_is_lost_is_none():
    wide = {"difference": -0.1, "interval": [-0.9, 0.7], "allowed": 0.5, "holds": False}
    lost = {"difference": -0.6, "interval": [-0.9, -0.3], "allowed": 0.5, "holds": False}
    held = {"difference": 0.1, "interval": [-0.3, 0.5], "allowed": 0.5, "holds": True}
    assert 3980 < settled(0.0, entry("guard broken", -3.0, (-4.0, -2.0), psnr=wide, accuracy=held))["base"] < 4000
    assert settled(0.0, entry("guard broken", -3.0, (-4.0, -2.0), psnr=lost, accuracy=wide)) == {"base": None}
