"""Candidates of several checkpoints under one verdict."""

import pytest
import torch

from priorguide.sample.checkpoints import OWN, at, decide_over, parted, row_name, unguided
from priorguide.sample.metrics import Scores
from priorguide.sample.verdict import Rule, decide


def arm(mean: float) -> Scores:
    draw = torch.Generator().manual_seed(int(1000 * mean))
    return Scores(per_condition={"psnr": mean + 0.1 * torch.randn(200, generator=draw)})


RULE = Rule(decide_by="psnr", guards={}, baseline="self@400")


def test_names():
    assert at("base", 400) == "base@400" and parted("base@400") == ("base", 400)
    assert parted("base") == ("base", None) and parted("me@home") == ("me@home", None)
    assert unguided("base@400") == "none@400" and unguided("base") == "none" == unguided("none")
    assert row_name("base@400", (1.0, 5.0)) == "none@400" and row_name("base@400", (2.0,)) == "base@400"


def test_scale_1_counts_for_its_own_checkpoints_baseline():
    arms = {
        ("self@300", (1.0,)): arm(14),
        ("base@300", (1.0,)): arm(14),
        ("self@300", (2.0,)): arm(11),
        ("base@300", (2.0,)): arm(12),
        ("self@400", (1.0,)): arm(13),
        ("base@400", (1.0,)): arm(13),
        ("self@400", (2.0,)): arm(10),
        ("base@400", (2.0,)): arm(9),
    }
    verdict = decide_over(arms, None, RULE)
    assert verdict.chosen == {"self@400": (1.0,), "self@300": (1.0,), "base@300": (2.0,), "base@400": (2.0,)}
    assert (verdict.prior, verdict.scales, verdict.confident) == ("self@300", (1.0,), True)
    assert str(OWN) not in str(verdict)
    assert verdict.sentence.startswith("Deploy self@300 at scale 1") and "beats self@400 at scale 1" in verdict.sentence
    differences = {c.prior: c.difference for c in verdict.comparisons}
    assert differences == pytest.approx({"self@300": 1, "base@300": -1, "base@400": -4}, abs=0.05)


def test_the_correction_grows_with_the_pairs():
    def width(names):
        arms = {(name, (2.0,)): arm(10 + i / 10) for i, name in enumerate(names)}
        (low, high) = decide_over(arms, None, RULE).comparisons[0].interval
        return high - low

    assert width(["self@400", "base@400", "self@300", "base@300"]) > 1.2 * width(["self@400", "base@400"])


def test_one_checkpoint_is_decided_as_ever():
    arms = {("self", (1.0,)): arm(10), ("base", (1.0,)): arm(10), ("base", (2.0,)): arm(12)}
    rule = Rule(decide_by="psnr", guards={})
    assert decide_over(arms, None, rule) == decide(arms, None, rule)
