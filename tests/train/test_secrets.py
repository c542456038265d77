"""Secrets planted where a team keeps them, and looked for in everything that a run leaves behind."""

from pathlib import Path

import pytest
import yaml
from runs import CONFIGS, small, write_idx

from priorguide.train.cli import main

PLANTED = {
    "WANDB_API_KEY": "feedbeef" * 5,
    "HF_TOKEN": "hf_" + "Planted" * 5,
    "DATABASE_PASSWORD": "correct-horse-battery",
}
IN_CONFIG = "of-somebody-else"


@pytest.fixture
def planted(monkeypatch):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def holders(folder: Path) -> list[str]:
    """The files below that hold a planted secret."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        found += [
            str(path.relative_to(folder)) for value in (*PLANTED.values(), IN_CONFIG) if value.encode() in content
        ]
    return found


def test_no_secret_is_left_by_fit_compare_and_export(planted, tmp_path, capfd):
    config = CONFIGS / "fashion_edges.yaml"
    run = tmp_path / "run"
    content = small(config, run, "fashion-base", write_idx(tmp_path / "idx"))
    content["trainer"]["logger"] = {
        "class_path": "lightning.pytorch.loggers.WandbLogger",
        "init_args": {"project": "p", "tags": [PLANTED["HF_TOKEN"]], "config": {"api_key": IN_CONFIG}},
    }
    (file := tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    assert main(["fit", "--config", str(file)]) == 0
    assert main(["compare", str(run), "--scales", "1,2", "--conditions", "8"]) == 0
    assert main(["export", str(run), "--prior", "base", "--scale", "2"]) == 0
    assert main(["push", str(run / "bundle"), "team/model", "--dry-run"]) == 0
    said = "".join(capfd.readouterr())
    assert [name for name, value in PLANTED.items() if value in said] == []
    assert (
        len(list(run.glob("wandb/offline-run-*/run-*.wandb"))) == 3 and (run / "bundle" / "priorguide.json").is_file()
    )
    assert holders(run) == []
