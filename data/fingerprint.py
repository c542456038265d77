"""What a data set is made of, told without decoding it: to know whether encoded samples are still of it."""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .sources import THREADS

NOT_CONTENT = {"bad", "broken", "max_bad_images", "max_bad_clips", "where"}
"""Attributes that do not say what is in a data set."""
SCALARS = bool | int | float | str
END = 16384
"""Bytes of a file's head, and of its tail, that are looked at: compressed pictures and videos cannot differ in their
midst alone, since their size, lengths or checksums tell."""
MARK = 16
"""Hexadecimal digits that a file is known by."""


def contents(data: Any) -> tuple[str, list[File]]:
    """(a SHA-256 of what `data` holds, the files that it reads): files by their names alone, for `marks` to look into,
    the rest as `fingerprint` has it."""
    files: dict[File, None] = {}

    def visit_file(update: Callable[[bytes], None], path: File) -> None:
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.rglob("[!.]*") if file.is_file())
        for file in found:
            update(f"{file.name if file is path else file.relative_to(path.parent)}\0".encode())
        files.update(dict.fromkeys(found))

    digest, settings = fingerprint(data, visit_file)
    return hashlib.sha256(f"{digest} {sorted(settings.items())}".encode()).hexdigest(), list(files)


def marks(files: Sequence[File]) -> str:
    """MARK digits for each file, of its size and both its ends; zeros for one that cannot be read."""
    with ThreadPoolExecutor(THREADS) as threads:
        return "".join(threads.map(_mark, files))


def _mark(path: File) -> str:
    try:
        with path.open("rb", buffering=0) as file:
            size, digest = file.seek(0, 2), hashlib.sha256()
            file.seek(0)
            digest.update(b"%d %b" % (size, file.read(END)))
            file.seek(max(END, size - END))
            digest.update(file.read(END))
            return digest.hexdigest()[:MARK]
    except OSError:
        return "0" * MARK  # a picture that cannot be read is skipped


def first_changed(files: Sequence[File], old: str, new: str) -> File | None:
    """The first of the files whose mark is another one; None where that cannot be told."""
    if len(old) != len(new):
        return None
    places = range(0, len(new), MARK)
    return next((file for file, at in zip(files, places, strict=True) if old[at:][:MARK] != new[at:][:MARK]), None)


def _times(update: Callable[[bytes], None], path: File) -> None:
    """A file by its size and time of change."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        try:
            stat = file.stat()
            update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\0".encode())
        except OSError:
            update(f"{file.name} is not there\0".encode())


def fingerprint(
    data: Any, visit_file: Callable[[Callable[[bytes], None], File], None] = _times
) -> tuple[str, dict[str, Any]]:
    """(a SHA-256 of what `data` holds, its settings by name): files as `visit_file` has them, tensors and texts by
    their content, functions by their names, numbers and words that objects have as attributes as settings.
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
            visit_file(digest.update, value)
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
