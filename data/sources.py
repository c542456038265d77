"""Where labelled pictures come from, as `torch` data sets that return whole batches.

A data set's `__getitems__` takes indices and returns {"pixels" (B, C, R, R) float in [0, 1], "label" (B,) int64}, with
"text", a list, where there are captions, and without "label" where there are no labels.
"""

import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from . import fashion
from .images import UNREADABLE, decode, fit
from .listings import number_classes, read_folder, read_hub

log = logging.getLogger(__name__)


class BadImages(ValueError):
    """More unreadable pictures than allowed; the message lists them."""


class MemoryImages(Dataset):
    """Pictures decoded once: pixels uint8 (N, C, R, R), labels (N,)."""

    def __init__(self, pixels: Tensor, labels: Tensor):
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: Tensor) -> "MemoryImages":
        return MemoryImages(self.pixels[rows], self.labels[rows])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        rows = torch.as_tensor(indices)
        return {"pixels": self.pixels[rows].float() / 255, "label": self.labels[rows]}


class FileImages(Dataset):
    """Pictures decoded when they are asked for.

    `pictures`: paths, or rows of a `datasets.Dataset` with an undecoded column "image". A picture that cannot be read
    is reported, and the next readable one stands in for it, so that batches keep their size; beyond `max_bad_images`
    of them, counted over all loader workers of a process, `BadImages` lists their names.
    """

    def __init__(
        self,
        pictures: Any,
        labels: Tensor | None,
        texts: Sequence[str] | None,
        resolution: int,
        channels: int,
        max_bad_images: int,
        rows: Tensor | None = None,
    ):
        self.pictures, self.labels, self.texts = pictures, labels, texts
        self.resolution, self.channels, self.max_bad_images = resolution, channels, max_bad_images
        self.rows = torch.arange(len(pictures)) if rows is None else rows
        self.bad = torch.zeros(len(self.rows), dtype=torch.bool).share_memory_()  # what one worker marks, all see

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, rows: Tensor) -> "FileImages":
        settings = (self.resolution, self.channels, self.max_bad_images)
        return FileImages(self.pictures, self.labels, self.texts, *settings, rows=self.rows[rows])

    def __getitems__(self, indices: Sequence[int]) -> Any:
        try:
            found = [self._read(int(index)) for index in indices]
        except BadImages as error:
            if get_worker_info() is None:
                raise
            return error  # `Loader` raises it: torch would bury its sentence in the worker's traceback
        rows = self.rows[[index for index, _ in found]]
        batch: dict[str, Any] = {"pixels": torch.stack([pixels for _, pixels in found]).float() / 255}
        if self.labels is not None:
            batch["label"] = self.labels[rows]
        if self.texts is not None:
            batch["text"] = [self.texts[row] for row in rows.tolist()]
        return batch

    def _read(self, index: int) -> tuple[int, Tensor]:
        for other in chain(range(index, len(self)), range(index)):
            if self.bad[other]:
                continue
            try:
                return other, decode(self._picture(other), self.resolution, self.channels)
            except UNREADABLE as error:
                self.bad[other] = True
                log.warning("skipped an unreadable picture, %s: %s", self._name(other), error)
            if int(self.bad.sum()) > self.max_bad_images:
                break
        names = [self._name(i) for i in self.bad.nonzero().flatten().tolist()]
        raise BadImages(
            f"at most {self.max_bad_images} pictures may be unreadable (max_bad_images), found {len(names)} "
            f"among {len(self)}: {', '.join(names)}"
        )

    def _picture(self, index: int) -> Any:
        picture = self.pictures[int(self.rows[index])]
        return picture["image"] if isinstance(picture, Mapping) else picture

    def _name(self, index: int) -> str:
        picture = self._picture(index)
        return str(picture) if isinstance(picture, File) else picture["path"] or f"row {int(self.rows[index])}"


Images = MemoryImages | FileImages


def open_source(
    source: str,
    resolution: int = 32,
    channels: int = 1,
    num_classes: int | None = None,
    max_bad_images: int = 10,
    image_column: str | None = None,
    label_column: str | None = None,
) -> tuple[Images, Images | None, tuple[str, ...]]:
    """(training pictures, validation pictures or None, class names). ValueError, one sentence, for a bad source.

    `source`: "fashion", "idx:FOLDER", a local folder, or a data set on the Hub ("name" or "name:config").
    """
    if source == "fashion":
        pairs = [fashion.read_parquet(split) for split in ("train", "test")]
        return *_in_memory(pairs, resolution, channels), fashion.CLASS_NAMES
    if source.startswith("idx:"):
        pairs = [fashion.read_idx_pair(File(source[4:]).expanduser(), name) for name in ("train", "t10k")]
        return *_in_memory(pairs, resolution, channels), tuple(map(str, range(len(fashion.CLASS_NAMES))))
    folder = File(source).expanduser()
    if folder.is_dir() and not any(folder.rglob("*.parquet")):
        listings = read_folder(folder)
    elif folder.is_absolute() and not folder.is_dir():
        raise ValueError(f"source must be a folder that exists, got {source}")
    else:
        listings = read_hub(str(folder) if folder.is_dir() else source, image_column, label_column)
    labels, names = number_classes(listings, num_classes)
    train, *held = [
        FileImages(listing.pictures, numbers, listing.texts, resolution, channels, max_bad_images)
        for listing, numbers in zip(listings, labels, strict=True)
    ]
    return train, held[0] if held else None, names


def _in_memory(
    pairs: Sequence[tuple[Tensor, Tensor]], resolution: int, channels: int
) -> tuple[MemoryImages, MemoryImages]:
    train, held = [
        MemoryImages(fit(pixels, resolution, pad=True).expand(-1, channels, -1, -1), labels) for pixels, labels in pairs
    ]
    return train, held
