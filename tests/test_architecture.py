"""Who may import whom, how long a file may be, and what the wheel holds."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "data": {"data"},
    "sample": {"sample"},
    "callbacks": {"callbacks", "sample"},
    "train": {"train", "callbacks", "sample", "data", "configs"},
    "configs": {"configs"},
}
TRAINING_ONLY = {"lightning", "pytorch_lightning", "wandb", "datasets", "torchmetrics"}
FILES = sorted(file for package in MAY_IMPORT for file in (ROOT / package).rglob("*.py"))


def imported(file: Path) -> set[str]:
    """Dotted names of the modules that a file imports, anywhere in it; relative ones from `priorguide` down."""
    package, names = ("priorguide", *file.relative_to(ROOT).parent.parts), set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*start, *([node.module] if node.module else [])])
            names |= {module} if node.module else {f"{module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_who_imports_whom(file):
    own = file.relative_to(ROOT).parts[0]
    names = {tuple(name.split(".")) for name in imported(file)}
    ours = {name[1] for name in names if name[0] == "priorguide" and len(name) > 1}
    assert ours <= MAY_IMPORT[own], f"{own} may import {sorted(MAY_IMPORT[own])}"
    assert own != "sample" or not {name[0] for name in names} & TRAINING_ONLY


def test_relative_imports_are_resolved():
    assert "priorguide.sample.model" in imported(ROOT / "sample" / "models" / "pixel.py")
    assert "priorguide.sample.noise" in imported(ROOT / "sample" / "loop.py")


def test_importing_sample_brings_in_nothing_of_training():
    modules = [".".join(["priorguide", *file.relative_to(ROOT).with_suffix("").parts]) for file in FILES]
    modules = [name for name in modules if name.startswith("priorguide.sample.") and not name.endswith("__init__")]
    code = f"""import sys
for name in {["priorguide.sample", *modules]}:
    __import__(name)
    assert not {TRAINING_ONLY} & sys.modules.keys(), name"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_are_short(file):
    assert len(file.read_text().splitlines()) <= 300


def test_the_wheel_lists_every_package():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {file.parent.relative_to(ROOT) for file in FILES if file.name == "__init__.py"}
    assert set(setuptools["packages"]) == {".".join(["priorguide", *folder.parts]) for folder in folders}
    assert setuptools["package-dir"] == {f"priorguide.{package}": package for package in MAY_IMPORT}
    assert {file.parent.relative_to(ROOT) for file in FILES} == folders, "a folder of modules needs an __init__.py"
