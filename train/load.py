"""Models by name, for configs: what a candidate prior or a base to start from may be."""

from importlib.resources import files
from pathlib import Path as File

from ..sample.bundle import Bundle
from ..sample.model import DiffusionModel

SHIPPED = {"fashion-base": "fashion/base"}
"""Models that come with the package."""


def pretrained(pretrained_model_name_or_path: str) -> DiffusionModel:
    """A saved model: a bundle's folder, or the name of one that ships with priorguide. ValueError for neither."""
    name = pretrained_model_name_or_path
    folder = File(str(files("priorguide.data") / SHIPPED[name])) if name in SHIPPED else File(name)
    if not (folder / "priorguide.json").is_file():
        raise ValueError(
            f"{name!r} is neither a saved model's folder (it has no priorguide.json) nor one of {sorted(SHIPPED)}"
        )
    return Bundle.load(folder).model
