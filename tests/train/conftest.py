"""Small runs made by the command line itself, shared by the tests of it."""

from pathlib import Path

import lightning  # noqa: F401 - its log handler keeps the stderr of its first import, which one test's must not be
import pytest
import yaml
from oracle import pixel_model
from runs import CONFIGS, small, write_idx

from priorguide.sample.bundle import Bundle
from priorguide.train.cli import main


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A saved unconditional model, as the shipped base is, but tiny and untrained."""
    return Bundle.save(tmp_path_factory.mktemp("base") / "base", pixel_model(4, num_classes=0, image_channels=0))


@pytest.fixture(scope="session")
def idx(tmp_path_factory) -> Path:
    return write_idx(tmp_path_factory.mktemp("idx"))


@pytest.fixture(scope="session")
def edges(tmp_path_factory, base, idx) -> Path:
    """A config of two steps, whose run's folder does not exist yet."""
    folder = tmp_path_factory.mktemp("edges")
    (folder / "edges.yaml").write_text(yaml.safe_dump(small(CONFIGS / "fashion_edges.yaml", folder / "run", base, idx)))
    return folder / "edges.yaml"


@pytest.fixture(scope="session")
def run(edges) -> Path:
    """The folder of that config's fit, with its comparison and its bundle."""
    folder = edges.parent / "run"
    assert main(["fit", "--config", str(edges)]) == 0
    assert main(["compare", str(folder), "--scales", "1,2"]) == 0
    assert main(["export", str(folder)]) == 0
    return folder
