"""The team's part in a decision: blind votes between pictures, and overriding the verdict with a reason."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path as File
from typing import Any

from scipy.special import betaincinv

from ..sample.checkpoints import unguided
from .figures import section
from .page import Html, join, tag
from .quantities import candidate_text, scale_text
from .tables import Record, scrolling

FORMAT = "priorguide votes 1"
LEVEL = 0.95


def fingerprint(record: Record) -> str:
    """What tells this comparison from others: a hash of all that it measured."""
    return hashlib.sha256(json.dumps(record.get("rows", []), sort_keys=True).encode()).hexdigest()[:16]


def candidates(record: Record) -> list[str]:
    """The candidates that are voted on, each prior at its chosen scale, as the page names them."""
    return [candidate_text(*arm) for arm in ((record.get("verdict") or {}).get("chosen") or {}).items()]


def with_votes(record: Record, path: str | File) -> dict[str, Any]:
    """The record with the votes of a file that the page exported; votes saved earlier from the same ballot give way.

    ValueError where the file is no such thing, or belongs to another comparison.
    """
    ballot = read_ballot(path, record)
    ballots = {**(record.get("votes") or {}).get("ballots", {}), ballot["ballot"]: ballot["votes"]}
    cast = [vote for votes in ballots.values() for vote in votes]
    return {**record, "votes": {"ballots": ballots, "pairs": tally(cast, candidates(record))}}


def read_ballot(path: str | File, record: Record) -> dict[str, Any]:
    """A file of votes, checked against the record. ValueError says what is wrong with it."""
    try:
        ballot = json.loads(File(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a file of votes that the comparison's page saved: {error}") from None
    if not isinstance(ballot, Mapping) or ballot.get("format") != FORMAT:
        raise ValueError(f"{path} must be a file of votes that the comparison's page saved ({FORMAT!r})")
    if ballot.get("comparison") != fingerprint(record):
        raise ValueError(f"{path} holds votes on another comparison; vote on this one's own page")
    names, votes = candidates(record), ballot.get("votes")
    if not isinstance(ballot.get("ballot"), str) or not isinstance(votes, list) or not votes:
        raise ValueError(f"{path} must name its ballot and hold votes; save them again from the page")
    seen = set()
    for vote in votes:
        fair = isinstance(vote, Mapping) and vote.get("choice") in ("left", "right", "same")
        if not fair or vote.get("left") not in names or vote.get("right") not in names or vote["left"] == vote["right"]:
            raise ValueError(f"{path} holds a vote that is none between two of {names}: {vote}")
        what = (vote.get("condition"), frozenset((vote["left"], vote["right"])))
        if what in seen:
            raise ValueError(f"{path} votes twice on condition {what[0]} between {vote['left']} and {vote['right']}")
        seen.add(what)
    return dict(ballot)


def tally(votes: Sequence[Record], names: Sequence[str]) -> list[dict[str, Any]]:
    """Per pair of names that was voted on: "pair", "wins" of each, "same" (no preference), and the 95 % "interval" of
    the first one's share of the preferences."""
    pairs = []
    for a, b in combinations(names, 2):
        on = [vote for vote in votes if {vote["left"], vote["right"]} == {a, b}]
        won = [vote[vote["choice"]] for vote in on if vote["choice"] != "same"]
        if on:
            wins = [won.count(a), won.count(b)]
            interval = list(share_interval(wins[0], len(won)))
            pairs.append({"pair": [a, b], "wins": wins, "same": len(on) - len(won), "interval": interval})
    return pairs


def share_interval(wins: int, count: int, level: float = LEVEL) -> tuple[float, float]:
    """The binomial interval of a share (Clopper & Pearson 1934, exact, so wide rather than narrow); (0, 1) of none."""
    tail = (1 - level) / 2
    low = float(betaincinv(wins, count - wins + 1, tail)) if wins else 0.0
    high = float(betaincinv(wins + 1, count - wins, 1 - tail)) if wins < count else 1.0
    return low, high


def with_override(record: Record, prior: str, scales: Sequence[float], reason: str) -> dict[str, Any]:
    """The record with the team's choice and reason beside the verdict, which stays.

    ValueError without a reason, or where that candidate was not compared at those scales.
    """
    arms = [(row["prior"], list(row["scales"])) for row in record.get("rows", [])]
    if not reason.strip():
        raise ValueError('an override needs its reason: --reason "..."')
    known = {name for name, _ in arms} | set((record.get("verdict") or {}).get("chosen") or {})
    shared = prior in known and (unguided(prior), list(scales)) in arms  # at scale 1 no prior has a part
    if (prior, list(scales)) not in arms and not shared:
        told = "; ".join(candidate_text(*arm) for arm in arms)
        raise ValueError(
            f"an override must name what was compared ({told}), got {candidate_text(prior, scales)}; "
            "`priorguide compare --scales` measures other scales"
        )
    when = datetime.now(UTC).strftime("%Y-%m-%d")
    return {**record, "override": {"prior": prior, "scales": list(scales), "reason": reason.strip(), "date": when}}


def decided(record: Record) -> dict[str, Any]:
    """What the record says to deploy, as a verdict has it ("prior", "scales", "chosen"): the team's override first."""
    verdict, override = record.get("verdict") or {}, record.get("override")
    if not override:
        return dict(verdict)
    prior, scales = override["prior"], override["scales"]
    return {**verdict, "prior": prior, "scales": scales, "chosen": {**verdict.get("chosen", {}), prior: scales}}


def told(record: Record) -> list[str]:
    """The votes and the override in plain sentences."""
    lines = []
    for entry in (record.get("votes") or {}).get("pairs", []):
        (a, b), (first, second), (low, high) = entry["pair"], entry["wins"], entry["interval"]
        share = f", 95 % interval of the share {low:.0%} to {high:.0%}" if first + second else ""
        lines.append(f"{a} against {b}: {first} to {second}, no preference in {entry['same']}{share}.")
    if override := record.get("override"):
        what = candidate_text(override["prior"], override["scales"])
        lines.append(f"Overridden: deploy {what}. Reason: {override['reason']}")
    return lines


def team(record: Record) -> Html | None:
    """The section on the team's override and votes; none where there are neither."""
    override, votes = record.get("override"), record.get("votes")
    parts = []
    if override:
        what = f"Overridden: the team deploys {override['prior']} at scale {scale_text(override['scales'])}"
        parts = [tag("p", tag("b", what), f" ({override['date']}). Its reason: “{override['reason']}”")]
    if votes:
        lines = [_line(entry) for entry in votes["pairs"]]
        heads = ("Pair", "Preferred", "No preference", "Share of the first", "95 % interval")
        columns = (tag("th", head, scope="col", class_="words" if i < 2 else None) for i, head in enumerate(heads))
        table = tag("table", tag("thead", tag("tr", *columns)), tag("tbody", *lines), class_="numbers")
        count = len(votes["ballots"])
        caption = (
            f"Blind votes of {count} ballot{'s' if count > 1 else ''}. The interval takes votes as independent; those "
            "of several people on the same pictures are not quite."
        )
        parts.append(scrolling(table, caption))
    return section("team", "What the team says", *parts)


def _line(entry: Record) -> Html:
    (a, b), (first, second) = entry["pair"], entry["wins"]
    low, high = (round(100 * end) for end in entry["interval"])
    cells = [f"{first} : {second}", str(entry["same"])]
    cells += [f"{100 * first / (first + second):.0f} %", f"{low} to {high} %"] if first + second else ["–", "–"]
    if low > 50 or high < 50:
        cells[0] += f", {a if low > 50 else b}"
    head = tag("th", join(a, " against ", b), scope="row")
    return tag("tr", head, *(tag("td", text, class_=None if i else "words") for i, text in enumerate(cells)))


def booth(record: Record) -> Html | None:
    """The section to vote in, which its script brings to life with the pictures of the page; none with one candidate.

    Candidates are unnamed, the order of trials and the sides are shuffled from a seed that the saved file tells.
    """
    names = candidates(record)
    if len(names) < 2:
        return None
    answers = (("left", "← Left"), ("same", "↓ No preference"), ("right", "Right →"))
    ballot = tag(
        "div",
        tag("p", class_="progress", role="status"),
        tag("figure", tag("img", alt="what was asked for", hidden=""), tag("figcaption"), class_="asked"),
        tag("div", *(tag("img", alt=f"the {side} picture", class_=side) for side in ("left", "right")), class_="two"),
        tag(
            "p",
            *(tag("button", text, type="button", data_choice=choice) for choice, text in answers),
            class_="answers",
        ),
        tag("p", tag("button", "Undo", type="button", class_="undo")),
        class_="ballot",
        tabindex=0,
        role="group",
        aria_label="Left arrow, right arrow or down arrow to vote, backspace to undo",
        hidden="",
    )
    return tag(
        "section",
        tag("h2", "Vote blind", id="vote"),
        tag(
            "p",
            "Two candidates' pictures for the same condition and noise, unnamed and in random order: which answers the "
            "condition better? Vote before looking at the named pictures below. They are the same ones, so about half "
            "were picked because the candidates differ on them.",
        ),
        tag("button", "Start", type="button", class_="start"),
        ballot,
        tag("p", tag("a", "Save the votes", class_="save", hidden="")),
        tag(
            "p",
            "Add saved files to the record: ",
            tag("code", "priorguide compare RUN --votes FILE"),
            class_="soft small",
        ),
        class_="booth",
        aria_labelledby="vote",
        hidden="",
        data_names=json.dumps(names),
        data_comparison=fingerprint(record),
        data_format=FORMAT,
    )
