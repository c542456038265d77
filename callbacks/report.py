"""The comparison as one self-contained page."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .cheaper import cheaper
from .figures import at_matched_agreement, health, over_scale, over_training, section, too_far, tradeoff
from .gallery import gallery, without_condition
from .live import SCRIPT, STYLE
from .page import Html, document, join, tag
from .quantities import duration, plain, scale_text
from .records import write_whole
from .slider import by_scale, slider
from .tables import Record, baseline, chosen, comparisons, in_order, is_free, numbers
from .votes import booth, team

START, END = "<!-- decision -->", "<!-- end of decision -->"


def write_report(path: str | Path, record: Record, pictures: Mapping[str, Any] | None = None) -> Path:
    """Writes the page to `path` (a folder, for its index.html, or the .html file itself) and returns the file.

    record: JSON-able: title, description, rows, verdict, cheaper, needed, matched, health, saturation, votes, override,
    history, floor, sampling, environment, how_to_sample; whatever is missing is left out of the page, all text is
    escaped.
    pictures: "condition", "target" (N, 1 or 3, H, W) or None, "candidates" {name: the same}, all in [0, 1], and
    "caption", N texts; clips (N, 1 or 3, F, H, W) likewise, with "fps" (N,). "arms" {(prior, scales): the
    same} are shown by scale, "alone" {prior: the same} beside the health of the priors.
    The page appears whole or not at all.
    ValueError for pictures of other shapes.
    """
    path = Path(path)
    path = path if path.suffix == ".html" else path / "index.html"
    write_whole(path, render(record, pictures or {}))
    return path


def render(record: Record, pictures: Mapping[str, Any]) -> Html:
    """The page as text."""
    title = record.get("title") or "Which prior to deploy"
    shown, names = gallery(pictures), list(pictures.get("candidates") or {})
    return document(
        title,
        tag(
            "main",
            tag("h1", title),
            tag("p", record["description"], class_="soft") if record.get("description") else None,
            decision(record),
            tradeoff(record),
            at_matched_agreement(record),
            _best(record),
            _table(record),
            health(record, without_condition(pictures)),
            too_far(record),
            booth(record) if shown else None,
            section("pictures", "Side by side", slider(names), *shown, by_scale(pictures)),
            over_scale(record),
            over_training(record),
            _how_to_sample(record),
            _how_measured(record),
        ),
        style=STYLE,
        script=SCRIPT if len(names) > 1 else "",
    )


def decision(record: Record) -> Html:
    """The verdict, at fewer evaluations, and what the team says, between marks, so that `with_decision` finds them."""
    whole = _whole(record) if record.get("verdict") else None
    return join(Html(START), _verdict(record), cheaper(record), team(record), whole, Html(END))


def with_decision(page: str, record: Record) -> str:
    """The page's text with the record's verdict, votes and override in place of those it shows, all else as it was.

    ValueError where the page has no such place.
    """
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError("the page has no place for a decision; run `priorguide compare` again to make one that has")
    return before + decision(record) + after


def _verdict(record: Record) -> Html | None:
    verdict = record.get("verdict")
    if not verdict:
        return None
    clear = bool(verdict.get("confident"))
    badge = tag("span", "clear result" if clear else "no clear winner", class_="badge clear" if clear else "badge")
    what = f"{verdict['prior']} at scale {scale_text(verdict['scales'])}"
    headline = f"The verdict: {what}" if record.get("override") else f"Deploy {what}"
    sentence = verdict.get("sentence", "").removeprefix(f"Deploy {what}: ")
    dual = len(verdict["scales"]) > 1
    formula = "p₀ + Σₖ γₖ (pₖ − pₖ₋₁)" if dual else "uncond + γ (cond − uncond)"
    ends = f". The prior supplies {'p₀; where the first scale is 1' if dual else 'uncond; at γ = 1'} it has no part."
    more = [_settle(record, prior, count) for prior, count in (record.get("needed") or {}).items()]
    return tag(
        "section",
        tag("h2", headline, " ", badge, id="verdict"),
        tag("p", sentence[:1].upper() + sentence[1:]) if sentence else None,
        *(tag("p", text) for text in more),
        tag("p", "The scale is γ in ", tag("span", formula, class_="formula"), ends, class_="soft small"),
        class_="verdict clear" if clear else "verdict",
        aria_labelledby="verdict",
    )


def _settle(record: Record, prior: str, count: int | None) -> str:
    """How many more conditions it would take to know of a candidate that the verdict left open."""
    against, done = f"{prior} against {baseline(record)}", record["verdict"]["conditions"]
    if count is None:
        return f"What was observed does not speak for {against}: more conditions of the same would not settle it."
    # Two digits are more than the estimate has.
    about, more = (round(n, 1 - math.floor(math.log10(n))) for n in (count, max(count - done, 1)))
    return (
        f"If the difference is as observed, about {about:,} conditions would have an even chance to settle "
        f"{against}: {more:,} more than these {done:,}."
    )


def _best(record: Record) -> Html | None:
    best, caption = chosen(record), "Every prior at the scale chosen for it, over all conditions"
    return section("best", "Each at its own best scale", numbers(record, best, caption, whole=False) if best else None)


def _table(record: Record) -> Html | None:
    rows, caption = in_order(record), "Value ± standard error; ↓ lower is better, ↑ higher is better, the best in bold."
    if not rows:
        return None
    if any(is_free(row["prior"]) for row in rows):
        caption += " “none” is the conditional prediction alone."
    decision = comparisons(record)
    if decision:
        text = (
            "Each half of the conditions is judged at the scale that the other half chose. Another prior is named only "
            "if it beats the baseline by more than the uncertainty and every guard holds."
        )
        decision = join(tag("h3", "How it was decided"), tag("p", text), decision)
    return section("table", "Every prior and scale", numbers(record, rows, caption), decision)


def _how_to_sample(record: Record) -> Html | None:
    ways = record.get("how_to_sample", [])
    blocks = (join(tag("h3", way["title"]), tag("pre", tag("code", way["code"]), tabindex=0)) for way in ways)
    return section("sample", "How to sample", *blocks)


def _how_measured(record: Record) -> Html | None:
    facts = {key.replace("_", " "): plain(value) for key, value in (record.get("sampling") or {}).items()}
    if (conditions := (record.get("verdict") or {}).get("conditions")) is not None:
        facts.setdefault("conditions", plain(conditions))
    if record.get("seconds_total") is not None:
        facts["time in all"] = duration(record["seconds_total"])
    if record.get("bundle"):
        facts["bundle"] = record["bundle"]
    machine = {key.replace("_", " "): plain(value) for key, value in (record.get("environment") or {}).items()}
    machine |= {"commit": record["commit"]} if record.get("commit") else {}
    from_ = {entry["file"]: f"step {entry['step']}, {_short(entry)}" for entry in record.get("checkpoints") or ()}
    from_ |= {f"{part.removesuffix('_sha256').replace('_', ' ')} pictures": _short({"sha256": digest})
              for part, digest in (record.get("data") or {}).items()}  # fmt: skip
    lists = [
        join(
            tag("h3", title),
            tag("dl", *(part for key, text in pairs.items() for part in (tag("dt", key), tag("dd", text)))),
        )
        for title, pairs in (
            ("Sampling", facts),
            ("Candidates", _candidates(record)),
            ("Checkpoints and data", from_),
            ("Environment", machine),
        )
        if pairs
    ]
    return section("measured", "How it was measured", *lists)


def _short(entry: Record) -> str:
    return f"SHA-256 {entry['sha256'][:12]}…"


def _candidates(record: Record) -> dict[str, str]:
    """Each candidate's scales, and those of its options that are in use."""
    idle = ("candidate", "weights", "scales"), (("mix", 1.0), ("refresh", 1))
    found = {}
    for name, entry in (record.get("candidates") or {}).items():
        used = {k: v for k, v in entry.items() if v and k not in idle[0] and (k, v) not in idle[1]}
        scales = "; ".join(scale_text(scales) for scales in entry["scales"])
        found[name] = "; ".join(
            [f"scales {scales}", *(f"{key.replace('_', ' ')} {plain(v)}" for key, v in used.items())]
        )
    return found


def _whole(record: Record) -> Html:
    """The record itself, to keep."""
    address = f"data:application/json,{quote(json.dumps(record))}"
    link = tag("a", "Save the decision record", class_="save", download="record.json", href=address)
    return tag("p", link, class_="record small")
