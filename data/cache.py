"""Encoded training samples in a folder: which they are, where each lies, how they are read and written."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

MANIFEST = "cache.json"
ABANDONED = 600
"""Seconds after which nobody writes on at what was written aside."""
SHARD_ROWS = 256
"""Samples in a file: what a run that is killed while it encodes loses at most, on each process."""

Key = tuple[int, int]
"""(draw, row): what training sees of that row of the training set in the epoch of that number."""


@dataclass(frozen=True)
class Cache:
    """A folder of encoded training samples: filled on first use, or by `priorguide cache`; of one config's data alone.

    folder: on storage that all machines of the run share.
    variants: how many draws of what is random in a training sample (crop, flip, view, frames) are kept of each row;
        epoch e trains on draw e mod variants, which is what epoch e would have drawn without a cache. Raised later, the
        draws that are missing are encoded; lowered, fewer are used.
    """

    folder: str
    variants: int = 1

    def __post_init__(self) -> None:
        if self.variants < 1:
            raise ValueError(f"cache.variants must be at least 1, got {self.variants}")


def plan(groups: Tensor, variants: int) -> list[list[Key]]:
    """The samples of each shard, in order; fewer variants are the first shards of more. groups (N,): rows of one group
    have parts of one shape, and share shards."""
    shards = []
    for variant in range(variants):
        for group in groups.unique().tolist():
            rows = (groups == group).nonzero().flatten().tolist()
            shards += [[(variant, row) for row in rows[i : i + SHARD_ROWS]] for i in range(0, len(rows), SHARD_ROWS)]
    return shards


def shard_path(folder: File, number: int) -> File:
    return folder / f"samples-{number:05d}.safetensors"


def write_shard(path: File, samples: Mapping[str, Tensor]) -> None:
    _write(path, save({name: part.contiguous() for name, part in samples.items()}))


def write_manifest(folder: File, made: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / MANIFEST, (json.dumps(made, indent=2, sort_keys=True) + "\n").encode())


def _write(path: File, content: bytes) -> None:
    """Written aside, onto the disk, then renamed: a file is whole or not there."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def asides(folder: File) -> list[File]:
    """Files that a process writes, or was killed while it wrote."""
    return [*folder.glob(f".{MANIFEST}.*"), *folder.glob(".samples-*.safetensors.*")]


def remove_asides(folder: File) -> None:
    """Those of processes that were killed: another run, on another machine too, may be at work on younger ones."""
    for aside in asides(folder):
        with suppress(FileNotFoundError):
            if time.time() - aside.stat().st_mtime > ABANDONED:
                aside.unlink()


def is_whole(path: File, rows: int) -> bool:
    """Whether the shard is there with all its bytes, and has so many samples."""
    try:
        with safe_open(path, "pt") as shard:
            return {shard.get_slice(name).get_shape()[0] for name in shard.keys()} == {rows}  # noqa: SIM118
    except (OSError, SafetensorError):
        return False


def read_manifest(folder: File) -> dict[str, Any] | None:
    """What a cache says of itself; None where there is none. ValueError where it cannot be read."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must be the manifest of a cache, a JSON object: delete {folder} to encode anew")
    return found


def differences(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """In words, what a cache was made from and what it would be made from now."""
    found = []
    for name in sorted(held.keys() | wanted.keys()):
        old, new = held.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new)
        elif old != new:
            digests = isinstance(old, str) and isinstance(new, str) and len(old) == len(new) == 64
            found.append(f"other {name}" if digests else f"{name} {old}, now {new}")
    return found


class Encoded(Dataset):
    """The samples of a cache, asked for by (epoch, row): {"posterior", "condition": {name: part}}, see
    `DiffusionModel.encode`."""

    decodes = True  # which loader workers are worth, where the disk is slow

    def __init__(self, cache: Cache, groups: Tensor):
        self.folder, self.variants, self.rows = File(cache.folder), cache.variants, len(groups)
        self.shards = plan(groups, cache.variants)
        self.places = torch.empty(cache.variants, self.rows, 2, dtype=torch.long)
        for number, keys in enumerate(self.shards):
            variant, rows = keys[0][0], torch.tensor([row for _, row in keys])
            self.places[variant, rows] = torch.stack([torch.full_like(rows, number), torch.arange(len(rows))], 1)
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return self.rows

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}  # each worker opens its own

    def missing(self) -> list[int]:
        """The numbers of the shards that are not there, or not whole."""
        return [
            number
            for number, keys in enumerate(self.shards)
            if not is_whole(shard_path(self.folder, number), len(keys))
        ]

    def __getitems__(self, asked: Sequence[Key]) -> Any:
        try:
            samples = [self._read(*self.places[epoch % self.variants, row].tolist()) for epoch, row in asked]
        except ValueError as error:
            if get_worker_info() is None:
                raise
            return error  # `Loader` raises it
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        return {"posterior": batch.pop("posterior"), "condition": batch}

    def _read(self, number: int, offset: int) -> dict[str, Tensor]:
        path = shard_path(self.folder, number)
        try:
            if number not in self._open:
                self._open[number] = safe_open(path, "pt").__enter__()
            shard = self._open[number]
            return {name: shard.get_slice(name)[offset] for name in shard.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"the cache's {path} is not there or damaged: run the same command again to encode what is missing "
                f"({error})"
            ) from error
