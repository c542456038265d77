"""`priorguide compare RUN --cheaper`, on the command line."""

import json
import shutil

import pytest

from priorguide.sample.bundle import Bundle
from priorguide.train.cli import main


@pytest.fixture
def compared(run, tmp_path, monkeypatch):
    """A copy of the run's comparison, decided for base at scale 2."""
    monkeypatch.setattr("priorguide.train.export.verify_apart", lambda folder: "not verified apart")
    folder = tmp_path / "comparison"
    shutil.copytree(run / "comparison", folder)
    decide = ["compare", str(run), "--out", str(folder), "--override", "base:2", "--reason", "to have a prior"]
    assert main(decide) == 0
    return folder


def test_a_cheaper_setting_is_found_shown_and_exported(run, compared, tmp_path, capsys):
    before = json.loads((compared / "record.json").read_text())
    search = ["compare", str(run), "--out", str(compared), "--cheaper", "--margin"]
    assert main([*search, "0"]) == 0
    record = json.loads((compared / "record.json").read_text())
    found = record.pop("cheaper")
    assert record == before
    assert (found["prior"], found["scales"], found["evaluations"]) == ("base", [2.0], 4)
    (one,) = found["settings"]
    assert (one["name"], one["evaluations"]) == ("refreshed every 2 steps", 3)
    assert {row["prior"]: row["evaluations"] for row in found["rows"]} == {"as it is": 4, one["name"]: 3}
    assert found["sentence"] in capsys.readouterr().out
    page = (compared / "index.html").read_text()
    assert page.count("The same at fewer evaluations") == 1 and found["sentence"].replace("'", "&#x27;") in page
    # What the search chose is what export deploys, and nothing else.
    for chosen, refresh in ((one["name"], 2), ("as it is", 1)):
        (compared / "record.json").write_text(json.dumps({**record, "cheaper": {**found, "chosen": chosen}}))
        bundle = tmp_path / f"bundle-{refresh}"
        assert main(["export", str(run), "--comparison", str(compared), "--out", str(bundle)]) == 0
        guidance = Bundle.load(bundle).guidance
        assert (guidance.scales, guidance.refresh, guidance.interval) == ((2.0,), refresh, None)
        assert Bundle.load(bundle).replay().identical
    by_hand = tmp_path / "by-hand"
    (compared / "record.json").write_text(json.dumps({**record, "cheaper": {**found, "chosen": one["name"]}}))
    named = ["--prior", "base", "--scale", "2", "--out", str(by_hand)]
    assert main(["export", str(run), "--comparison", str(compared), *named]) == 0
    assert Bundle.load(by_hand).guidance.refresh == 1


def test_the_margin_decides(run, compared):
    search = ["compare", str(run), "--out", str(compared), "--cheaper", "--margin"]
    assert main([*search, "1e9"]) == 0
    found = json.loads((compared / "record.json").read_text())["cheaper"]
    (one,) = found["settings"]
    assert one["no_worse"] == all(guard["holds"] for guard in one["guards"].values())
    assert found["chosen"] == (one["name"] if one["no_worse"] else "as it is")


def test_what_cannot_be_made_cheaper(run, compared, capsys):
    out = ["compare", str(run), "--out", str(compared)]
    assert main([*out, "--margin", "0.1"]) == 2 and "--margin goes with --cheaper" in capsys.readouterr().err
    assert main([*out, "--cheaper", "--margin", "-1"]) == 2
    assert main([*out, "--override", "self:1", "--reason", "no prior"]) == 0
    capsys.readouterr()
    assert main([*out, "--cheaper"]) == 1
    assert "nothing to make cheaper" in capsys.readouterr().err
    (compared / "record.json").unlink()
    assert main([*out, "--cheaper"]) == 1
    assert "record.json" in capsys.readouterr().err
