"""The comparison as one self-contained page."""

from collections.abc import Mapping, Sequence
from itertools import groupby, product
from pathlib import Path
from typing import Any

from .charts import Line, Point, curves, legend
from .gallery import gallery
from .page import Html, document, join, tag
from .quantities import (
    AGREEMENTS,
    DISTANCES,
    candidate_text,
    duration,
    measured,
    metric,
    plain,
    present,
    reading,
    scale_text,
)
from .records import write_whole
from .tables import Record, chosen, comparisons, in_order, is_winner, numbers, styles


def write_report(path: str | Path, record: Record, pictures: Mapping[str, Any] | None = None) -> Path:
    """Writes the page to `path` (a folder, for its index.html, or the .html file itself) and returns the file.

    record: JSON-able: title, description, rows, verdict, history, floor, sampling, environment, how_to_sample;
    whatever is missing is left out of the page, all text is escaped.
    pictures: "condition", "target" (N, 1 or 3, H, W) or None, "candidates" {name: the same}, all in [0, 1], and
    "caption", N texts. The page appears whole or not at all. ValueError for pictures of other shapes.
    """
    path = Path(path)
    path = path if path.suffix == ".html" else path / "index.html"
    write_whole(path, render(record, pictures or {}))
    return path


def render(record: Record, pictures: Mapping[str, Any]) -> Html:
    """The page as text."""
    title = record.get("title") or "Which prior to deploy"
    return document(
        title,
        tag(
            "main",
            tag("h1", title),
            tag("p", record["description"], class_="soft") if record.get("description") else None,
            _verdict(record),
            _tradeoff(record),
            _table(record),
            _section("pictures", "Side by side", *gallery(pictures)),
            _over_scale(record),
            _over_training(record),
            _how_to_sample(record),
            _how_measured(record),
        ),
    )


def _section(anchor: str, title: str, *parts: Any) -> Html | None:
    """A section with its heading; none where it has nothing to say."""
    return tag("section", tag("h2", title, id=anchor), *parts, aria_labelledby=anchor) if any(parts) else None


def _verdict(record: Record) -> Html | None:
    verdict = record.get("verdict")
    if not verdict:
        return None
    clear = bool(verdict.get("confident"))
    badge = tag("span", "clear result" if clear else "no clear winner", class_="badge clear" if clear else "badge")
    headline = f"Deploy {verdict['prior']} at scale {scale_text(verdict['scales'])}"
    sentence = verdict.get("sentence", "").removeprefix(f"{headline}: ")
    best, caption = chosen(record), "Every prior at the scale chosen for it, over all conditions"
    dual = len(verdict["scales"]) > 1
    formula = "p₀ + Σₖ γₖ (pₖ − pₖ₋₁)" if dual else "uncond + γ (cond − uncond)"
    ends = f". The prior supplies {'p₀; where the first scale is 1' if dual else 'uncond; at γ = 1'} it has no part."
    return tag(
        "section",
        tag("h2", headline, " ", badge, id="verdict"),
        tag("p", sentence[:1].upper() + sentence[1:]) if sentence else None,
        numbers(record, best, caption, whole=False) if len(best) > 1 else None,
        tag("p", "The scale is γ in ", tag("span", formula, class_="formula"), ends, class_="soft small"),
        class_="verdict clear" if clear else "verdict",
        aria_labelledby="verdict",
    )


def _axis(key: str) -> str:
    known = metric(key)
    return f"{known.label} ({known.better} is better)" if known.better else known.label


def _level(record: Record, key: str) -> tuple[str, float] | None:
    real = reading(record.get("floor") or {}, key)
    return ("unseen real pictures", real[0]) if real else None


def _across(rows: Sequence[Record]) -> int:
    """Which of the scales the curves run along: the lowest that varies, since priors concern the lowest."""
    grid = {tuple(row["scales"]) for row in rows}
    return next((k for k in range(len(min(grid, default=()))) if len({scales[k] for scales in grid}) > 1), 0)


def _lines(record: Record, rows: Sequence[Record], point: Any = None) -> dict[str, Line]:
    """A named line per prior (and per further scales, dashed) from `point(row, prior)`.

    All pass through the rows of "none", where no prior has a part; that line alone marks them.
    """
    k = _across(rows)
    rows = sorted(rows, key=lambda row: row["scales"][k])
    others = sorted({_without(row["scales"], k) for row in rows})
    lines = {}
    for prior, style in styles(record).items():
        for dash, rest in enumerate(others):
            own = [row for row in rows if row["prior"] in (prior, "none") and _without(row["scales"], k) == rest]
            if any(row["prior"] == prior for row in own):
                points = [made for row in own if point and (made := point(row, prior)) is not None]
                name = "none (scale 1)" if prior == "none" else prior
                name += f", other scale {scale_text(rest)}" if len(others) > 1 else ""
                lines[name] = Line(style, tuple(points), dash)
    return lines


def _without(scales: Sequence[float], k: int) -> tuple[float, ...]:
    return (*scales[:k], *scales[k + 1 :])


def _keys(record: Record) -> Html:
    return legend({name: (line.style, line.dash) for name, line in _lines(record, in_order(record)).items()})


def _tradeoff(record: Record) -> Html | None:
    rows = in_order(record)
    found, decide_by = present(rows), (record.get("verdict") or {}).get("decide_by")
    y_keys = [key for key in dict.fromkeys((decide_by, *DISTANCES)) if key in DISTANCES and key in found]
    x_keys = [key for key in found if key in AGREEMENTS][:2]
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
    ring = " The ring marks the pair to deploy." if record.get("verdict") else ""
    text = (
        "A stronger scale follows the condition more closely, and in the end strays from real pictures: priors compare "
        f"fairly along the whole curve, not at one scale. A point is a scale, its bars are one standard error.{ring}"
    )
    div = tag("div", *figures, class_="charts large")
    return _section("tradeoff", "Distance against agreement with the condition", tag("p", text), _keys(record), div)


def _table(record: Record) -> Html | None:
    rows, caption = in_order(record), "Value ± standard error; ↓ lower is better, ↑ higher is better, the best in bold."
    if not rows:
        return None
    if any(row["prior"] == "none" for row in rows):
        caption += " “none” is the conditional prediction alone."
    decision = comparisons(record)
    if decision:
        text = (
            "Scales are chosen on one half of the conditions and judged on the other. Another prior is named only if "
            "it beats the baseline by more than the uncertainty and every guard holds."
        )
        decision = join(tag("h3", "How it was decided"), tag("p", text), decision)
    return _section("table", "Every prior and scale", numbers(record, rows, caption), decision)


def _over_scale(record: Record) -> Html | None:
    rows = in_order(record)
    k = _across(rows)
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
        )
        figures.append(tag("figure", chart))
    return _section("scale", "Over the scale", _keys(record), tag("div", *figures, class_="charts"))


def _over_training(record: Record) -> Html | None:
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
                       y_label=_axis(key), level=_level(record, key))  # fmt: skip
        figures.append(tag("figure", chart))
    text = "Comparisons made while training; distances lie higher where they used fewer conditions than the table."
    names = {candidate_text(*arm[1:]): (arm[0], dashes[arm]) for arm in arms}
    return _section("training", "Over training", tag("p", text), legend(names), tag("div", *figures, class_="charts"))


def _how_to_sample(record: Record) -> Html | None:
    ways = record.get("how_to_sample", [])
    blocks = (join(tag("h3", way["title"]), tag("pre", tag("code", way["code"]), tabindex=0)) for way in ways)
    return _section("sample", "How to sample", *blocks)


def _how_measured(record: Record) -> Html | None:
    facts = {key.replace("_", " "): plain(value) for key, value in (record.get("sampling") or {}).items()}
    if (conditions := (record.get("verdict") or {}).get("conditions")) is not None:
        facts.setdefault("conditions", plain(conditions))
    if record.get("seconds_total") is not None:
        facts["time in all"] = duration(record["seconds_total"])
    if record.get("bundle"):
        facts["bundle"] = record["bundle"]
    machine = {key.replace("_", " "): plain(value) for key, value in (record.get("environment") or {}).items()}
    lists = [
        join(
            tag("h3", title),
            tag("dl", *(part for key, text in pairs.items() for part in (tag("dt", key), tag("dd", text)))),
        )
        for title, pairs in (("Sampling", facts), ("Environment", machine))
        if pairs
    ]
    return _section("measured", "How it was measured", *lists)
