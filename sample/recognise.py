"""Which models take a published file or folder: told by its names and shapes, before anything is loaded."""

import json
from pathlib import Path as File
from typing import Any

from torch import Tensor

from .checkpoint import read_checkpoint, weight_sets
from .models import models


def class_name(folder: File) -> str | None:
    """The class that a diffusers folder, of a pipeline or of a network, says that it holds; None where it says none.

    ValueError where it is not readable.
    """
    for name in ("model_index.json", "config.json"):
        if (file := folder / name).is_file():
            try:
                return json.loads(file.read_text()).get("_class_name")
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{file} must hold a JSON object: {error}") from error
    return None


def contents(path: File) -> dict[str, dict[str, Tensor]]:
    """The tensors of a file by its state dicts ("" where it is itself one), or of a diffusers folder by its parts.

    FileNotFoundError, ValueError as `read_checkpoint`; a diffusers folder's other files than safetensors are left out.
    """
    if class_name(path) is None:
        return weight_sets(read_checkpoint(path))
    files = path.glob("*/*.safetensors" if (path / "model_index.json").is_file() else "*.safetensors")
    parts = sorted({file.parent for file in files})
    return {"" if part == path else part.name: read_checkpoint(part) for part in parts}


def recognise(path: File) -> dict[Any, str]:
    """The model classes whose `from_pretrained` takes this file or folder, and what it is to each, in a few words.

    FileNotFoundError, ValueError for a checkpoint that cannot be read.
    """
    if name := class_name(path):
        return {model: name for model in models().values() if name in model.published_as}
    found: dict[Any, str] = {}
    for tensors in weight_sets(read_checkpoint(path)).values():
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        said = {model: model.recognise(shapes) for model in models().values()}
        found = {model: text for model, text in said.items() if text} | found
    return found
