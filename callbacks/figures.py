"""The page's sections of curves, and what is read off them."""

from collections.abc import Mapping, Sequence
from itertools import groupby, product
from typing import Any

from ..sample.checkpoints import parted, unguided
from ..sample.matched import across
from .charts import Line, Point, curves, legend
from .page import Html, tag
from .quantities import AGREEMENTS, DISTANCES, candidate_text, measured, metric, number, present, reading, scale_text
from .tables import NEUTRAL, Record, arm_name, in_order, is_free, is_winner, scrolling, styles

BAND = 1.96
"""Standard errors that the bands reach up and down: a 95 % interval."""


def section(anchor: str, title: str, *parts: Any) -> Html | None:
    """A section with its heading; none where it has nothing to say."""
    return tag("section", tag("h2", title, id=anchor), *parts, aria_labelledby=anchor) if any(parts) else None


def tradeoff(record: Record) -> Html | None:
    """Distance against agreement with the condition, a line per prior."""
    rows = in_order(record)
    found = present(rows)
    y_keys, x_keys = distances(record), [key for key in found if key in AGREEMENTS][:2]
    # The distance that decides against two kinds of agreement, or else two distances against the only one.
    pairs = [(y_keys[0], x_key) for x_key in x_keys] if len(x_keys) > 1 and y_keys else list(product(y_keys, x_keys))
    figures = []
    for y_key, x_key in pairs:

        def point(row: Record, prior: str, y_key: str = y_key, x_key: str = x_key) -> Point | None:
            x, y = reading(row["metrics"], x_key), reading(row["metrics"], y_key)
            if not (x and y):
                return None
            told = f"{metric(y_key).head} {measured(*y)}, {metric(x_key).head} {measured(*x)}"
            note = f"{candidate_text(row['prior'], row['scales'])}: {told}"
            label, shared = scale_text(row["scales"]), row["prior"] != prior
            return Point(x[0], y[0], x[1], y[1], label, note, is_winner(record, row), shared)

        chart = curves(
            list(_lines(record, rows, point).values()),
            name=f"{metric(y_key).name} against {metric(x_key).name}, a line per prior; numbers in the table below",
            x_label=_axis(x_key),
            y_label=_axis(y_key),
            level=_level(record, y_key),
        )
        figures.append(tag("figure", chart))
    if not figures:
        return None
    ring = " The ring marks the verdict's pair." if record.get("verdict") else ""
    text = (
        "A stronger scale follows the condition more closely, and in the end strays from real pictures: priors compare "
        f"fairly along the whole curve, not at one scale. A point is a scale, its bars are one standard error.{ring}"
    )
    div = tag("div", *figures, class_="charts large")
    return section("tradeoff", "Distance against agreement with the condition", tag("p", text), _keys(record), div)


def distances(record: Record) -> list[str]:
    """The distances that the rows have, the one that decides first."""
    found, decide_by = present(in_order(record)), (record.get("verdict") or {}).get("decide_by")
    return [key for key in dict.fromkeys((decide_by, *DISTANCES)) if key in DISTANCES and key in found]


def at_matched_agreement(record: Record) -> Html | None:
    """A table: each candidate's distance where it agrees with the condition as the baseline does at its own scale."""
    entries = record.get("matched") or []
    priors = list(dict.fromkeys(prior for entry in entries for prior in entry["priors"]))
    if not priors:
        return None
    base, scales, distance = entries[0]["baseline"], entries[0]["scales"], entries[0]["distance"]
    own = tag("td", measured(*_in_unit(distance, entries[0]["own"])))
    lines = [tag("tr", tag("th", arm_name(record, base, scales), scope="row"), *[own] * len(entries), class_="soft")]
    key = metric(distance)
    for prior in priors:
        cells = [tag("td", *_matched_cell(entry, prior)) for entry in entries]
        lines.append(tag("tr", tag("th", arm_name(record, prior, ()), scope="row"), *cells))
    heads = [_at(entry) for entry in entries]
    table = tag(
        "table",
        tag("thead", tag("tr", *(tag("th", head, scope="col") for head in (f"{key.label} at equal", *heads)))),
        tag("tbody", *lines),
        class_="numbers",
    )
    text = (
        f"{base} at its own scale, {scale_text(scales)}, agrees with the condition as each column says. Below it "
        "stands the distance at which every other candidate's curve reaches the same agreement, whatever its scale."
    )
    if scales and scales[0] == 1:
        text += " At scale 1 no prior has a part, so all curves meet there."
    caption = (
        f"{key.better.capitalize()} is better. " if key.better else ""
    ) + "± is a bound on the standard error: straight lines join the scales, and what shared noise cancels is left in."
    return section("matched", "At matched agreement", tag("p", text), scrolling(table, caption))


def _at(entry: Record) -> str:
    known = metric(entry["agreement"])
    return f"{known.short or known.name} {number(*_in_unit(entry['agreement'], entry['level']))} {known.unit}".rstrip()


def _matched_cell(entry: Record, prior: str) -> list[Any]:
    place, reached = entry["priors"].get(prior), entry["reached"].get(prior)
    if place is not None:
        value = {"value": place["distance"], "error": place["error"]}
        near = tag("small", f" scale {place['scale']:.3g}")
        return [measured(*_in_unit(entry["distance"], value)), near]
    if not reached:
        return ["–"]
    least, most = (end * metric(entry["agreement"]).factor for end in reached)
    level, error = _in_unit(entry["agreement"], entry["level"])
    end = f"its most is {number(most, error)}" if level > most else f"its least is {number(least, error)}"
    return ["not reached", tag("small", f" {end}")]


def _in_unit(key: str, entry: Mapping[str, Any]) -> tuple[float, float]:
    return reading({key: entry}, key) or (float("nan"), 0.0)


def too_far(record: Record) -> Html | None:
    """The arms whose guidance goes too far, a sentence each."""
    sentences = [tag("li", entry["sentence"]) for entry in record.get("saturation") or () if entry.get("sentence")]
    text = "Contrast and clipping beside the real pictures, and the guided prediction beside the conditional one."
    return (
        section("saturation", "Guidance that goes too far", tag("p", text), tag("ul", *sentences))
        if sentences
        else None
    )


def health(record: Record, pictures: Html | None = None) -> Html | None:
    """How well each prior predicts held-out data without a condition: sentences, charts by noise level, pictures."""
    found: Mapping[str, Any] = record.get("health") or {}
    sentences = [tag("li", entry["sentence"]) for entry in found.values() if entry.get("sentence")]
    own = {parted(name)[1]: entry for name, entry in found.items() if not any(entry["gap"])}  # by checkpoint
    others = {name: entry for name, entry in found.items() if any(entry["gap"])}
    if not others:
        return None
    order = styles(record)

    def chart(y_label: str, name: str, values: Any, level: tuple[str, float] | None = None) -> Html:
        lines = []
        for prior, entry in others.items():
            points = []
            for snr, y in sorted(zip(entry["log_snr"], values(prior, entry), strict=True)):
                note = f"{prior}, log-SNR {number(snr, 0.2)}: {number(y)}"
                points.append(Point(snr, y, note=note))
            lines.append(Line(order.get(prior, NEUTRAL), tuple(points)))
        x_label = "log-SNR (noise to the left, clean to the right)"
        return tag("figure", curves(lines, name=name, x_label=x_label, y_label=y_label, level=level))

    figures = []
    if own:
        name = "Loss without a condition, relative to the model's own, by noise level, a line per prior"

        def ratio(prior: str, entry: Record) -> list[float]:
            mine = own[parted(prior)[1]]["loss"]
            return [a / b if b else float("nan") for a, b in zip(entry["loss"], mine, strict=True)]

        figures.append(chart("Loss / the model's own (lower is better)", name, ratio, ("the model's own null", 1.0)))
    name = "Distance between each prior's prediction and the model's own, by noise level"
    figures.append(chart("Root mean square gap to the model's own", name, lambda _, entry: entry["gap"]))
    text = (
        "Each prior predicts the noise in held-out pictures, without a condition, beside the fine-tuned model's own "
        "null prediction. This asks nothing of guidance; it says early whether a prior still knows the data."
    )
    keys = legend({name: (order.get(name, NEUTRAL), 0) for name in others})
    div = tag("div", *figures, class_="charts")
    return section("health", "Health of the unconditional", tag("p", text), tag("ul", *sentences), keys, div, pictures)


def over_scale(record: Record) -> Html | None:
    """Every metric over the scale, with bands."""
    rows = in_order(record)
    k = across(rows)
    values = sorted({row["scales"][k] for row in rows})
    if len(values) < 2:
        return None
    figures = []
    for key in present(rows):

        def point(row: Record, prior: str, key: str = key) -> Point | None:
            if (y := reading(row["metrics"], key)) is None:
                return None
            note = f"{candidate_text(row['prior'], row['scales'])}: {metric(key).head} {measured(*y)}"
            return Point(row["scales"][k], y[0], 0, y[1], "", note, is_winner(record, row), row["prior"] != prior)

        chart = curves(
            list(_lines(record, rows, point).values()),
            name=f"{metric(key).name} over the guidance scale, a line per prior",
            x_label="scale γ" if len(rows[0]["scales"]) == 1 else f"scale γ{chr(0x2081 + k)}",
            y_label=_axis(key),
            level=_level(record, key),
            x_ticks=[(value, f"{value:g}") for value in values],
            band=BAND,
        )
        figures.append(tag("figure", chart))
    bands = tag("p", "The bands are 95 % intervals.")
    return section("scale", "Over the scale", bands, _keys(record), tag("div", *figures, class_="charts"))


def over_training(record: Record) -> Html | None:
    """Every metric over training, with bands."""
    history = record.get("history", [])
    if len(history) < 2:
        return None
    flat = [(entry["step"], row) for entry in history for row in entry["rows"]]
    order = styles(record)
    arms = sorted({(order[row["prior"]], row["prior"], tuple(row["scales"])) for _, row in flat})
    dashes = {arm: i for _, group in groupby(arms, key=lambda arm: arm[1]) for i, arm in enumerate(group)}
    figures = []
    for key in present(row for _, row in flat):
        lines = []
        for arm in arms:
            points = []
            for step, row in flat:
                y = reading(row["metrics"], key)
                if y and (row["prior"], tuple(row["scales"])) == arm[1:]:
                    note = f"{candidate_text(*arm[1:])}, step {step}: {metric(key).head} {measured(*y)}"
                    points.append(Point(step, y[0], 0, y[1], "", note))
            lines.append(Line(arm[0], tuple(points), dashes[arm]))
        chart = curves(lines, name=f"{metric(key).name} over training, a line per candidate", x_label="training step",
                       y_label=_axis(key), level=_level(record, key), band=BAND)  # fmt: skip
        figures.append(tag("figure", chart))
    text = (
        "Comparisons made while training, with 95 % bands; distances lie higher where they used fewer conditions than "
        "the table."
    )
    names = {candidate_text(*arm[1:]): (arm[0], dashes[arm]) for arm in arms}
    return section("training", "Over training", tag("p", text), legend(names), tag("div", *figures, class_="charts"))


def _axis(key: str) -> str:
    known = metric(key)
    return f"{known.label} ({known.better} is better)" if known.better else known.label


def _level(record: Record, key: str) -> tuple[str, float] | None:
    real = reading(record.get("floor") or {}, key)
    return ("unseen real pictures", real[0]) if real else None


def _lines(record: Record, rows: Sequence[Record], point: Any = None) -> dict[str, Line]:
    """A named line per prior (and per further scales, dashed) from `point(row, prior)`.

    All pass through the rows of "none", where no prior has a part; that line alone marks them.
    """
    k = across(rows)
    rows = sorted(rows, key=lambda row: row["scales"][k])
    others = sorted({_without(row["scales"], k) for row in rows})
    lines = {}
    for prior, style in styles(record).items():
        for dash, rest in enumerate(others):
            own = [
                row for row in rows if row["prior"] in (prior, unguided(prior)) and _without(row["scales"], k) == rest
            ]
            if any(row["prior"] == prior for row in own):
                points = [made for row in own if point and (made := point(row, prior)) is not None]
                name = f"{prior} (scale 1)" if is_free(prior) else prior
                name += f", other scale {scale_text(rest)}" if len(others) > 1 else ""
                lines[name] = Line(style, tuple(points), dash)
    return lines


def _without(scales: Sequence[float], k: int) -> tuple[float, ...]:
    return (*scales[:k], *scales[k + 1 :])


def _keys(record: Record) -> Html:
    return legend({name: (line.style, line.dash) for name, line in _lines(record, in_order(record)).items()})
