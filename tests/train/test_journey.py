"""Every config of the project, and the documented model of one's own: train, compare, export, load again."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from runs import CONFIGS, small, write_idx

from priorguide.sample.bundle import Bundle
from priorguide.train.cli import main

PAGE = CONFIGS.parent / "docs" / "bring-your-own.md"


def write_folder(folder: Path) -> Path:
    """Class folders of small pictures."""
    from PIL import Image

    for number in range(80):
        (place := folder / f"class {number % 4}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 32), (number, 255 - number, 90)).save(place / f"{number:02d}.png")
    return folder


def with_data(content: dict, folder: Path) -> dict:
    """The config with generated data where it wants the user's own."""
    data = content["data"]["init_args"]
    source = data.get("source", "fashion")
    if source.startswith("idx:") or data.get("transform") in ("classes", "rotate"):  # one config with the shipped data
        data |= {"source": f"idx:{write_idx(folder / 'idx')}", "train_range": None, "max_train_samples": None}
    elif source != "fashion":
        data |= {"source": str(write_folder(folder / "pictures")), "train_range": None, "max_train_samples": None}
    return content


def journey(content: dict, folder: Path) -> None:
    """Fit, compare, export; the bundle, loaded again, gives the very pictures that were recorded."""
    run = Path(content["trainer"]["default_root_dir"])
    (file := folder / "config.yaml").write_text(yaml.safe_dump(content))
    assert main(["fit", "--config", str(file)]) == 0
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert stored["trainer"]["max_steps"] == 2
    held = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert held["global_step"] == 2
    if not any(callback["class_path"].endswith("PriorComparison") for callback in content["trainer"]["callbacks"]):
        assert main(["export", str(run), "--model-only"]) == 0
        bundle = Bundle.load(run / "model")
        average = {name: tensor for name, tensor in held["state_dict"].items() if name.startswith("average.")}
        stored = bundle.model.network.state_dict()
        assert all(torch.equal(stored[name.removeprefix("average.")], tensor) for name, tensor in average.items())
        return
    assert len((run / "compare" / "metrics.jsonl").read_text().splitlines()) == 1
    assert (run / "compare" / "panel-00000002.png").is_file()
    assert main(["compare", str(run), "--scales", "1,2"]) == 0
    record = json.loads((run / "comparison" / "record.json").read_text())
    assert {(row["prior"], *row["scales"]) for row in record["rows"]} >= {("none", 1.0), ("self", 2.0)}
    assert record["history"][0]["step"] == record["step"] == 2 and record["verdict"]["sentence"]
    assert (run / "comparison" / "index.html").stat().st_size > 10_000
    other = next((name for name in stored_priors(content) if name != "self"), "self")
    assert main(["export", str(run), "--prior", other, "--scale", "2"]) == 0
    bundle = Bundle.load(run / "bundle")
    recorded = bundle.recorded()
    again = bundle.sample(recorded.condition, recorded.seeds)
    assert torch.equal(again, recorded.pictures) and recorded.pictures.std() > 0
    assert bundle.guidance is not None and bundle.guidance.scales == (2.0,)
    prior = bundle.guidance.prior
    assert prior is None if other == "self" else prior is not None and prior.model is not bundle.model


def stored_priors(content: dict) -> list[str]:
    callbacks = content["trainer"]["callbacks"]
    return next(list(c["init_args"]["priors"]) for c in callbacks if c["class_path"].endswith("PriorComparison"))


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda config: config.stem)
def test_every_config_goes_the_whole_way(config, base, tmp_path, not_apart):
    content = yaml.safe_load(config.read_text())
    if "model" not in content or "data" not in content:
        pytest.skip(f"{config.name} is an overlay for other configs")
    journey(with_data(small(config, tmp_path / "run", base), tmp_path), tmp_path)


def test_the_bundle_is_replayed_in_a_process_of_its_own(run, tmp_path, capsys):
    assert main(["export", str(run), "--out", str(tmp_path / "bundle")]) == 0
    assert "bit for bit the same" in capsys.readouterr().out


@pytest.fixture
def not_apart(monkeypatch):
    """Exports without the process that verifies them: one test is enough for its seconds."""
    monkeypatch.setattr("priorguide.train.export.verify_apart", lambda folder: "not verified apart")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def test_bring_your_own(base, tmp_path, capsys, monkeypatch):
    """The page's own code and config, in two quick steps; and its commands are ones that there are."""
    (code,), (config,), (commands,) = blocks("python"), blocks("yaml"), blocks("sh")
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "colours.yaml").write_text(config)
    monkeypatch.syspath_prepend(tmp_path)
    content = small(tmp_path / "colours.yaml", tmp_path / "runs" / "colours", base)
    with monkeypatch.context() as patch:
        patch.setattr("priorguide.train.export.verify_apart", lambda folder: "")
        journey(content, tmp_path)
    monkeypatch.chdir(tmp_path)
    shutil.rmtree("runs/colours/comparison")
    shutil.rmtree("runs/colours/bundle")
    capsys.readouterr()
    lines = [line.split() for line in commands.splitlines() if line.startswith("priorguide ")]
    assert [words[1] for words in lines] == ["fit", "compare", "export", "sample"]
    for words in lines[1:]:  # the export verifies itself in a process that must import the page's module
        assert main(words[1:]) == 0
    assert "bit for bit the same" in capsys.readouterr().out
    assert len(list(Path("samples").iterdir())) == 16


def test_the_model_of_ones_own_is_about_twenty_lines():
    (code,) = blocks("python")
    body = code[code.index("class Colours") : code.index("    @classmethod")]
    lines = [line for line in body.splitlines() if line.strip() and not line.strip().startswith(('"""', "#"))]
    assert len(lines) <= 22
    assert all(len(line) <= 120 for line in code.splitlines())
