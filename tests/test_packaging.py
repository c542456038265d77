"""The wheel: everything that the tree has, nothing else, and it works away from the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("sample", "train", "callbacks", "data", "configs")
BESIDE = ("pyproject.toml", "README.md", "LICENSE")
MEBIBYTE = 2**20


def run(*command: str | Path, **options) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that neither the tree nor an earlier build has a part in it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BESIDE:
        shutil.copy(ROOT / name, source)
    build = ("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, source)
    run(sys.executable, "-m", "pip", *build)
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_what_the_tree_holds(wheel):
    with zipfile.ZipFile(wheel) as content:
        found = {name for name in content.namelist() if ".dist-info/" not in name}
        files = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
        expected = {f"priorguide/{path.relative_to(ROOT).as_posix()}": path for path in files}
        expected = {name: path for name, path in expected.items() if "__pycache__" not in name}
        assert found == expected.keys()
        assert all(content.read(name) == path.read_bytes() for name, path in expected.items())
    for needed in ("configs/fashion_edges.yaml", "data/fashion/train.parquet", "data/fashion/base/priorguide.json"):
        assert f"priorguide/{needed}" in found
    assert "priorguide/__init__.py" not in found  # a namespace, so that a checkout of another part can join it


def test_its_size_and_metadata(wheel):
    with zipfile.ZipFile(wheel) as content:
        (folder,) = {name.split("/")[0] for name in content.namelist() if ".dist-info/" in name}
        metadata = Parser().parsestr(content.read(f"{folder}/METADATA").decode())
        assert "priorguide = priorguide.train.cli:main" in content.read(f"{folder}/entry_points.txt").decode()
        sizes = {name: info.file_size for name, info in ((i.filename, i) for i in content.infolist())}
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("License-File")) == {"LICENSE", "data/fashion/LICENSE"}
    assert set(metadata.get_all("Provides-Extra")) == {"train", "video", "dev"}
    core = [name for name in metadata.get_all("Requires-Dist") if "extra ==" not in name]
    assert any(name.startswith("torch") for name in core)
    assert not any(name.startswith(("lightning", "wandb", "datasets", "bitsandbytes")) for name in core)
    base = sum(size for name, size in sizes.items() if name.startswith("priorguide/data/fashion/base/"))
    images = sum(size for name, size in sizes.items() if name.endswith(".parquet"))
    assert base <= 3 * MEBIBYTE and images <= 6 * MEBIBYTE
    assert wheel.stat().st_size < 10 * MEBIBYTE


@pytest.mark.slow
def test_an_installed_wheel_works_away_from_the_checkout(wheel, tmp_path):
    """In an environment of its own that borrows the libraries, but not the project, from this one."""
    place = tmp_path / "environment"
    venv.create(place, symlinks=True)
    python = place / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    (site,) = (place / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")  # whose own .pth files are not read
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    options = {"cwd": tmp_path, "env": environment}
    assert "quickstart" in run(place / "bin" / "priorguide", "--help", **options)
    code = """import importlib, sys
import priorguide.sample
assert not {"lightning", "wandb", "datasets"} & sys.modules.keys()
from priorguide.sample.bundle import verify
from priorguide.train.load import pretrained
model = pretrained("fashion-base")
from importlib.resources import files
verify(files("priorguide.data") / "fashion/base")
from priorguide.data.classifier import GarmentClassifier
GarmentClassifier.pretrained()
print(files("priorguide.configs") / "fashion_edges.yaml")
for name in ("train.fit", "train.quickstart", "callbacks.comparison", "data.labelled", "sample.loop"):
    print(importlib.import_module(f"priorguide.{name}").__file__)
"""
    paths = run(python, "-c", code, **options).splitlines()
    assert len(paths) == 6 and all(Path(path).is_file() and Path(path).is_relative_to(site) for path in paths)
    edges = str(site / "priorguide" / "configs" / "fashion_edges.yaml")
    assert "PriorComparison" in run(place / "bin" / "priorguide", "fit", "--config", edges, "--print_config", **options)
