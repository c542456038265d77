"""Finished chunks of a comparison on disk, so that one that was killed goes on from them to the same numbers."""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path as File
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def fingerprint(*values: Any) -> str:
    """SHA-256 of values by their content: tensors, modules by their state, dataclasses, mappings, sequences, plain."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, nn.Module):
            value = value.state_dict()
        elif is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            digest.update("".join(fingerprint(str(key), value[key]) for key in sorted(value, key=str)).encode())
        elif isinstance(value, Sequence | set | frozenset) and not isinstance(value, str):
            items = value if isinstance(value, Sequence) else sorted(value, key=str)
            digest.update("".join(["sequence", *map(fingerprint, items)]).encode())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Part:
    """A chunk of conditions: the pictures (n, C, H, W) of each distinct arm, and each arm's ratios (steps,)."""

    pictures: list[Tensor]
    ratios: list[Tensor]


class Parts:
    """A folder of parts, those of each comparison under its own key, each file written aside and renamed.

    Nothing is read until `open` has said which comparison it is. It takes as much room as the pictures do in memory.
    """

    def __init__(self, folder: str | os.PathLike[str], say: Callable[[str], None] = print):
        self.folder, self.say = File(folder), say
        self._own: File | None = None

    def open(self, key: str) -> None:
        """Looks for what was kept under this key, and says what there is."""
        self._own = self.folder / key[:16]
        if count := sum(self._length(file) for file in self._files()):
            self.say(f"going on: {count:,} conditions of this comparison are sampled already")

    @property
    def batch_size(self) -> int | None:
        """The size of the batches that the parts were drawn in, the last where it was halved; None without parts."""
        sizes = [int(metadata["batch_size"]) for file in self._files() if (metadata := _metadata(file))]
        return min(sizes, default=None)

    def read(self, start: int) -> Part | None:
        """The part that begins at that condition, whatever its length; None where there is none, or it is damaged."""
        if self._own is None or not (file := self._own / f"{start:08d}.safetensors").is_file():
            return None
        try:
            with safe_open(file, "pt") as held:
                names = sorted(held.keys())
                tensors = {name: held.get_tensor(name) for name in names}
        except (SafetensorError, OSError):
            return None
        pictures, ratios = ([t for name, t in tensors.items() if name.startswith(kind)] for kind in "pr")
        return Part(pictures, ratios)

    def write(self, start: int, part: Part, batch_size: int) -> None:
        """Keeps a part, whole or not at all. OSError where it cannot be written."""
        if self._own is None:
            return
        tensors = {f"p{i:04d}": value.contiguous() for i, value in enumerate(part.pictures)}
        tensors |= {f"r{i:04d}": value.contiguous() for i, value in enumerate(part.ratios)}
        file = self._own / f"{start:08d}.safetensors"
        aside = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            self._own.mkdir(parents=True, exist_ok=True)
            save_file(tensors, aside, {"batch_size": str(batch_size)})
            with aside.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(aside, file)
        except (OSError, SafetensorError) as error:
            aside.unlink(missing_ok=True)
            for folder in (self._own, self.folder):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
            raise OSError(f"{file} could not be written: {error}; the parts before it are kept") from error

    def remove(self) -> None:
        """All parts, of whatever comparison: the folder's purpose is fulfilled."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[File]:
        return sorted(self._own.glob("[0-9]*.safetensors")) if self._own is not None else []

    def _length(self, file: File) -> int:
        part = self.read(int(file.stem))
        return len(part.pictures[0]) if part and part.pictures else 0


def _metadata(file: File) -> dict[str, str] | None:
    try:
        with safe_open(file, "pt") as held:
            return held.metadata()
    except (SafetensorError, OSError):
        return None
