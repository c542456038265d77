"""Models by name, for configs: what a candidate prior or a base to start from may be."""

from importlib.resources import files
from pathlib import Path as File

from ..sample.bundle import Bundle
from ..sample.hub import locate
from ..sample.manifest import MANIFEST
from ..sample.model import DiffusionModel
from ..sample.recognise import recognise

SHIPPED = {"fashion-base": "fashion/base"}
"""Models that come with the package."""


def pretrained(pretrained_model_name_or_path: str, revision: str | None = None) -> DiffusionModel:
    """A model by one name: one that ships with priorguide, a bundle's folder, or what the `from_pretrained` of exactly
    one model takes as it is: a diffusers folder, an original file, or either on the Hub (at `revision`).

    FileNotFoundError; ValueError where none takes it, or more than one.
    """
    name = pretrained_model_name_or_path
    if name in SHIPPED:
        return Bundle.load(File(str(files("priorguide.data") / SHIPPED[name]))).model
    try:
        path = locate(name, revision=revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; the models that ship with priorguide are {sorted(SHIPPED)}") from error
    if (path / MANIFEST).is_file():
        return Bundle.from_pretrained(name, revision=revision).model
    found = recognise(path)
    if len(found) != 1:
        taken = f"more than one model takes it ({', '.join(model.__name__ for model in found)})"
        raise ValueError(
            f"{name} is no bundle, and {taken if found else 'no model here knows it'}: give the model's own loader, "
            "class_path: priorguide.sample.models.<file>.<Model>.from_pretrained (`priorguide doctor` says what it is)"
        )
    (model,) = found
    return model.from_pretrained(path)
