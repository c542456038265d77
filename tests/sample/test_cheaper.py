"""Settings of fewer evaluations, and the rule that chooses among them."""

import json
from dataclasses import replace

import pytest
import torch
from oracle import Mixture, labels

from priorguide.sample.cheaper import FULL, Options, cheapest, default_margin, variants, with_setting
from priorguide.sample.compare import Cost
from priorguide.sample.guidance import Guidance, unconditional
from priorguide.sample.loop import make_scheduler, trajectories
from priorguide.sample.metrics import Scores
from priorguide.sample.planning import evaluations
from priorguide.sample.verdict import Rule, decide

TIMES = [float(t) for t in range(980, -1, -20)]


def test_every_setting_asks_for_less():
    guidance = Guidance((3.0,))
    found = variants(guidance, TIMES)
    said = {
        name: evaluations(replace(guidance, interval=o.interval, refresh=o.refresh), TIMES) for name, o in found.items()
    }
    assert next(iter(found)) == FULL and said[FULL] == 100
    assert said["refreshed every 2 steps"] == 75 and said["refreshed every 3 steps"] == 67
    assert said["the middle 40 of 50 guided steps"] == 90
    assert found["the middle 40 of 50 guided steps"] == Options((100.0, 880.0), 1, 40)
    assert said["the middle 30 of 50 guided steps, refreshed every 4 steps"] == 58
    assert len(found) == 12 and all(count < 100 for name, count in said.items() if name != FULL)


def test_what_a_guidance_has_is_only_narrowed():
    guidance = Guidance((1.5, 7.5), interval=(200.0, 700.0), refresh=2)
    found = variants(guidance, TIMES)
    assert found[FULL] == Options((200.0, 700.0), 2, 26)
    for one in list(found.values())[1:]:
        assert one.refresh >= 2 and one.interval[0] >= 200 and one.interval[1] <= 700
    assert len(found) == 9


def test_short_paths_have_few_settings():
    assert [*variants(Guidance((3.0,)), [900.0, 400.0])] == [FULL, "refreshed every 2 steps"]


@pytest.mark.parametrize("guidance", [Guidance((1.0,)), Guidance((3.0,), interval=(2000.0, 3000.0))])
def test_where_nothing_is_guided_nothing_gets_cheaper(guidance):
    with pytest.raises(ValueError, match="nothing to make cheaper"):
        variants(guidance, TIMES)


def test_names_tell_what_is_sampled():
    """Evaluations as counted on the networks themselves, and each setting's picture another's no more."""
    fine, base = Mixture(), Mixture(means=((1.0, 1.0), (0.0, 0.0), (0.0, 1.0)))
    scheduler = make_scheduler(fine)
    scheduler.set_timesteps(10)
    guidance = Guidance((3.0,), unconditional(base, onto=fine))
    pictures = []
    for one in variants(guidance, scheduler.timesteps.tolist()).values():
        fine.rows.clear(), base.rows.clear()
        setting = replace(guidance, interval=one.interval, refresh=one.refresh)
        pictures.append(trajectories(fine, labels(0, 1), [0], [setting], scheduler=scheduler, steps=10)[0])
        assert sum(fine.rows) + sum(base.rows) == evaluations(setting, scheduler.timesteps.tolist())
    assert len({tuple(picture.flatten().tolist()) for picture in pictures}) == len(pictures)


def found(losses, margin, guards=None, count=400, noise=0.1):
    """`cheapest` of settings whose PSNR is less by `losses` {(name, evaluations): dB}, and SSIM by a tenth of that."""
    draw = torch.Generator().manual_seed(0)
    own = torch.randn(count, generator=draw, dtype=torch.float64)
    arms, costs = {(FULL, (3.0,)): Scores(None, {"psnr": own, "ssim": own / 10})}, {FULL: Cost(50, 1.0, 0)}
    for (name, spent), loss in losses.items():
        values = own - loss + noise * torch.randn(count, generator=draw, dtype=torch.float64)
        arms[name, (3.0,)] = Scores(None, {"psnr": values, "ssim": values / 10})
        costs[name] = Cost(spent, spent / 50, 0)
    options = {name: Options(None, 2, 25) for name in costs}
    rule = Rule("psnr", guards or {}, baseline=FULL)
    return cheapest(decide(arms, None, rule), costs, options, margin, ("base", (3.0,)))


def test_the_cheapest_that_is_shown_to_be_no_worse_is_chosen():
    losses = {("a", 45): 0.0, ("b", 40): 0.02, ("c", 38): 0.02, ("d", 34): 0.3}
    one = found(losses, 0.1)
    assert one.chosen == "c" and [s.name for s in one.settings] == ["a", "b", "c", "d"]
    assert [s.no_worse for s in one.settings] == [True, True, True, False]
    assert one.sentence.startswith("Cheaper and no worse: c, 38 evaluations in place of 50")
    assert found(losses, 0.5).chosen == "d"  # a wider margin allows more
    assert found(losses, 0.5, {"ssim": 0.01}).chosen == "c"  # and the guard takes it back


def test_of_equal_evaluations_the_better_is_chosen():
    assert found({("a", 38): 0.03, ("b", 38): 0.0}, 0.1).chosen == "b"


def test_few_conditions_show_nothing():
    """No difference at all, but too noisy to tell: the burden of proof lies on the saving."""
    one = found({("a", 38): 0.0}, 0.02, count=20)
    assert one.chosen == FULL and one.sentence.startswith("No cheaper setting is shown to be no worse")
    assert found({("a", 38): 0.0}, 0.02, count=2000).chosen == "a"


def test_what_costs_as_much_is_not_cheaper():
    assert found({("a", 50): -1.0}, 0.1).chosen == FULL


def test_a_setting_that_loses_the_margin_is_rarely_chosen():
    """At a true loss of the margin itself, the share of wrong choices is at most (1 - level) / 2."""
    wrong, runs = 0, 300
    for seed in range(runs):
        draw = torch.Generator().manual_seed(seed)
        own = torch.randn(200, generator=draw, dtype=torch.float64)
        other = own - 0.1 + torch.randn(200, generator=draw, dtype=torch.float64)
        arms = {(name, (3.0,)): Scores(None, {"psnr": v}) for name, v in ((FULL, own), ("a", other))}
        costs, options = (
            {FULL: Cost(50, 1.0, 0), "a": Cost(38, 0.8, 0)},
            dict.fromkeys((FULL, "a"), Options(None, 2, 25)),
        )
        verdict = decide(arms, None, Rule("psnr", {}, baseline=FULL))
        wrong += cheapest(verdict, costs, options, 0.1, ("base", (3.0,))).chosen == "a"
    assert wrong <= 0.025 * runs + 3 * (0.025 * 0.975 * runs) ** 0.5


def test_margins():
    assert default_margin("kid", 0.03) == pytest.approx(0.003) and default_margin("kid", -0.001) == 0
    assert default_margin("psnr", 13.0) == pytest.approx(0.13)
    with pytest.raises(ValueError, match="margin must be 0 or more"):
        found({("a", 38): 0.0}, -0.1)


def test_a_record_deploys_what_was_chosen_for_its_pair():
    one = found({("a", 38): 0.0}, 0.1).to_json()
    assert json.loads(json.dumps(one)) == one
    record = {
        "cheaper": {**one, "settings": [{**one["settings"][0], "options": {"interval": [100.0, 900.0], "refresh": 2}}]}
    }
    plain = Guidance((3.0,), rescale=0.3)
    cheap = with_setting(plain, record, "base")
    assert vars(cheap) == vars(replace(plain, interval=(100.0, 900.0), refresh=2))
    for other in (
        (Guidance((2.0,)), record, "base"),
        (plain, record, "self"),
        (plain, {}, "base"),
        (plain, None, "base"),
    ):
        assert with_setting(*other) is other[0]
    assert with_setting(plain, {"cheaper": {**record["cheaper"], "chosen": FULL}}, "base") is plain
