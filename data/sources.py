"""Where labelled pictures come from, as `torch` data sets that return whole batches.

A data set's `__getitems__` takes indices and returns {"pixels" (B, C, R, R) float in [0, 1], "label" (B,) int64}, with
"text", a list, where there are captions, and without "label" where there are no labels. Rows of several pictures have
a batch key for each.
"""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, repeat
from pathlib import Path as File
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from . import fashion
from .images import UNREADABLE, Place, Size, decode, fit, upright_size
from .listings import BadRow, list_folder, list_rows, number_classes, read_splits

log = logging.getLogger(__name__)

THREADS = 16
"""That read headers, which is for the most part waiting for files."""


class BadImages(ValueError):
    """More unreadable pictures, or clips, than allowed; the message lists them."""


Row = TypeVar("Row")


def first_readable(
    index: int,
    bad: Tensor,
    read: Callable[[int], Row],
    name: Callable[[int], str],
    limit: int,
    kind: str = "picture",
    option: str = "max_bad_images",
) -> tuple[int, Row]:
    """(i, read(i)) for the first row i from `index` on, and around the end, that can be read.

    bad: uint8 (N,), not 0 for rows known to be unreadable; in shared memory what one loader worker marks, all see.
    Each is reported once, by its name; `BadImages` lists them where there are more than `limit`.
    """
    for other in chain(range(index, len(bad)), range(index)):
        if bad[other]:
            continue
        try:
            return other, read(other)
        except UNREADABLE as error:
            bad[other].clamp_(min=1)
            log.warning("skipped an unreadable %s, %s: %s", kind, name(other), error)
        if bad.count_nonzero() > limit:
            break
    raise _too_many([name(i) for i in bad.nonzero().flatten().tolist()], len(bad), limit, kind, option)


def check_broken(
    broken: Mapping[int, BadRow], rows: int, limit: int, kind: str = "picture", option: str = "max_bad_images"
) -> None:
    """`BadImages` where more of a listing's rows than `limit` cannot be used, before any picture is read."""
    if len(broken) > limit:
        shown = [f"{bad.where} ({bad.fault})" for bad in [*broken.values()][: limit + 1]]
        shown += [f"{len(broken) - len(shown)} more"] if len(shown) < len(broken) else []
        raise _too_many(shown, rows, limit, kind, option, len(broken))


def _too_many(
    names: Sequence[str], rows: int, limit: int, kind: str, option: str, count: int | None = None
) -> BadImages:
    found = len(names) if count is None else count
    told = f"at most {limit} {kind}s may be unreadable ({option}), found {found} among {rows}"
    return BadImages(f"{told}: {', '.join(names)}")


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

    `pictures`: for each row a path, or a mapping from batch keys to pictures; see `Listing`. `check`: called with each
    row of these that is read, raises where what belongs to its picture cannot be read; of `broken` rows that is known.
    A row that cannot be read is reported, and the next readable one stands in for it, so that batches keep their size;
    beyond `max_bad_images` of them, counted over all loader workers of a process, `BadImages` lists their names.
    """

    decodes = True  # which loader workers are worth
    sizes: Sequence[Size] = ()
    groups: Tensor | None = None  # squares

    def __init__(
        self,
        pictures: Any,
        labels: Tensor | None,
        texts: Sequence[str] | None,
        resolution: int,
        channels: int,
        max_bad_images: int,
        rows: Tensor | None = None,
        check: Callable[[int], object] | None = None,
        broken: Mapping[int, BadRow] | None = None,
    ):
        check_broken(broken or {}, len(pictures), max_bad_images)
        self.broken = broken or {}
        self.pictures, self.labels, self.texts, self.check = pictures, labels, texts, check
        self.resolution, self.channels, self.max_bad_images = resolution, channels, max_bad_images
        self.rows = torch.arange(len(pictures)) if rows is None else rows
        # 1 + which of a row's pictures cannot be read, or 0; what one worker marks, all see
        self.bad = torch.zeros(len(self.rows), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, rows: Tensor) -> "FileImages":
        settings = (self.resolution, self.channels, self.max_bad_images)
        held: dict[str, Any] = {"rows": self.rows[rows], "check": self.check, "broken": self.broken}
        return FileImages(self.pictures, self.labels, self.texts, *settings, **held)

    def sides(self, key: str = "pixels") -> Tensor:
        """The upright height and width (N, 2) of each row's picture, of pairs the one under this batch key, by their
        headers alone; zeros where one cannot be read."""
        pictures = self.pictures
        if hasattr(pictures, "select_columns"):  # of `datasets`, which would read the other pictures too
            pictures = pictures.select_columns(key)

        def read(row: int) -> tuple[int, int]:
            picture = pictures[row]
            return upright_size(picture if isinstance(picture, File) else picture.get(key)) or (0, 0)

        with ThreadPoolExecutor(THREADS) as threads:
            return torch.tensor(list(threads.map(read, self.rows.tolist()))).reshape(-1, 2)

    def cut_to(self, sizes: Sequence[Size], groups: Tensor) -> "FileImages":
        """The same pictures, row i cut to sizes[groups[i]], and so is what stands in for it: rows of one group make a
        batch."""
        twin = copy.copy(self)
        twin.sizes, twin.groups = sizes, groups
        return twin

    def __getitems__(self, indices: Sequence[int], places: Sequence[Place] | None = None) -> Any:
        """The batch; `places`: where each row's pictures are cut out, the centre if absent."""
        try:
            wanted = zip(indices, places or repeat(None), strict=False)
            found = [self._read(int(index), place) for index, place in wanted]
        except BadImages as error:
            if get_worker_info() is None:
                raise
            return error  # `Loader` raises it: torch would bury its sentence in the worker's traceback
        rows = self.rows[[index for index, _ in found]]
        batch: dict[str, Any] = {
            key: torch.stack([pictures[key] for _, pictures in found]).float() / 255 for key in found[0][1]
        }
        if self.labels is not None:
            batch["label"] = self.labels[rows]
        if self.texts is not None:
            batch["text"] = [self.texts[row] for row in rows.tolist()]
        return batch

    def _read(self, index: int, place: Place | None) -> tuple[int, dict[str, Tensor]]:
        size = self.resolution if self.groups is None else self.sizes[int(self.groups[index])]

        def read(row: int) -> dict[str, Tensor]:
            if broken := self.broken.get(int(self.rows[row])):
                raise ValueError(broken.fault)
            pictures, found = self._pictures(row), {}
            if self.check is not None:
                self.check(int(self.rows[row]))
            for key, picture in pictures.items():  # the pictures of a row are fitted alike: none alone is padded
                try:
                    found[key] = decode(picture, size, self.channels, pad=len(pictures) == 1, place=place)
                except UNREADABLE:
                    self.bad[row] = 1 + len(found)
                    raise
            return found

        return first_readable(index, self.bad, read, self._name, self.max_bad_images)

    def _pictures(self, index: int) -> Mapping[str, Any]:
        pictures = self.pictures[int(self.rows[index])]
        return {"pixels": pictures} if isinstance(pictures, File) else pictures

    def _name(self, index: int) -> str:
        """What to call the unreadable picture of a row."""
        if broken := self.broken.get(int(self.rows[index])):
            return broken.where
        picture = list(self._pictures(index).values())[int(self.bad[index]) - 1]
        path = picture if isinstance(picture, File) else (picture or {}).get("path")
        return str(path or f"row {int(self.rows[index])}")


class Images(Protocol):
    """What a data module asks of its pictures."""

    def __len__(self) -> int: ...

    def select(self, rows: Tensor) -> "Images": ...

    def __getitems__(self, indices: Sequence[int]) -> Any: ...


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
    listings = read_splits(
        source,
        plain=lambda folder: not any(folder.rglob("*.parquet")),
        from_folder=list_folder,
        from_rows=partial(list_rows, image_column=image_column, label_column=label_column),
    )
    labels, names = number_classes(listings, num_classes)
    train, *held = [
        FileImages(
            listing.pictures, numbers, listing.texts, resolution, channels, max_bad_images, broken=listing.broken
        )
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
