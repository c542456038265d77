"""Guidance at fewer evaluations: which settings there are, and the cheapest that is shown to be no worse.

A setting leaves guidance out at both ends of the path (arXiv 2404.07724), takes the difference to the prior again
between refreshes, or does both.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .compare import Cost
from .guidance import Guidance
from .kernels import KERNELS
from .metrics import BETTER
from .planning import asked
from .verdict import UNITS, Guard, Verdict

MIDDLES = (1.0, 0.8, 0.6)
"""The shares of the guided steps, about their middle, that stay guided."""
REFRESHES = (1, 2, 3, 4)
FULL = "as it is"
"""The name of the setting that all others are measured against."""


@dataclass(frozen=True)
class Options:
    """A setting's interval and refresh, as `Guidance` has them, and how many steps are guided within the interval."""

    interval: tuple[float, float] | None
    refresh: int
    guided: int


@dataclass(frozen=True)
class Setting:
    """One setting beside FULL. evaluations, seconds_per_image: as `Cost`. difference, bounds, guards: paired, as a
    verdict's `Comparison` has them. no_worse: a loss beyond the margin is ruled out, and every guard holds."""

    name: str
    options: Options
    evaluations: int
    seconds_per_image: float
    difference: float
    bounds: tuple[float, float]
    guards: dict[str, Guard]
    no_worse: bool


@dataclass(frozen=True)
class Cheaper:
    """What a search for a cheaper setting found. chosen: a setting's name, FULL where none is shown to be no worse.
    settings: the dearest first, without FULL, whose evaluations and seconds_per_image stand apart."""

    prior: str
    scales: tuple[float, ...]
    metric: str
    margin: float
    level: float
    conditions: int
    evaluations: int
    seconds_per_image: float
    settings: tuple[Setting, ...]
    chosen: str
    sentence: str

    def to_json(self) -> dict[str, Any]:
        """All of it in plain dicts, lists, numbers and strings."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]


def variants(guidance: Guidance, timesteps: Sequence[float]) -> dict[str, Options]:
    """By name, FULL first: every setting that asks for other predictions along `timesteps`.

    An interval of its own is only narrowed, and a refresh only made rarer. ValueError where nothing is guided.
    """
    guided = [float(t) for t in timesteps if guidance.scales_at(float(t))[0] != 1]
    if not guided:
        raise ValueError(f"at scales {guidance.scales} no prior is evaluated: there is nothing to make cheaper")
    found = {FULL: Options(guidance.interval, guidance.refresh, len(guided))}
    seen = [asked(guidance, timesteps)]
    for share in MIDDLES:
        left = round(len(guided) * (1 - share) / 2)
        kept = guided[left : len(guided) - left]
        interval = (min(kept), max(kept)) if left else guidance.interval
        for refresh in REFRESHES:
            refresh = max(refresh, guidance.refresh)
            if (needed := asked(replace(guidance, interval=interval, refresh=refresh), timesteps)) in seen:
                continue
            seen.append(needed)
            words = [f"the middle {len(kept)} of {len(guided)} guided steps"] if left else []
            words += [f"refreshed every {refresh} steps"] if refresh > 1 else []
            found[", ".join(words)] = Options(interval, refresh, len(kept))
    return found


def default_margin(metric: str, value: float) -> float:
    """How much worse counts as no worse: a tenth of a distance between sets, a hundredth of a score per condition."""
    return (0.1 if metric in KERNELS else 0.01) * max(value, 0.0)


def cheapest(
    verdict: Verdict,
    costs: Mapping[str, Cost],
    options: Mapping[str, Options],
    margin: float,
    arm: tuple[str, tuple[float, ...]],
) -> Cheaper:
    """The setting of the fewest evaluations that is no worse than FULL, the better one of equals; FULL if none is.

    verdict: on the settings by name, FULL being its baseline: its paired differences, with intervals over all settings
    together, are what is read. A setting is no worse where its interval rules out a loss of more than `margin` (in
    the metric's units) and every guard holds: the burden of proof lies on the saving. options: as `variants` gives
    them. arm: the prior and scales that are to be made cheaper. ValueError for a margin below 0.
    """
    if not margin >= 0:
        raise ValueError(f"margin must be 0 or more, the loss in {verdict.decide_by} that may be, got {margin}")
    settings = []
    for found in verdict.comparisons:
        spent = costs[found.prior]
        least = min(BETTER[found.metric] * end for end in found.interval)
        no_worse = least >= -margin and all(guard.holds for guard in found.guards.values())
        numbers = (spent.evaluations, spent.seconds_per_image, found.difference, found.interval, found.guards)
        settings.append(Setting(found.prior, options[found.prior], *numbers, no_worse))
    settings.sort(key=lambda one: -one.evaluations)
    metric, full = verdict.decide_by, costs[FULL]
    fit = [one for one in settings if one.no_worse and one.evaluations < full.evaluations]
    best = min(fit, key=lambda one: (one.evaluations, -BETTER[metric] * one.difference)) if fit else None
    return Cheaper(
        *arm,
        metric,
        margin,
        verdict.rule.level,
        verdict.conditions,
        full.evaluations,
        full.seconds_per_image,
        tuple(settings),
        best.name if best else FULL,
        _sentence(best, metric, margin, full, verdict.rule.level),
    )


def _sentence(best: Setting | None, metric: str, margin: float, full: Cost, level: float) -> str:
    unit = UNITS.get(metric, "")
    allowed = f"a loss of more than {margin:.3g}{unit} in {metric}"
    if best is None:
        return f"No cheaper setting is shown to be no worse: {allowed}, or a broken guard, is not ruled out for any."
    low, high = best.bounds
    return (
        f"Cheaper and no worse: {best.name}, {best.evaluations} evaluations in place of {full.evaluations}; {allowed} "
        f"is ruled out ({metric} {best.difference:+.3g}{unit}, {100 * level:g} % interval {low:+.3g} to {high:+.3g})."
    )


def with_setting(guidance: Guidance, record: Mapping[str, Any] | None, prior: str) -> Guidance:
    """The guidance with the setting that `record`, a comparison's, chose for this prior at these scales, if it did."""
    found = (record or {}).get("cheaper")
    if not found or found["prior"] != prior or tuple(found["scales"]) != tuple(guidance.scales):
        return guidance
    chosen = next((one for one in found["settings"] if one["name"] == found["chosen"]), None)
    if chosen is None:
        return guidance
    interval, refresh = chosen["options"]["interval"], chosen["options"]["refresh"]
    return replace(guidance, interval=None if interval is None else tuple(interval), refresh=refresh)
