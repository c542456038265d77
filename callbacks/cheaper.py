"""The page's section on settings of fewer evaluations: quality against evaluations, and which was chosen."""

from typing import Any

from .charts import Line, Point, curves, interval, legend
from .figures import section
from .page import Html, join, tag
from .quantities import duration, metric, number, scale_text
from .tables import NEUTRAL, Record, guard_text, scrolling


def cheaper(record: Record) -> Html | None:
    """What `Cheaper` found, as a chart and a table; none where nothing was looked for."""
    found = record.get("cheaper")
    if not found or not found["settings"]:
        return None
    known, full = metric(found["metric"]), found["evaluations"]
    text = (
        f"{found['prior']} at scale {scale_text(found['scales'])} with fewer evaluations, from the same noise and "
        f"conditions ({found['conditions']:,}): {known.label} of each setting, less that with every prediction asked "
        "for, and its interval over all settings together. No worse is what rules out a loss of more than "
        f"{number(found['margin'] * known.factor)} and keeps every guard; of that the fewest evaluations are chosen."
    )
    return section(
        "cheaper",
        "The same at fewer evaluations",
        tag("p", tag("b", found["sentence"])),
        tag("p", text),
        _chart(found),
        _table(found, full),
    )


def _chart(found: Record) -> Html:
    """Differences with their intervals over evaluations, a line per guided part of the path."""
    known = metric(found["metric"])
    lines: dict[int, list[Point]] = {}
    for one in found["settings"]:
        low, value, high = (end * known.factor for end in (one["bounds"][0], one["difference"], one["bounds"][1]))
        note, every = f"{one['name']}: {number(value, (high - low) / 4, True)}", one["options"]["refresh"]
        label, ring = f"every {every}" if every > 1 else "", one["name"] == found["chosen"]
        point = Point(one["evaluations"], value, 0, (high - low) / 2, label, note, ring)
        lines.setdefault(one["options"]["guided"], []).append(point)
    side = {"lower": 1, "higher": -1}.get(known.better, 1)
    chart = curves(
        [Line(style, tuple(points)) for style, points in enumerate(lines.values())],
        name=f"Difference in {known.name} over evaluations; numbers in the table below",
        x_label="evaluations per image",
        y_label=f"{known.label}, difference ({known.better} is better)",
        level=("margin", side * found["margin"] * known.factor),
    )
    keys = legend({f"{count} guided steps": (style, 0) for style, count in enumerate(lines)})
    return join(keys, tag("div", tag("figure", chart), class_="charts large"))


def _table(found: Record, full: int) -> Html:
    known, settings = metric(found["metric"]), found["settings"]
    extent = max(abs(end) for one in settings for end in one["bounds"]) * known.factor or 1.0

    def line(one: Record) -> Html:
        low, high = (end * known.factor for end in one["bounds"])
        value, digits = one["difference"] * known.factor, (high - low) / 4
        chosen = one["name"] == found["chosen"]
        badge = join(" ", tag("span", "chosen", class_="badge clear")) if chosen else None
        cells: list[Any] = [
            tag("td", f"{one['evaluations']} of {full}"),
            tag("td", duration(one["seconds_per_image"])),
            tag("td", interval(low, value, high, extent, NEUTRAL)),
            tag(
                "td",
                number(value, digits, True),
                tag("small", f" [{number(low, digits, True)}, {number(high, digits, True)}]"),
            ),
            tag("td", "; ".join(guard_text(*guard) for guard in one["guards"].items()) or "none", class_="words long"),
            tag("td", "no worse" if one["no_worse"] else "not shown", class_="words"),
        ]
        return tag("tr", tag("th", one["name"], badge, scope="row"), *cells, class_="chosen" if chosen else None)

    columns = ("Setting", "Evaluations", "Time per image", "Interval about zero", "Difference", "Guards", "Outcome")
    heads = [tag("th", text, scope="col", class_="words" if i in (5, 6) else None) for i, text in enumerate(columns)]
    table = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *map(line, settings)), class_="numbers")
    whole = f"as it is: {full} evaluations, {duration(found['seconds_per_image'])} per image"
    return scrolling(table, f"{known.label}, the setting less {whole}.")
