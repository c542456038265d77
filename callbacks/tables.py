"""The measured rows as tables: on the page and in the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from ..sample.checkpoints import unguided
from .charts import COLOURS, interval, marker
from .page import Html, join, tag
from .quantities import (
    candidate_text,
    duration,
    measured,
    memory,
    metric,
    number,
    plain,
    present,
    reading,
    scale_text,
)

Record = Mapping[str, Any]
NEUTRAL = 5
"""The style of "none", the conditional prediction alone, in which no prior has a part."""
COSTS = {
    "seconds_per_image": ("Time per image", duration),
    "evaluations": ("Evaluations", plain),
    "extra_bytes": ("Extra memory", memory),
    "peak_bytes": ("Peak memory", memory),
}


def styles(record: Record) -> dict[str, int]:
    """Each prior's colour and marker, the same all over the page: the baseline's comes first, "none" is neutral."""
    rows = [*record.get("rows", []), *(row for entry in record.get("history", []) for row in entry["rows"])]
    names = sorted(
        dict.fromkeys(row["prior"] for row in rows), key=lambda name: (is_free(name), name != baseline(record))
    )
    return {name: NEUTRAL if is_free(name) else i + (i >= NEUTRAL) for i, name in enumerate(names)}


def is_free(name: str) -> bool:
    """Whether a row of that name has no prior: "none", or "none@400"."""
    return name == unguided(name)


def baseline(record: Record) -> str:
    """The prior that the others have to beat."""
    return ((record.get("verdict") or {}).get("rule") or {}).get("baseline", "self")


def in_order(record: Record, rows: Sequence[Record] | None = None) -> list[Record]:
    """The rows by prior, then by scale."""
    order = styles(record)
    rows = record.get("rows", []) if rows is None else rows
    return sorted(rows, key=lambda row: (not is_free(row["prior"]), order[row["prior"]], tuple(row["scales"])))


def is_arm(row: Record, prior: str | None, scales: Sequence[float] | None) -> bool:
    """Whether the row is that prior at those scales; at a lowest scale of 1 every prior shares the row of "none"."""
    return row["prior"] in (prior, unguided(prior or "")) and list(row["scales"]) == list(scales or ())


def is_winner(record: Record, row: Record) -> bool:
    verdict = record.get("verdict") or {}
    return is_arm(row, verdict.get("prior"), verdict.get("scales"))


def chosen(record: Record) -> list[Record]:
    """The row of every prior at the scale that was chosen for it."""
    picks = (record.get("verdict") or {}).get("chosen", {})
    return [row for row in in_order(record) if any(is_arm(row, prior, scales) for prior, scales in picks.items())]


def arm_name(record: Record, prior: str, scales: Sequence[float], *rest: Any) -> Html:
    """The prior's marker in its colour, its name, and its scale where one is given."""
    style = styles(record).get(prior, NEUTRAL)
    key = tag("svg", marker(style, 8, 8), viewBox="0 0 16 16", width=14, height=14, aria_hidden="true")
    return join(
        tag("span", key, class_=f"p{style % COLOURS}"),
        " ",
        prior,
        f", γ\u00a0{scale_text(scales)}".replace(" ", "\u00a0").replace(",\u00a0γ", ", γ") if scales else None,
        *rest,
    )


def scrolling(table: Html, caption: str) -> Html:
    """A table under its caption; it scrolls by itself where it is wider than the page, by keyboard too."""
    held = tag("div", table, class_="wide", role="region", aria_label=caption, tabindex=0)
    return tag("figure", tag("figcaption", caption), held)


def numbers(record: Record, rows: Sequence[Record], caption: str, whole: bool = True) -> Html:
    """The rows as a table with the best value of each column in bold. `whole`: with costs (time and evaluations per
    picture, memory of the prior and of a batch) and with real pictures."""
    keys, floor = present(rows), record.get("floor") or {}
    costs = [name for name in COSTS if whole and any(row.get(name) is not None for row in rows)]
    best = {key: value for key in keys if (value := _best(rows, key)) is not None}

    def cell(metrics: Record, key: str) -> Html:
        found = reading(metrics, key)
        if found is None:
            return tag("td", "–")
        value = tag("b", number(*found)) if number(*found) == best.get(key) else number(*found)
        return tag("td", value, tag("small", f" ± {number(found[1], found[1])}") if found[1] else None)

    def real(key: str) -> Html:  # to the digits of the rows above
        found = reading(floor, key)
        if found is None or found[1]:
            return cell(floor, key)
        errors = [value[1] for row in rows if (value := reading(row["metrics"], key)) and value[1]]
        return tag("td", number(found[0], min(errors, default=0.0)))

    def cost(row: Record, name: str) -> Html:
        return tag("td", "–" if row.get(name) is None else COSTS[name][1](row[name]))

    bodies: dict[str, list[Html]] = {}
    for row in rows:
        badge = join(" ", tag("span", "verdict", class_="badge clear")) if is_winner(record, row) else None
        head = tag("th", arm_name(record, row["prior"], row["scales"], badge), scope="row")
        cells = [cell(row["metrics"], key) for key in keys] + [cost(row, name) for name in costs]
        bodies.setdefault(row["prior"] if whole else "", []).append(
            tag("tr", head, *cells, class_="chosen" if badge else None)
        )
    if whole and any(reading(floor, key) for key in keys):
        cells = [real(key) for key in keys] + [tag("td", "–") for _ in costs]
        bodies["real"] = [
            tag("tr", tag("th", "unseen real pictures", scope="row", class_="free"), *cells, class_="soft")
        ]
    arrows = {"lower": "\u00a0↓", "higher": "\u00a0↑"}
    heads = [metric(key).head + arrows.get(metric(key).better, "") for key in keys] + [COSTS[name][0] for name in costs]
    return scrolling(
        tag(
            "table",
            tag("thead", tag("tr", *(tag("th", head, scope="col") for head in ("Prior and scale", *heads)))),
            *(tag("tbody", *lines) for lines in bodies.values()),
            class_="numbers",
        ),
        caption,
    )


def _best(rows: Sequence[Record], key: str) -> str | None:
    """The best value as it is written, where the rows differ and it is known which way is better."""
    found = [value for row in rows if (value := reading(row["metrics"], key))]
    pick = {"lower": min, "higher": max}.get(metric(key).better)
    return number(*pick(found)) if pick and len({number(*value) for value in found}) > 1 else None


def comparisons(record: Record) -> Html | None:
    """The paired differences that the verdict rests on."""
    verdict = record.get("verdict") or {}
    entries = verdict.get("comparisons") or []
    if not entries:
        return None
    lines = []
    for entry in entries:
        known = metric(entry["metric"])
        extent = max(abs(end) for other in entries if other["metric"] == entry["metric"] for end in other["interval"])
        low, high = (end * known.factor for end in entry["interval"])
        value, digits = entry["difference"] * known.factor, (high - low) / 4
        picture = interval(low, value, high, extent * known.factor or 1.0, styles(record).get(entry["prior"], NEUTRAL))
        spread = tag("small", f" [{number(low, digits, True)}, {number(high, digits, True)}]")
        guards = "; ".join(guard_text(key, state) for key, state in (entry.get("guards") or {}).items())
        lines.append(
            tag(
                "tr",
                tag("th", arm_name(record, entry["prior"], entry["scales"]), scope="row"),
                tag("td", candidate_text(baseline(record), entry["baseline_scales"]), class_="words"),
                tag("td", picture),
                tag("td", number(value, digits, True), spread),
                tag("td", guards or "none", class_="words long"),
                tag("td", tag("b", str(entry.get("outcome", "–")).replace("_", " ")), class_="words"),
            )
        )
    rule, known = verdict.get("rule") or {}, metric(entries[0]["metric"])
    level = f" {100 * rule['level']:g} %" if rule.get("level") else ""
    caption = (
        f"{known.label}: candidate less baseline, paired over the same noise and conditions, with its{level} interval."
    )
    caption += f" {known.better.capitalize()} is better." if known.better else ""
    columns = ("Candidate", "Baseline", "Interval about zero", "Difference", "Guards", "Outcome")
    heads = [tag("th", text, scope="col", class_="words" if i in (1, 4, 5) else None) for i, text in enumerate(columns)]
    table = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *lines), class_="numbers")
    return scrolling(table, caption)


def guard_text(key: str, state: Any) -> str:
    """A guard in words: what changed, by how much it may be worse, whether it holds."""
    known = metric(key)
    if not isinstance(state, Mapping) or not {"difference", "interval", "holds"} <= state.keys():
        return f"{known.head}: {plain(state)}"
    low, high = (end * known.factor for end in state["interval"])
    digits = (high - low) / 4
    ends = ", ".join(number(end, digits, True) for end in (low, high))
    change = f"{known.head} {number(state['difference'] * known.factor, digits, True)} [{ends}]"
    allowed = f", may lose {plain(float(state['allowed'] * known.factor))}" if "allowed" in state else ""
    return f"{change}{allowed}: {'holds' if state['holds'] else 'broken'}"


def terminal_table(record: Record) -> Table:
    """The rows for a terminal of 100 columns, the pair to deploy marked with an arrow."""
    rows = in_order(record)
    decide_by = (record.get("verdict") or {}).get("decide_by")
    wanted = dict.fromkeys(("fd", decide_by, "psnr", "accuracy", "coverage", "consistency", "dynamic_degree"))
    keys = [key for key in present(rows) if key in wanted]
    table = Table(title=record.get("title"), box=box.SIMPLE_HEAD, padding=0, pad_edge=False, title_justify="left")
    table.add_column("", width=1, no_wrap=True)
    table.add_column("prior", overflow="fold", max_width=12)
    table.add_column("scale", justify="right", no_wrap=True)
    columns = []
    for key in keys:
        found = [reading(row["metrics"], key) for row in rows]
        power = 3 if max(abs(value[0]) for value in found if value) < 0.1 else 0  # small numbers take less room so
        columns.append([measured(*(10**power * part for part in value)) if value else "–" for value in found])
        head = "\n".join(metric(key).head.split()) + ("\n×10³" if power else "")
        table.add_column(head, justify="right", no_wrap=True)
    costs = {"seconds_per_image": "time per\nimage", "evaluations": "evalu-\nations", "peak_bytes": "peak\nmemory"}
    costs = {name: head for name, head in costs.items() if any(row.get(name) is not None for row in rows)}
    for head in costs.values():
        table.add_column(head, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        winner = is_winner(record, row)
        cells = [column[i] for column in columns]
        cells += ["–" if row.get(name) is None else COSTS[name][1](row[name]) for name in costs]
        last = i + 1 == len(rows) or rows[i + 1]["prior"] != row["prior"]
        line = ["▶" if winner else "", row["prior"], scale_text(row["scales"]), *cells]
        table.add_row(*map(Text, line), style="bold green" if winner else None, end_section=last)
    return table
