import json
import shutil

from priorguide.sample.bundle import Bundle
from priorguide.train.cli import main


def test_export_deploys_the_teams_override(run, tmp_path, monkeypatch):
    monkeypatch.setattr("priorguide.train.export.verify_apart", lambda folder: "not verified apart")
    folder, bundle = tmp_path / "comparison", tmp_path / "bundle"
    shutil.copytree(run / "comparison", folder)
    verdict = json.loads((folder / "record.json").read_text())["verdict"]
    prior = "self" if (verdict["prior"], verdict["scales"]) == ("base", [2.0]) else "base"
    reason = ["--reason", "It looks better."]
    assert main(["compare", str(run), "--out", str(folder), "--override", f"{prior}:2", *reason]) == 0
    assert main(["export", str(run), "--comparison", str(folder), "--out", str(bundle)]) == 0
    guidance = Bundle.load(bundle).guidance
    assert guidance.scales == (2.0,) and (guidance.prior is None) == (prior == "self")
    record = json.loads((folder / "record.json").read_text())
    assert record["verdict"] == verdict and record["override"]["reason"] == "It looks better."
