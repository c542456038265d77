"""What a data set is made of, told without decoding it: to know whether encoded samples are still of it."""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from torch import Tensor

NOT_CONTENT = {"bad", "broken", "max_bad_images", "max_bad_clips", "where"}
"""Attributes that do not say what is in a data set."""
SCALARS = bool | int | float | str


def fingerprint(data: Any) -> tuple[str, dict[str, Any]]:
    """(a SHA-256 of what `data` holds, its settings by name): files by their names, sizes and times of change, tensors
    and texts by their content, functions by their names, numbers and words that objects have as attributes as settings.
    """
    digest, settings, seen = hashlib.sha256(), {}, set()

    def visit(value: Any, name: str | None = None) -> None:
        """name: of an object's attribute; what lies in lists has none, and is content."""
        plain = value is None or isinstance(value, SCALARS)
        if name and (plain or (isinstance(value, tuple) and all(isinstance(part, SCALARS) for part in value))):
            settings[name] = value if plain else list(value)
        elif plain or isinstance(value, bytes):
            digest.update(f"{value!r}\0".encode())
        elif isinstance(value, File):
            _visit_file(digest.update, value)
        elif isinstance(value, Tensor | np.ndarray):
            array = torch.as_tensor(value).contiguous()
            digest.update(f"{array.dtype} {tuple(array.shape)}".encode())
            digest.update(array.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        elif isinstance(value, Mapping):
            visit([*value.items()])
        elif hasattr(value, "_fingerprint"):  # of `datasets`
            visit(value._fingerprint)
        elif isinstance(value, Sequence | set) and not isinstance(value, range):
            digest.update(f"[{len(value)}".encode())
            for item in value if isinstance(value, Sequence) else sorted(value):
                visit(item)
        elif isinstance(value, functools.partial):
            visit([value.func, value.args, value.keywords])
        elif hasattr(value, "__qualname__"):
            visit(f"{value.__module__}.{value.__qualname__}")
        elif hasattr(value, "__dict__"):
            visit(type(value))
            if id(value) not in seen:
                seen.add(id(value))
                for key in sorted(vars(value).keys() - NOT_CONTENT):
                    visit(vars(value)[key], None if name is None else f"{name}.{key}".lstrip("."))
        else:
            visit(repr(value))

    visit(data, "")
    return digest.hexdigest(), settings


def _visit_file(update: Callable[[bytes], None], path: File) -> None:
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        try:
            stat = file.stat()
            update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\0".encode())
        except OSError:
            update(f"{file.name} is not there\0".encode())  # a picture that cannot be read is skipped
