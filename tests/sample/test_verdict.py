import json
import math

import pytest
import torch
from scipy.special import stdtrit
from scipy.stats import ttest_rel
from torch import Tensor
from world import World

from priorguide.sample.distances import Reference, frechet_distance
from priorguide.sample.kernels import kernel_distance, kernel_distance_difference
from priorguide.sample.metrics import PER_CONDITION, Scores
from priorguide.sample.verdict import Rule, decide


def covered(
    repeats: int, count: int, references: int, a: dict[str, float], b: dict[str, float], metric: str = "kid"
) -> float:
    """How often the 95 % interval of a difference in kernel distance holds the truth."""
    world = World(0)
    truth = getattr(world, metric)(**a) - getattr(world, metric)(**b)
    quantile = stdtrit(count - 1, 0.975)
    hits = 0
    for _ in range(repeats):
        conditions = world.conditions(count)
        reference = world.draw(world.conditions(references))
        drawn = [world.draw(conditions, **given) for given in (a, b)]
        found = kernel_distance_difference(*drawn, reference, metric=metric)
        hits += abs(found.value - truth) <= quantile * found.error
    return hits / repeats


def within(share: float, expected: float, repeats: int) -> bool:
    """Three binomial standard errors."""
    return abs(share - expected) <= 3 * math.sqrt(expected * (1 - expected) / repeats)


@pytest.mark.parametrize("metric, repeats", [("kid", 300), ("mmd", 150)])
def test_interval_covers_the_truth(metric, repeats):
    share = covered(repeats, 500, 1000, dict(shift=0.1, scale=1.1), dict(shift=0.05), metric)
    assert within(share, 0.95, repeats), share


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["kid", "mmd"])
@pytest.mark.parametrize("b", [dict(shift=0.05), dict(scale=0.9), dict(shift=-0.1, scale=1.1)])
def test_interval_covers_the_truth_at_the_quickstarts_size(b, metric):
    share = covered(300, 800, 3000, dict(shift=0.1, scale=1.1), b, metric)
    assert within(share, 0.95, 300), share


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["kid", "mmd"])
def test_interval_errs_on_the_safe_side_where_both_equal_the_reference(metric):
    assert covered(500, 300, 1000, {}, {}, metric) >= 0.95


@pytest.mark.slow
def test_a_plain_bootstrap_of_the_frechet_distance_does_not_cover():
    """Why it is not used: resampling adds the bias of N samples again, more of it for the wider distribution."""
    generator = torch.Generator().manual_seed(0)
    width, count, truth = 64, 400, 64 * ((1.3 - 1) ** 2 - (0.8 - 1) ** 2)

    def covers() -> bool:
        reference = Reference(torch.randn(3000, width, generator=generator))
        noise = torch.randn(count, width, generator=generator)
        differences = []
        for _ in range(40):
            rows = torch.randint(count, (count,), generator=generator)
            wide, narrow = (frechet_distance(scale * noise[rows], reference) for scale in (1.3, 0.8))
            differences.append(wide - narrow)
        low, high = torch.tensor(differences).quantile(torch.tensor([0.025, 0.975])).tolist()
        return low <= truth <= high

    assert sum(covers() for _ in range(40)) < 30


def claims(repeats: int, count: int, references: int, metric: str = "kid") -> float:
    """How often `decide` claims a difference between priors of one distribution and independent noise."""
    world, found = World(1), 0
    for _ in range(repeats):
        conditions = world.conditions(count)
        arms = {
            (prior, (scale,)): Scores(world.draw(conditions, shift=0.05 * (scale - 2) ** 2, scale=1.05))
            for prior in ("self", "base")
            for scale in (1.5, 2.0, 3.0)
        }
        verdict = decide(arms, world.draw(world.conditions(references)), Rule(metric, {}))
        found += verdict.comparisons[0].outcome != "no difference"
    return found / repeats


def test_equal_priors_are_rarely_told_apart():
    share = claims(100, 400, 600)
    assert share <= 0.05 or within(share, 0.05, 100), share


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["kid", "mmd"])
def test_equal_priors_are_told_apart_in_at_most_five_percent(metric):
    share = claims(1000, 400, 600, metric)
    assert share <= 0.05 or within(share, 0.05, 1000), share


def scored(psnr: Tensor | float, count: int = 40, seed: int = 0, **others: Tensor) -> Scores:
    """Scores whose conditions differ by 1 dB, and whose arms differ by 0.01 dB of noise besides."""
    common = torch.randn(count, generator=torch.Generator().manual_seed(1000))
    own = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return Scores(per_condition={"psnr": 20 + common + 0.01 * own + psnr, **others})


PSNR = Rule(decide_by="psnr", guards={})


def test_better_candidate_wins():
    arms = {("self", (2.0,)): scored(0), ("base", (2.0,)): scored(0.5, seed=1), ("other", (2.0,)): scored(0.3, seed=2)}
    verdict = decide(arms, rule=PSNR)
    assert (verdict.prior, verdict.scales, verdict.confident) == ("base", (2.0,), True)
    assert [c.outcome for c in verdict.comparisons] == ["better", "better"]
    assert verdict.sentence.startswith("Deploy base at scale 2: it beats self at scale 2 (psnr +0.")


def test_interval_is_the_paired_t_interval_with_bonferroni():
    base, own = scored(0.5, seed=1), scored(0)
    arms = {("self", (2.0,)): own, ("base", (2.0,)): base, ("other", (2.0,)): scored(0, seed=2)}
    judged = [scores.per_condition["psnr"].double().numpy() for scores in (base, own)]
    low, high = ttest_rel(*judged).confidence_interval(0.975)
    comparison = decide(arms, rule=PSNR).comparisons[0]
    assert comparison.interval == pytest.approx((low, high))
    assert comparison.difference == pytest.approx((judged[0] - judged[1]).mean())


def test_worse_candidate_harms():
    verdict = decide({("self", (2.0,)): scored(0), ("base", (2.0,)): scored(-1, seed=1)}, rule=PSNR)
    assert (verdict.prior, verdict.confident, verdict.comparisons[0].outcome) == ("self", True, "worse")
    assert verdict.sentence.startswith("Deploy self at scale 2: base harms here, at scale 2 psnr -")
    assert " dB, 95 % interval " in verdict.sentence


def test_tie_is_the_baselines():
    verdict = decide({("self", (2.0,)): scored(0), ("base", (3.0,)): scored(0, seed=1)}, rule=PSNR)
    assert (verdict.prior, verdict.confident, verdict.comparisons[0].outcome) == ("self", False, "no difference")
    assert verdict.sentence.startswith("No clear winner: deploy self at scale 2, which needs one network only (base at")


def test_margin_must_be_beaten():
    arms = {("self", (2.0,)): scored(0), ("base", (2.0,)): scored(0.5, seed=1)}
    assert decide(arms, rule=Rule("psnr", {}, margin=0.4)).prior == "base"
    assert decide(arms, rule=Rule("psnr", {}, margin=0.6)).comparisons[0].outcome == "no difference"


def test_guard_wants_proof():
    right, half = torch.ones(40), torch.arange(40).remainder(4).lt(2).float()
    rule = Rule("psnr", {"accuracy": 0.1})

    def outcome(own: Tensor, other: Tensor) -> str:
        arms = {
            ("self", (2.0,)): scored(0, accuracy=own),
            ("base", (2.0,)): scored(0.5, seed=1, accuracy=other),
        }
        verdict = decide(arms, rule=rule)
        assert (verdict.prior == "base") == (verdict.comparisons[0].outcome == "better")
        return verdict.comparisons[0].outcome

    assert outcome(right, right) == "better"
    assert outcome(half, right) == "better"
    assert outcome(right, half) == "guard broken"
    assert outcome(half, half.roll(2)) == "guard broken"  # equal on average, but a loss of 0.1 is not ruled out


def test_guard_that_fails_is_told():
    arms = {
        ("self", (2.0,)): scored(0, accuracy=torch.ones(40)),
        ("base", (2.0,)): scored(0.5, seed=1, accuracy=torch.zeros(40)),
    }
    verdict = decide(arms, rule=Rule("psnr", {"accuracy": 0.1}))
    guard = verdict.comparisons[0].guards["accuracy"]
    assert (guard.difference, guard.interval, guard.allowed, guard.holds) == (-1, (-1, -1), 0.1, False)
    assert (
        "base at scale 2 is better by psnr, but a loss of more than 0.1 is not ruled out, accuracy -1"
        in verdict.sentence
    )


@pytest.mark.parametrize("metric", [name for name in PER_CONDITION if name != "psnr"])
def test_any_metric_per_condition_decides_or_guards_in_its_own_direction(metric):
    low, high = (scored(0, seed=seed).per_condition["psnr"] + seed for seed in (0, 1))
    more = {("self", (2.0,)): scored(0, **{metric: low}), ("base", (2.0,)): scored(0.5, 40, 1, **{metric: high})}
    verdict = decide(more, rule=Rule(metric, {}))
    assert verdict.prior == ("self" if metric in ("lpips", "flicker") else "base")
    assert f" {metric} +1" in verdict.sentence or f"({metric} +1" in verdict.sentence
    guarded = decide(more, rule=Rule("psnr", {metric: 0.5})).comparisons[0]
    assert guarded.outcome == ("guard broken" if metric in ("lpips", "flicker") else "better")


def test_kernels_decide_and_guard_alike():
    world = World(2)
    reference = world.draw(world.conditions(300))
    arms = kid_arms(world, 200, self=(2.0, 1.0), base=(2.0, 0.0))
    found = {metric: decide(arms, reference, Rule(metric, {})).comparisons[0] for metric in ("kid", "mmd")}
    assert {metric: (c.metric, c.outcome) for metric, c in found.items()} == {
        "kid": ("kid", "better"),
        "mmd": ("mmd", "better"),
    }
    assert found["kid"].difference != found["mmd"].difference
    judged = (arms[name, (2.0,)].features for name in ("base", "self"))
    wanted = kernel_distance_difference(*judged, reference, metric="mmd")
    assert found["mmd"].difference == pytest.approx(wanted.value)
    guard = decide(arms, reference, Rule("kid", {"mmd": 0.0})).comparisons[0].guards["mmd"]
    assert guard.difference == pytest.approx(wanted.value) and guard.holds
    with pytest.raises(ValueError, match="names mmd, which needs the features of a reference"):
        decide(arms, None, Rule("mmd", {}))


def test_scales_are_chosen_by_the_kernel_that_decides():
    generator = torch.Generator().manual_seed(0)
    reference, near, shifted = (torch.randn(100, 8, generator=generator) for _ in range(3))
    near[0] *= 20  # one sample far out rules the cubic kernel, not the Gaussian
    arms = {("self", (2.0,)): Scores(near), ("self", (3.0,)): Scores(shifted + 0.5)}
    chosen = {metric: decide(arms, reference, Rule(metric, {})).scales for metric in ("kid", "mmd")}
    assert chosen == {"kid": (3.0,), "mmd": (2.0,)}


def kid_arms(world: World, count: int, **arms: tuple[float, float]) -> dict[tuple[str, tuple[float, ...]], Scores]:
    conditions = world.conditions(count)
    return {(name, (scale,)): Scores(world.draw(conditions, shift)) for name, (scale, shift) in arms.items()}


def test_kid_decides_and_lower_is_better():
    world = World(2)
    reference = world.draw(world.conditions(500))
    near = kid_arms(world, 400, self=(2.0, 0.0), base=(2.0, 1.0))
    verdict = decide(near, reference, Rule(guards={}))
    assert (verdict.prior, verdict.comparisons[0].outcome) == ("self", "worse")
    assert verdict.comparisons[0].difference > 0
    far = {("self", (2.0,)): near["base", (2.0,)], ("base", (2.0,)): near["self", (2.0,)]}
    verdict = decide(far, Reference(reference), Rule(guards={}))
    assert (verdict.prior, verdict.comparisons[0].outcome) == ("base", "better")
    assert verdict.comparisons[0].interval[1] < 0


def test_kid_is_the_one_of_all_conditions():
    world = World(3)
    reference = world.draw(world.conditions(300))
    arms = kid_arms(world, 200, self=(2.0, 0.1), base=(2.0, 0.2))
    own, base = (arms[name, (2.0,)].features for name in ("self", "base"))
    wanted = kernel_distance(base, reference).value - kernel_distance(own, reference).value
    assert decide(arms, reference, Rule(guards={})).comparisons[0].difference == pytest.approx(wanted)


def test_each_half_is_judged_at_the_scale_that_the_other_chose():
    even = torch.arange(40).remainder(2).eq(0)
    arms = {
        ("self", (1.5,)): scored(torch.where(even, 0.0, 9.0)),  # chosen by the odd rows and over all, 0 on the even
        ("self", (2.0,)): scored(torch.where(even, 1.0, 0.0), seed=1),  # chosen by the even rows, 0 on the odd
        ("base", (2.0,)): scored(torch.where(even, 0.0, 2.0), seed=2),  # chosen by the odd rows, 0 on the even
        ("base", (3.0,)): scored(torch.where(even, 4.0, -1.0), seed=3),  # by the even rows and over all, -1 on the odd
    }
    verdict = decide(arms, rule=PSNR)
    assert verdict.chosen == {"self": (1.5,), "base": (3.0,)}
    comparison = verdict.comparisons[0]
    assert comparison.judged_at == ((2.0,), (3.0,))
    assert (comparison.baseline_scales, comparison.outcome) == ((1.5,), "worse")
    assert comparison.difference == pytest.approx(-0.5, abs=0.02)


def test_many_scales_give_no_advantage():
    """Of ten scales of pure noise the best looks good; judged on the other half it does not."""
    own = {("self", (2.0,)): scored(0)}
    found = []
    for repeat in range(40):
        noise = torch.randn(10, 40, generator=torch.Generator().manual_seed(repeat))
        base = {("base", (2.0 + i,)): scored(noise[i]) for i in range(10)}
        found.append(decide(own | base, rule=PSNR).comparisons[0].difference)
    assert abs(sum(found) / 40) <= 3 / math.sqrt(40 * 40)
    best = sum(torch.randn(10, 40, generator=torch.Generator().manual_seed(r)).mean(1).max().item() for r in range(40))
    assert best / 40 > 0.2


def test_scale_one_is_the_baselines_whatever_its_name():
    arms = {
        ("self", (2.0,)): scored(0),
        ("base", (1.0,)): scored(2, seed=1),
        ("base", (2.0,)): scored(1, seed=2),
        ("none", (1.0,)): scored(2, seed=1),
    }
    verdict = decide(arms, rule=PSNR)
    assert verdict.chosen == {"self": (1.0,), "base": (2.0,)}
    assert (verdict.prior, verdict.scales, len(verdict.comparisons)) == ("self", (1.0,), 1)
    assert verdict.sentence.startswith("Deploy self at scale 1 (no prior evaluated): base harms here")


def test_only_the_lowest_scale_leaves_the_prior_out():
    arms = {("self", (1.5, 7.5)): scored(0), ("base", (1.0, 7.5)): scored(1), ("base", (1.5, 1.0)): scored(2, seed=1)}
    verdict = decide(arms, rule=PSNR)
    assert verdict.chosen == {"self": (1.0, 7.5), "base": (1.5, 1.0)}
    assert (verdict.prior, verdict.scales) == ("base", (1.5, 1.0))


def test_alone_is_said_to_be():
    verdict = decide({("self", (1.5,)): scored(0)}, rule=PSNR)
    assert (verdict.confident, verdict.sentence) == (False, "Deploy self at scale 1.5: no other prior was compared.")


def test_json_round_trip():
    world = World(4)
    conditions = world.conditions(60)
    arms = {
        (name, (1.5, 7.5)): Scores(world.draw(conditions), scored(0, 60, seed).per_condition)
        for seed, name in enumerate(("self", "base"))
    }
    verdict = decide(arms, world.draw(world.conditions(50)))
    record = json.loads(json.dumps(verdict.to_json()))
    assert record == verdict.to_json()
    assert (record["decide_by"], record["chosen"]["base"], record["conditions"]) == ("kid", [1.5, 7.5], 60)
    assert record["rule"] == {
        "decide_by": "kid",
        "guards": {"psnr": 0.1},
        "margin": 0.0,
        "level": 0.95,
        "baseline": "self",
    }
    comparison = record["comparisons"][0]
    assert set(comparison["guards"]["psnr"]) == {"difference", "interval", "allowed", "holds"}
    assert comparison["baseline_scales"] == [1.5, 7.5]


def test_refuses_arms_that_do_not_fit():
    own = ("self", (2.0,))
    with pytest.raises(ValueError, match=r"baseline 'self' is not among the arms \['base'\]"):
        decide({("base", (2.0,)): scored(0)}, rule=PSNR)
    with pytest.raises(ValueError, match=r"different numbers: 38 \(psnr of base at scale 2\), 40 \(psnr of self"):
        decide({own: scored(0), ("base", (2.0,)): scored(0, 38)}, rule=PSNR)
    with pytest.raises(ValueError, match="at least 4 conditions, got 3"):
        decide({own: scored(0, 3)}, rule=PSNR)
    with pytest.raises(ValueError, match="the psnr of self at scale 2 must be finite"):
        decide({own: scored(math.nan)}, rule=PSNR)
    with pytest.raises(ValueError, match=r"names accuracy, but self at scale 2 has no .* \(it has \['psnr'\]\)"):
        decide({own: scored(0)}, rule=Rule("accuracy", {}))
    with pytest.raises(ValueError, match="'self' has no scales"):
        decide({("self", ()): scored(0)}, rule=PSNR)


def test_refuses_features_that_do_not_fit():
    features, bad = torch.rand(20, 4), torch.rand(20, 4)
    bad[0, 0] = math.nan
    own, rule = ("self", (2.0,)), Rule(guards={})
    with pytest.raises(ValueError, match="reference features must be finite"):
        decide({own: Scores(features)}, bad, rule)
    with pytest.raises(ValueError, match="features of self at scale 2 must be finite"):
        decide({own: Scores(bad)}, features, rule)
    with pytest.raises(ValueError, match="needs the features of a reference"):
        decide({own: Scores(features)}, None, rule)
    with pytest.raises(ValueError, match="self at scale 2 has no features"):
        decide({own: scored(0)}, features, rule)
    with pytest.raises(ValueError, match="have 4 columns, the reference 3"):
        decide({own: Scores(features)}, features[:, :3], rule)


@pytest.mark.parametrize(
    "given, told",
    [
        (dict(decide_by="fd"), "fd has no unbiased paired difference"),
        (dict(decide_by="fd_inf"), "use kid or mmd"),
        (dict(decide_by="sharpness"), "among kid, mmd, psnr, clip_text, .*, got 'sharpness'"),
        (dict(guards={"coverage": 0.1}), "coverage has no unbiased"),
        (dict(level=95), "between 0 and 1, got 95"),
        (dict(margin=-1), "0 or more, got -1"),
        (dict(guards={"psnr": -0.1}), "0 or more"),
        (dict(guards={"psnr": math.nan}), "0 or more"),
    ],
)
def test_rule_refuses(given, told):
    with pytest.raises(ValueError, match=told):
        Rule(**given)
