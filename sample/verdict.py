"""Which prior to deploy, and how sure that is.

Each half of the conditions is judged at the scale that the other half chose (even rows and odd ones), so that every
condition counts and trying more scales gives no advantage. Candidates share noise and conditions, so what is judged is
the paired difference to the baseline.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from scipy.special import stdtrit
from torch import Tensor

from .distances import Estimate, Reference, mean
from .guidance import Arm
from .kernels import KERNELS, kernel_distance, kernel_distance_difference
from .metrics import BETTER, HALVES, OF_SETS, Scores, interleaved

Outcome = Literal["better", "worse", "no difference", "guard broken"]
UNITS = {"psnr": " dB"}


@dataclass(frozen=True)
class Rule:
    """How a prior earns its place.

    decide_by: "kid", "mmd" or a metric per condition (`metrics.PER_CONDITION`, and of clips PER_CLIP). A candidate must
    beat the baseline by more than `margin` (>= 0, in the metric's units), with confidence `level` over all candidates
    together.
    guards: by how much other metrics may be worse (>= 0, in their units). A guard holds where the same interval rules
    out a greater loss. "Not shown to be worse" would be the weaker reading: with few conditions nothing can be shown,
    so that it would wave through most where least is known. The burden of proof lies on the candidate, since the
    baseline is safe and costs one network; where a guard fails for width alone, more conditions narrow it.
    """

    decide_by: str = "kid"
    guards: Mapping[str, float] = field(default_factory=lambda: {"psnr": 0.1})
    margin: float = 0.0
    level: float = 0.95
    baseline: str = "self"

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of all that it looks at."""
        return self.decide_by, *self.guards

    def __post_init__(self) -> None:
        for name in self.metrics:
            if name in OF_SETS and name not in KERNELS:
                raise ValueError(f"{name} has no unbiased paired difference to decide or guard by; use kid or mmd")
            if name not in BETTER:
                known = ", ".join(name for name in BETTER if name in KERNELS or name not in OF_SETS)
                raise ValueError(f"a rule's metrics must be among {known}, got {name!r}")
        if not 0 < self.level < 1:
            raise ValueError(f"level must lie between 0 and 1, got {self.level}")
        if not all(0 <= allowed < math.inf for allowed in (self.margin, *self.guards.values())):
            raise ValueError(f"margin and guards must be 0 or more, got {self.margin} and {dict(self.guards)}")


@dataclass(frozen=True)
class Guard:
    """The paired difference in a guarded metric, its interval, and whether a loss over `allowed` is ruled out."""

    difference: float
    interval: tuple[float, float]
    allowed: float
    holds: bool


@dataclass(frozen=True)
class Comparison:
    """A candidate less the baseline, each at its own best scale, on conditions that did not choose it.

    scales, baseline_scales: the best over all conditions, which are deployed. judged_at: those of the candidate that
    each half was judged at. difference, interval: in the metric's units and direction, so that a KID below 0 speaks
    for the candidate.
    """

    prior: str
    scales: tuple[float, ...]
    baseline_scales: tuple[float, ...]
    judged_at: tuple[tuple[float, ...], ...]
    metric: str
    difference: float
    interval: tuple[float, float]
    guards: dict[str, Guard]
    outcome: Outcome


@dataclass(frozen=True)
class Verdict:
    """What to deploy. confident: a candidate won, or every candidate was shown to be worse. chosen: scales by prior."""

    prior: str
    scales: tuple[float, ...]
    confident: bool
    chosen: dict[str, tuple[float, ...]]
    comparisons: tuple[Comparison, ...]
    rule: Rule
    conditions: int
    sentence: str

    @property
    def decide_by(self) -> str:
        return self.rule.decide_by

    def to_json(self) -> dict[str, Any]:
        """All of it in plain dicts, lists, numbers and strings."""
        return {**_plain(asdict(self)), "decide_by": self.decide_by}


def decide(
    arms: Mapping[Arm, Scores], reference: Tensor | Reference | None = None, rule: Rule | None = None
) -> Verdict:
    """The verdict on arms keyed (prior, scales), whose i-th rows share a condition and a seed, by `rule`.

    reference: features (M, D) of real pictures, where "kid" or "mmd" is asked for; it serves both halves.
    Where the lowest scale is 1 no prior is evaluated, whatever the name: such an arm is the baseline's, which needs no
    second network either, and candidates compete with the scales at which they are used.
    A candidate wins where the interval (Bonferroni over candidates) of its paired difference lies beyond the margin
    on the good side and every guard holds; it does harm where the interval lies on the bad side. The winner with the
    greatest gain is deployed, else the baseline.
    ValueError where conditions differ in number or are fewer than 4, a value is not finite, or the rule names a
    baseline or a metric that the arms lack.
    """
    rule = rule or Rule()
    reference = None if reference is None else Reference.of(reference)
    count = _check(arms, reference, rule)
    grids: dict[str, dict[tuple[float, ...], Scores]] = {rule.baseline: {}}
    for (prior, scales), scores in arms.items():
        grids.setdefault(rule.baseline if scales[0] == 1 else prior, {}).setdefault(scales, scores)
    chosen = {prior: _best(grid, reference, rule.decide_by) for prior, grid in grids.items()}
    chosen_by = {
        prior: [_best(grid, reference, rule.decide_by, half) for half in HALVES] for prior, grid in grids.items()
    }
    judged_at = {prior: tuple(reversed(scales)) for prior, scales in chosen_by.items()}
    best = {prior: interleaved([grids[prior][scales] for scales in at]) for prior, at in judged_at.items()}
    candidates = [prior for prior in grids if prior != rule.baseline]

    def compare(prior: str, metric: str) -> tuple[float, tuple[float, float]]:
        estimate = _difference(best[prior], best[rule.baseline], metric, reference)
        quantile = float(stdtrit(count - 1, 1 - (1 - rule.level) / (2 * len(candidates))))
        half = quantile * estimate.error
        return estimate.value, (estimate.value - half, estimate.value + half)

    comparisons = []
    for prior in candidates:
        difference, interval = compare(prior, rule.decide_by)
        guards = {}
        for metric, allowed in rule.guards.items():
            value, bounds = compare(prior, metric)
            guards[metric] = Guard(value, bounds, allowed, _gain(metric, bounds)[0] >= -allowed)
        outcome = _outcome(_gain(rule.decide_by, interval), rule.margin, guards)
        where = (chosen[prior], chosen[rule.baseline], judged_at[prior])
        comparisons.append(Comparison(prior, *where, rule.decide_by, difference, interval, guards, outcome))
    winners = [c for c in comparisons if c.outcome == "better"]
    winner = max(winners, key=lambda c: BETTER[c.metric] * c.difference) if winners else None
    prior = winner.prior if winner else rule.baseline
    harmed = bool(comparisons) and all(c.outcome == "worse" for c in comparisons)
    sentence = _sentence(prior, chosen[prior], winner, comparisons, rule)
    return Verdict(prior, chosen[prior], bool(winner) or harmed, chosen, tuple(comparisons), rule, count, sentence)


def _check(arms: Mapping[Arm, Scores], reference: Reference | None, rule: Rule) -> int:
    """The number of conditions. ValueError as `decide` says."""
    if not any(name == rule.baseline for name, _ in arms):
        raise ValueError(f"the baseline {rule.baseline!r} is not among the arms {sorted({name for name, _ in arms})}")
    for metric in rule.metrics:
        if metric in KERNELS and reference is None:
            raise ValueError(f"the rule names {metric}, which needs the features of a reference; none were given")
    counts = {}
    for (prior, scales), scores in arms.items():
        if not scales:
            raise ValueError(f"the arm {prior!r} has no scales; give one for each rung of the ladder")
        name = f"{prior} at scale {_scale(scales)}"
        for metric in rule.metrics:
            values = scores.features if metric in KERNELS else scores.per_condition.get(metric)
            if values is None:
                has = f"metric {metric!r} (it has {sorted(scores.per_condition)})"
                raise ValueError(
                    f"the rule names {metric}, but {name} has no {'features' if metric in KERNELS else has}"
                )
            if metric in KERNELS and reference is not None:
                reference.match(values, f"the features of {name}")
            elif not values.isfinite().all():
                raise ValueError(f"the {metric} of {name} must be finite, but holds NaN or infinity")
            counts[f"{metric} of {name}"] = len(values)
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{n} ({name})" for name, n in sorted(counts.items(), key=lambda item: item[1]))
        raise ValueError(f"all arms must share their conditions, got different numbers: {told}")
    if (count := next(iter(counts.values()))) < 4:
        raise ValueError(f"a verdict needs at least 4 conditions, got {count}")
    return count


def _best(
    grid: Mapping[tuple[float, ...], Scores],
    reference: Reference | None,
    metric: str,
    rows: slice = slice(None),
) -> tuple[float, ...]:
    """The scales with the best `metric` on the rows that choose; the first of equals."""

    def merit(scales: tuple[float, ...]) -> float:
        scores = grid[scales].take(rows)
        if metric not in KERNELS:
            return BETTER[metric] * scores.per_condition[metric].double().mean().item()
        assert scores.features is not None and reference is not None
        return BETTER[metric] * kernel_distance(scores.features, reference, metric=metric).value

    return next(iter(grid)) if len(grid) == 1 else max(grid, key=merit)


def _difference(a: Scores, b: Scores, metric: str, reference: Reference | None) -> Estimate:
    if metric not in KERNELS:
        return mean(a.per_condition[metric].double() - b.per_condition[metric].double())
    assert a.features is not None and b.features is not None and reference is not None
    return kernel_distance_difference(a.features, b.features, reference, metric=metric)


def _gain(metric: str, interval: tuple[float, float]) -> tuple[float, float]:
    """The interval with better above 0."""
    return interval if BETTER[metric] > 0 else (-interval[1], -interval[0])


def _outcome(gain: tuple[float, float], margin: float, guards: Mapping[str, Guard]) -> Outcome:
    if gain[1] < 0:
        return "worse"
    if gain[0] <= margin:
        return "no difference"
    return "better" if all(guard.holds for guard in guards.values()) else "guard broken"


# In words


def _at(prior: str, scales: Sequence[float]) -> str:
    return f"{prior} at scale {_scale(scales)}" + (" (no prior evaluated)" if scales[0] == 1 else "")


def _scale(scales: Sequence[float]) -> str:
    return ", ".join(f"{scale:g}" for scale in scales)


def _measured(metric: str, difference: float, interval: tuple[float, float], level: float) -> str:
    unit = UNITS.get(metric, "")
    return f"{metric} {difference:+.3g}{unit}, {100 * level:g} % interval {interval[0]:+.3g} to {interval[1]:+.3g}"


def _sentence(
    prior: str, scales: tuple[float, ...], winner: Comparison | None, comparisons: Sequence[Comparison], rule: Rule
) -> str:
    deploy = f"deploy {_at(prior, scales)}"
    if winner:
        told = [_measured(winner.metric, winner.difference, winner.interval, rule.level)]
        told += [_measured(name, g.difference, g.interval, rule.level) for name, g in winner.guards.items()]
        return f"D{deploy[1:]}: it beats {_at(rule.baseline, winner.baseline_scales)} ({'; '.join(told)})."
    if not comparisons:
        return f"D{deploy[1:]}: no other prior was compared."
    told = [_told(comparison, rule) for comparison in comparisons]
    if all(comparison.outcome == "worse" for comparison in comparisons):
        return f"D{deploy[1:]}: {'; '.join(told)}."
    return f"No clear winner: {deploy}, which needs one network only ({'; '.join(told)})."


def _told(comparison: Comparison, rule: Rule) -> str:
    """What is said of a candidate that did not win."""
    name = _at(comparison.prior, comparison.scales)
    told = _measured(comparison.metric, comparison.difference, comparison.interval, rule.level)
    if comparison.outcome == "worse":
        return f"{comparison.prior} harms here, at scale {_scale(comparison.scales)} {told}"
    if comparison.outcome == "no difference":
        return f"{name}: {told}"
    broken = " and ".join(
        f"a loss of more than {guard.allowed:g}{UNITS.get(metric, '')} is not ruled out, "
        + _measured(metric, guard.difference, guard.interval, rule.level)
        for metric, guard in comparison.guards.items()
        if not guard.holds
    )
    return f"{name} is better by {comparison.metric}, but {broken}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
