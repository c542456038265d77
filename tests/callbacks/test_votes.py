import copy
import json

import pytest
from pages import Page, a_record, some_pictures
from scipy.stats import binomtest

from priorguide.callbacks.report import with_decision, write_report
from priorguide.callbacks.votes import (
    FORMAT,
    candidates,
    decided,
    fingerprint,
    share_interval,
    tally,
    told,
    with_override,
    with_votes,
)
from priorguide.train.cli import main, parse_override
from priorguide.train.errors import UsageError

SELF, BASE = candidates(a_record())


def votes(*choices: tuple[str, str], first: int = 0) -> list[dict]:
    """Votes by (the left one, the choice) on conditions from `first` on."""
    other = {SELF: BASE, BASE: SELF}
    return [
        {"condition": first + i, "left": left, "right": other[left], "choice": choice}
        for i, (left, choice) in enumerate(choices)
    ]


def saved(folder, cast: list[dict], name: str = "one", **changed) -> str:
    file = folder / f"{name}.json"
    ballot = {"format": FORMAT, "comparison": fingerprint(a_record()), "ballot": name, "seed": 1, "votes": cast}
    file.write_text(json.dumps(ballot | changed))
    return str(file)


def test_wins_are_counted_whatever_the_side():
    (pair,) = tally(votes((SELF, "left"), (BASE, "right"), (SELF, "right"), (BASE, "same")), [SELF, BASE])
    assert pair["pair"] == [SELF, BASE] and pair["wins"] == [2, 1] and pair["same"] == 1
    assert pair["interval"] == list(share_interval(2, 3))
    assert tally([], [SELF, BASE]) == []


@pytest.mark.parametrize(("wins", "count"), [(0, 5), (5, 5), (2, 3), (18, 24), (500, 1000)])
def test_the_interval_is_the_exact_binomial_one(wins, count):
    known = binomtest(wins, count).proportion_ci(0.95, method="exact")
    assert share_interval(wins, count) == pytest.approx((known.low, known.high))


def test_no_preferences_tell_nothing():
    assert share_interval(0, 0) == (0.0, 1.0)


def test_ballots_add_up_and_a_later_save_of_one_replaces_it(tmp_path):
    record = with_votes(a_record(), saved(tmp_path, votes((SELF, "left"))))
    record = with_votes(record, saved(tmp_path, votes((BASE, "left")), "two"))
    assert record["votes"]["pairs"][0]["wins"] == [1, 1]
    record = with_votes(record, saved(tmp_path, votes((SELF, "left"), (SELF, "left"))))
    assert record["votes"]["pairs"][0]["wins"] == [2, 1] and len(record["votes"]["ballots"]) == 2
    assert record["verdict"] == a_record()["verdict"]
    assert f"{SELF} against {BASE}: 2 to 1, no preference in 0" in told(record)[0]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"format": "x"}, "must be a file of votes"),
        ({"comparison": "0" * 16}, "another comparison"),
        ({"votes": []}, "hold votes"),
        ({"ballot": None}, "name its ballot"),
        ({"votes": votes((SELF, "up"))}, "none between two of"),
        ({"votes": [{"condition": 0, "left": SELF, "right": SELF, "choice": "left"}]}, "none between two of"),
        ({"votes": [{"condition": 0, "left": SELF, "right": "other", "choice": "left"}]}, "none between two of"),
        ({"votes": votes((SELF, "left")) + votes((BASE, "left"))}, "votes twice on condition 0"),
        ({"votes": ["left"]}, "none between two of"),
    ],
)
def test_a_file_that_is_no_vote_on_this_comparison_is_refused(tmp_path, changed, said):
    with pytest.raises(ValueError, match=said):
        with_votes(a_record(), saved(tmp_path, votes((SELF, "left")), **changed))


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (cut := tmp_path / "cut.json").write_text('{"format": "priorguide')
    for file in (cut, tmp_path / "missing.json"):
        with pytest.raises(ValueError, match="must be a file of votes that the comparison's page saved"):
            with_votes(a_record(), file)


def test_an_override_stands_beside_the_verdict_and_is_what_is_deployed():
    record = with_override(a_record(), "self", (3.0,), " Faces look better. ")
    assert record["override"].items() >= {"prior": "self", "scales": [3.0], "reason": "Faces look better."}.items()
    assert record["verdict"] == a_record()["verdict"]
    assert (decided(record)["prior"], decided(record)["chosen"]) == ("self", {"self": [3.0], "base": [3.0]})
    assert decided(a_record()) == a_record()["verdict"] and decided({}) == {}
    assert decided(with_override(a_record(), "base", [1.0], "cheap"))["scales"] == [1.0]  # the row of "none"


@pytest.mark.parametrize(
    ("prior", "scales", "reason", "said"),
    [
        ("self", (2.0,), "so", "must name what was compared"),
        ("other", (3.0,), "so", "must name what was compared"),
        ("other", (1.0,), "so", "must name what was compared"),
        ("self", (3.0,), "  ", "needs its reason"),
    ],
)
def test_an_override_without_grounds_is_refused(prior, scales, reason, said):
    with pytest.raises(ValueError, match=said):
        with_override(a_record(), prior, scales, reason)


def test_an_override_on_the_command_line():
    assert parse_override("base:3") == ("base", (3.0,)) and parse_override("sd15:1.5:7.5") == ("sd15", (1.5, 7.5))
    for text in ("base", "base:", ":3", "base:x", "base:1,2"):
        with pytest.raises(UsageError):
            parse_override(text)


@pytest.fixture
def run(tmp_path):
    """A run that was compared: as much of it as the team's decision needs."""
    folder = tmp_path / "run" / "comparison"
    write_report(folder, a_record(), some_pictures())
    (folder / "record.json").write_text(json.dumps(a_record()))
    return tmp_path / "run"


def test_the_command_adds_votes_and_an_override_to_record_and_page(run, tmp_path, capsys):
    page = run / "comparison" / "index.html"
    before = page.read_text()
    assert "What the team says" not in before
    ballots = [saved(tmp_path, votes(*[(SELF, "right")] * 9), "one"), saved(tmp_path, votes((SELF, "left")), "two")]
    assert main(["compare", str(run), "--votes", *ballots]) == 0
    assert main(["compare", str(run), "--override", "self:1.5", "--reason", "One network <is> enough."]) == 0
    record = json.loads((run / "comparison" / "record.json").read_text())
    assert record["votes"]["pairs"][0]["wins"] == [1, 9] and record["override"]["reason"] == "One network <is> enough."
    assert {key: record[key] for key in a_record()} == json.loads(json.dumps(a_record()))
    seen = Page(page.read_text())
    assert seen.sections[:2] == ["verdict", "team"]
    assert "The verdict: base at scale 3" in seen.text and "Deploy base" not in seen.text
    assert "Overridden: the team deploys self at scale 1.5" in seen.text and "One network <is> enough." in seen.text
    assert f"1 : 9, {BASE} 0 10 % 0 to 45 %" in seen.text
    rest = before.partition("<!-- end of decision -->")[2]
    assert page.read_text().endswith(rest), "all else on the page stays as it was"
    assert "1 to 9" in capsys.readouterr().out


def test_what_fails_leaves_record_and_page_as_they_were(run, tmp_path, capsys):
    files = [run / "comparison" / name for name in ("record.json", "index.html")]
    before = [file.read_bytes() for file in files]
    wrong = saved(tmp_path, votes((SELF, "left")), comparison="0" * 16)
    assert main(["compare", str(run), "--votes", wrong]) == 1
    assert main(["compare", str(run), "--override", "self:1.5"]) == 1
    assert main(["compare", str(run), "--reason", "so"]) == 2
    assert main(["compare", str(tmp_path), "--override", "self:1.5", "--reason", "so"]) == 1
    files[1].write_text("another page")
    assert main(["compare", str(run), "--override", "self:1.5", "--reason", "so"]) == 1
    assert files[0].read_bytes() == before[0] and files[1].read_text() == "another page"
    assert "no place for a decision" in capsys.readouterr().err


def test_deciding_again_replaces_what_was_decided():
    record = with_override(a_record(), "self", (3.0,), "first")
    page = with_decision("a<!-- decision -->x<!-- end of decision -->b", record)
    again = with_decision(page, with_override(copy.deepcopy(record), "self", (1.5,), "second"))
    assert again.startswith("a") and again.endswith("b") and "second" in again and "first" not in again
