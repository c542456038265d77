"""Every config of the project, and the documented model of one's own: train, compare, export, load again."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from fits import same
from runs import CONFIGS, SYSTEMS, configs, small, write_idx

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


def fit(content: dict, folder: Path) -> Path:
    """The run's folder, after the config's two steps and its one comparison."""
    run = Path(content["trainer"]["default_root_dir"])
    (file := folder / "config.yaml").write_text(yaml.safe_dump(content))
    assert main(["fit", "--config", str(file)]) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 2
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    if priors(content):
        assert len((run / "compare" / "metrics.jsonl").read_text().splitlines()) == 1
        assert (run / "compare" / "panel-00000002.png").is_file()
    return run


def priors(content: dict) -> list[str]:
    """The candidates of the config's comparison, none where it has no comparison."""
    found = [callback.get("init_args", {}).get("priors", {}) for callback in content["trainer"]["callbacks"]]
    return [name for names in found for name in names]


def check_comparison(folder: Path) -> None:
    record = json.loads((folder / "record.json").read_text())
    assert {row["prior"] for row in record["rows"]} >= {"none", "self"}
    assert record["history"][0]["step"] == record["step"] == 2 and record["verdict"]["sentence"]
    assert (folder / "index.html").stat().st_size > 10_000 and (folder / "panel.png").is_file()


def check_bundle(folder: Path) -> Bundle:
    """Loaded again, it gives the very pictures that were recorded."""
    bundle = Bundle.load(folder)
    recorded = bundle.recorded()
    assert torch.equal(bundle.sample(recorded.condition, recorded.seeds), recorded.pictures)
    assert recorded.pictures.std() > 0
    return bundle


OVERLAYS = sorted(CONFIGS.glob("*_offline.yaml"))
"""What makes a config of published models run anywhere."""


def under(overlay: Path) -> Path:
    """The config that an overlay lies over."""
    return overlay.with_stem(overlay.stem.removesuffix("_offline"))


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda overlay: under(overlay).stem)
def test_every_published_system_goes_the_whole_way_offline(overlay, tmp_path, monkeypatch):
    monkeypatch.setattr("priorguide.train.export.verify_apart", lambda folder: "not verified apart")
    run, content = tmp_path / "run", yaml.safe_load(overlay.read_text())
    laid = configs(under(overlay).stem, overlay.stem)
    quiet = ["--trainer.enable_model_summary", "false", "--threads", "1"]
    assert main(["fit", *laid, "--trainer.default_root_dir", str(run), *quiet]) == 0
    full = yaml.safe_load(under(overlay).read_text())
    assert set(priors(content)) <= set(priors(full)) and len(priors(content)) > 1
    assert main(["compare", str(run)]) == 0
    record = json.loads((run / "comparison" / "record.json").read_text())
    scales = record["rows"][-1]["scales"]
    other = sorted(priors(content), key="self".__eq__)[0]
    wanted = ":".join(f"{scale:g}" for scale in scales)
    assert main(["export", str(run), "--prior", other, "--scale", wanted]) == 0
    assert check_bundle(run / "bundle").guidance.prior is not None


SHARED = {"instruct_pix2pix": "sd15", "zero123": "variations", "dynamicrafter": "videocrafter1"}
"""The priors that are the adapter's own base. DiT's overlay makes two random ones; the null of Versatile Diffusion is
another than its base's."""


@pytest.mark.parametrize("system", SYSTEMS)
def test_an_adapter_goes_the_whole_way(system, tmp_path, capsys):
    laid, run = configs(system, f"{system}_offline", "lora"), tmp_path / "run"
    options = ["--trainer.max_steps", "4", "--checkpoint.every_n_train_steps", "4", "--threads", "1"]
    options += ["--trainer.callbacks.init_args.every_n_steps", "4"]
    assert main(["fit", *laid, *options, "--trainer.default_root_dir", str(run)]) == 0
    said = re.findall(r"prior (\w+) is the adapter's own base", capsys.readouterr().out)
    assert said == ([SHARED[system]] if system in SHARED else [])
    rows = json.loads((run / "compare" / "metrics.jsonl").read_text())["rows"]
    assert len({row["prior"] for row in rows}) == 2 and {row["prior"] for row in rows} >= {"self", *said}
    held = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert any("lora_A" in name for name in held) and not any("base_layer" in name for name in held)
    assert main(["export", str(run), "--model-only"]) == 0
    network = Bundle.load(run / "model").model.network.state_dict()
    assert not any("lora" in name or "base_layer" in name for name in network)


@pytest.mark.parametrize("config", [under(overlay) for overlay in OVERLAYS], ids=lambda config: config.stem)
def test_every_published_systems_config_is_understood(config, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(config), "--print_config"])
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["max_steps"] >= 1000 and printed["model"]["drop"]


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda config: config.stem)
def test_every_config_goes_the_whole_way(config, base, tmp_path, monkeypatch):
    # A process of its own verifies each export; those of other tests are enough for its seconds.
    monkeypatch.setattr("priorguide.train.export.verify_apart", lambda folder: "not verified apart")
    content = yaml.safe_load(config.read_text())
    if "data" not in content or any(config in (overlay, under(overlay)) for overlay in OVERLAYS):
        pytest.skip(f"{config.name} is an overlay for other configs")
    content = with_data(small(config, tmp_path / "run", base), tmp_path)
    run = fit(content, tmp_path)
    if not priors(content):
        assert main(["export", str(run), "--model-only"]) == 0
        held = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        average = {name.removeprefix("average."): part for name, part in held.items() if name.startswith("average.")}
        assert same(dict(Bundle.load(run / "model").model.network.state_dict()), average)
        return
    assert main(["compare", str(run), "--scales", "1,2"]) == 0
    check_comparison(run / "comparison")
    other = sorted(priors(content), key="self".__eq__)[0]  # another than self, where there is one
    assert main(["export", str(run), "--prior", other, "--scale", "2"]) == 0
    guidance = check_bundle(run / "bundle").guidance
    assert guidance is not None and guidance.scales == (2.0,)
    assert (guidance.prior is None) == (other == "self")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def test_bring_your_own(base, tmp_path, capsys, monkeypatch):
    """The page's own code, config and commands, in two quick steps."""
    (code,), (config,), (commands,) = blocks("python"), blocks("yaml"), blocks("sh")
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "colours.yaml").write_text(config)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    run = fit(small(tmp_path / "colours.yaml", Path("runs/colours"), base), tmp_path)
    lines = [line.split()[1:] for line in commands.splitlines() if line.startswith("priorguide ")]
    assert [words[0] for words in lines] == ["fit", "compare", "export", "sample"]
    capsys.readouterr()
    for words in lines[1:]:
        assert main(words) == 0
    assert "bit for bit the same" in capsys.readouterr().out  # said by a process that had to import the page's module
    check_comparison(run / "comparison")
    assert type(check_bundle(run / "bundle").model).__name__ == "Colours"
    assert len(list(Path("samples").glob("*.png"))) == 16


def test_the_model_of_ones_own_is_about_twenty_lines():
    (code,) = blocks("python")
    body = code[code.index("class Colours") : code.index("    @classmethod")]
    lines = [line for line in body.splitlines() if line.strip() and not line.strip().startswith(('"""', "#"))]
    assert len(lines) <= 22
    assert all(len(line) <= 120 for line in code.splitlines())
