"""What a record says beside its verdict: distances at matched agreement, and how many conditions would settle it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy.special import stdtrit

from .checkpoints import unguided
from .distances import Estimate
from .metrics import BETTER

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """One point of a candidate's curve: what was measured at one value of the scale."""

    scale: float
    agreement: Estimate
    distance: Estimate


@dataclass(frozen=True)
class Matched:
    """A candidate where its curve reaches the wanted agreement: the scale and the distance there.

    error: the standard error of the distance, or rather a bound on it, see `at_agreement`.
    """

    scale: float
    distance: float
    error: float


def at_agreement(curve: Sequence[Measured], agreement: Estimate) -> Matched | None:
    """Where the curve, of points in order of scale, reaches the agreement; None where it does not get there.

    Straight lines join the points. Where it gets there more than once, the least distance is taken, as a candidate may
    be used at any scale. Neighbouring points share noise and conditions, so that their errors may move together: the
    errors of the distances are interpolated like the distances, which bounds theirs from above. That of both agreements
    is turned into one of distance by the segment's slope, and added as if independent.
    """
    found = []
    for a, b in zip(curve, curve[1:], strict=False):
        span = b.agreement.value - a.agreement.value
        if span == 0 or not 0 <= (share := (agreement.value - a.agreement.value) / span) <= 1:
            continue

        def between(start: float, end: float, share: float = share) -> float:
            return start + share * (end - start)

        slope = (b.distance.value - a.distance.value) / span
        along = math.hypot(between(a.agreement.error, b.agreement.error), agreement.error)
        error = math.hypot(between(a.distance.error, b.distance.error), slope * along)
        found.append(Matched(between(a.scale, b.scale), between(a.distance.value, b.distance.value), error))
    level = [p for p in curve if p.agreement.value == agreement.value]
    found += [Matched(p.scale, p.distance.value, p.distance.error) for p in level if not found]
    return min(found, key=lambda matched: matched.distance, default=None)


def across(rows: Iterable[Row]) -> int:
    """Which of the scales curves run along: the lowest that varies, since priors concern the lowest; 0 if none does."""
    grid = {tuple(row["scales"]) for row in rows}
    return next((k for k in range(len(min(grid, default=()))) if len({scales[k] for scales in grid}) > 1), 0)


def curves(rows: Sequence[Row], prior: str, agreement: str, distance: str) -> list[list[Measured]]:
    """A prior's curves over the rows of a record, one for each choice of the other scales, in order of scale.

    They pass through the rows of "none", where no prior has a part. Rows that lack either metric are left out.
    """
    k = across(rows)
    lines: dict[tuple[float, ...], list[Measured]] = {}
    for row in sorted(rows, key=lambda row: row["scales"][k]):
        x, y = _estimate(row, agreement), _estimate(row, distance)
        if row["prior"] in (prior, unguided(prior)) and x and y:
            rest = (*row["scales"][:k], *row["scales"][k + 1 :])
            lines.setdefault(rest, []).append(Measured(row["scales"][k], x, y))
    return list(lines.values())


def matched(
    rows: Sequence[Row],
    chosen: Mapping[str, Sequence[float]],
    baseline: str,
    distance: str,
    agreements: Iterable[str],
) -> list[dict[str, Any]]:
    """Per agreement, every candidate's distance where it agrees as the baseline does at the baseline's chosen scales.

    rows: as `Evaluation.rows` has them. chosen: the verdict's scales by prior. The result is JSON-able: "agreement",
    "distance" (names), "baseline", "scales", "level" and "own" (the baseline's agreement and distance, with errors),
    "priors": name -> scale, distance, error, or None where the curve does not get there, and "reached": name -> the
    least and the greatest agreement on the candidate's curve. Agreements that the baseline's row lacks are left out.
    """
    own = [
        r
        for r in rows
        if r["prior"] in (baseline, unguided(baseline)) and list(r["scales"]) == list(chosen.get(baseline, ()))
    ]
    entries = []
    for agreement in agreements:
        level = _estimate(own[0], agreement) if own else None
        there = _estimate(own[0], distance) if own else None
        if level is None or there is None:
            continue
        entry: dict[str, Any] = {
            "agreement": agreement,
            "distance": distance,
            "baseline": baseline,
            "scales": list(chosen[baseline]),
            "level": asdict(level),
            "own": asdict(there),
            "priors": {},
            "reached": {},
        }
        for prior in chosen:
            lines = [] if prior == baseline else curves(rows, prior, agreement, distance)
            if values := [point.agreement.value for line in lines for point in line]:
                found = [place for line in lines if (place := at_agreement(line, level))]
                best = min(found, key=lambda place: place.distance, default=None)
                entry["priors"][prior] = asdict(best) if best else None
                entry["reached"][prior] = [min(values), max(values)]
        entries.append(entry)
    return entries


def _estimate(row: Row, key: str) -> Estimate | None:
    """The row's metric, where it was measured and is finite; 0 stands for an error that is not known."""
    entry = row["metrics"].get(key) or {}
    value, error = entry.get("value"), entry.get("error") or 0.0
    if value is None or not math.isfinite(value):
        return None
    return Estimate(value, error if math.isfinite(error) else 0.0)


def needed(verdict: Mapping[str, Any]) -> dict[str, int | None]:
    """How many conditions in all would settle each candidate that the verdict left open, if it differs as observed.

    verdict: `Verdict.to_json`. Settled is a difference whose interval lies beyond the margin or on the bad side, and a
    guard whose interval rules the loss out. None where no number would do: the observed difference is not beyond the
    margin, or the observed loss is greater than what the guard allows. An estimate that itself is as uncertain as the
    difference: half of all repetitions at that number would still leave it open.
    """
    rule, comparisons, count = verdict["rule"], verdict["comparisons"], verdict["conditions"]
    found: dict[str, int | None] = {}
    for entry in comparisons:
        open_ = []
        gain = BETTER[entry["metric"]] * entry["difference"]
        if entry["outcome"] == "no difference":
            open_ = [(gain - rule["margin"] if gain > 0 else -gain, entry["interval"])]
        elif entry["outcome"] == "guard broken":
            guards = {name: guard for name, guard in entry["guards"].items() if not guard["holds"]}
            open_ = [(BETTER[n] * g["difference"] + g["allowed"], g["interval"]) for n, g in guards.items()]
        if open_:
            numbers = [conditions_needed(slack, i, count, rule["level"], len(comparisons)) for slack, i in open_]
            whole = [number for number in numbers if number is not None]
            found[entry["prior"]] = max(whole) if len(whole) == len(numbers) else None
    return found


def conditions_needed(
    slack: float, interval: Sequence[float], conditions: int, level: float, candidates: int = 1
) -> int | None:
    """The least number of conditions at which half the interval's width is below `slack`; None if that is not above 0.

    interval: as `decide` makes it of `conditions` at `level` over all `candidates`. The standard error falls as one
    over the root of the number, and Student's quantile with it. Even, as the halves are equal.
    """

    def quantile(count: int) -> float:
        return float(stdtrit(max(count - 1, 1), 1 - (1 - level) / (2 * candidates)))

    half = (interval[1] - interval[0]) / 2
    if not (slack > 0 and math.isfinite(half)):
        return None
    error = half / quantile(conditions) * math.sqrt(conditions)  # at one condition
    low, high = 2, 4
    while quantile(high) * error / math.sqrt(high) >= slack:
        low, high = high, 2 * high
        if high > 1e12:
            return None
    while high - low > 2:
        middle = (low + high) // 4 * 2
        low, high = (middle, high) if quantile(middle) * error / math.sqrt(middle) >= slack else (low, middle)
    return high
