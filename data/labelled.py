"""Labelled pictures for training and comparison, as a Lightning data module."""

import itertools
import re
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from .sources import Images, MemoryImages, open_source
from .tasks import Batch, Transform, find


class Splits(NamedTuple):
    train: Images
    held: Images
    class_names: tuple[str, ...]


class LabelledImages(LightningDataModule):
    """Pictures with classes: the embedded set, IDX files, a local folder, or a data set on the Hub.

    source: "fashion" (embedded); "idx:FOLDER" (the four Fashion-MNIST or MNIST files); a folder of class folders, or of
        pictures with metadata.jsonl, with or without "train" and "test" above; "name" or "name:config" on the Hub.
    transform: what a batch {"pixels" (B, C, R, R) in [0, 1], "label" (B,)} becomes: "classes", "edges", "rotate", a
        function's dotted name, or a callable.
    resolution, channels: pictures are R x R, 1 or 3 channels. Grey ones at most 4 pixels too small are padded with
        zeros (28x28 at 32); others have their shorter side resized and the centre cut out.
    train_range: "first:after the last" of the source's training pictures, "0:40000", before anything else is chosen.
    max_train_samples: so many, chosen by `seed`. max_val_samples: the first so many of the validation pictures.
    val_fraction: the share of training pictures held out where the source has no validation split.
    num_classes: checked, or needed to know how many, where labels are numbers.
    seed: which training pictures, in which order. The validation pictures and their order never depend on it, so that
        runs with different seeds are compared on the same pictures.
    num_workers: for folders and the Hub; pictures in memory need none.
    max_bad_images: so many unreadable pictures are reported and skipped; one more ends the run with a list.

    ValueError, on first use, for a bad source, an empty folder, labels outside [0, num_classes), a bad range.
    """

    def __init__(
        self,
        source: str = "fashion",
        transform: str | Callable[[Batch], Batch] = "classes",
        resolution: int = 32,
        channels: int = 1,
        train_batch_size: int = 64,
        train_range: str | None = None,
        max_train_samples: int | None = None,
        max_val_samples: int | None = None,
        val_fraction: float = 0.1,
        num_classes: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        max_bad_images: int = 10,
        image_column: str | None = None,
        label_column: str | None = None,
    ):
        super().__init__()
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels}")
        for name, value in (("max_train_samples", max_train_samples), ("max_val_samples", max_val_samples)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, got {val_fraction}")
        self.transform = find(transform) if isinstance(transform, str) else transform
        self.train_batch_size, self.seed, self.num_workers = train_batch_size, seed, num_workers
        self.train_range, self.val_fraction = train_range, val_fraction
        self.max_train_samples, self.max_val_samples = max_train_samples, max_val_samples
        self._open = partial(
            open_source, source, resolution, channels, num_classes, max_bad_images, image_column, label_column
        )

    @cached_property
    def splits(self) -> Splits:
        """The chosen pictures, without the transform; opened on first use."""
        train, held, names = self._open()
        if self.train_range is not None:
            train = train.select(_range(self.train_range, len(train)))
        if held is None:
            order, count = _shuffled(len(train), 0), max(1, round(len(train) * self.val_fraction))
            if count >= len(train):
                raise ValueError(f"at least 2 pictures are needed to hold some out for validation, got {len(train)}")
            train, held = train.select(order[count:].sort().values), train.select(order[:count])
        else:
            held = held.select(_shuffled(len(held), 0))  # folders are sorted by class: mix them
        if self.max_val_samples is not None:
            held = held.select(torch.arange(min(self.max_val_samples, len(held))))
        if self.max_train_samples is not None:
            train = train.select(_shuffled(len(train), self.seed)[: self.max_train_samples])
        return Splits(train, held, names)

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the labels of a batch mean: the transform's own names, or the data's classes; () if there are none."""
        return getattr(self.transform, "class_names", None) or self.splits.class_names

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def prepare_data(self) -> None:
        self._open()  # one process per machine downloads; the others find it done

    def setup(self, stage: str | None = None) -> None:
        _ = self.splits

    def train_dataloader(self) -> "Loader":
        """Shuffled by (seed, epoch), divided among the devices, the last partial batch dropped."""
        loader = self._loader(self.splits.train, shuffle=True)
        if not len(loader):
            raise ValueError(
                f"train_batch_size must be at most the training pictures of a device ({len(loader.sampler)}), "  # type: ignore[arg-type]
                f"got {self.train_batch_size}"
            )
        return loader

    def val_dataloader(self) -> "Loader":
        return self._loader(self.splits.held, shuffle=False)

    def held_out(self, n: int, offset: int = 0) -> Batch:
        """Validation pictures offset .. offset + n - 1, in their fixed order, transformed. Draws nothing at random."""
        if not (n >= 1 and 0 <= offset <= len(self.splits.held) - n):
            raise ValueError(f"there are {len(self.splits.held)} validation pictures, got n = {n}, offset = {offset}")
        return self.transform(self.splits.held.__getitems__(range(offset, offset + n)))

    def reference(self, n: int, offset: int = 0) -> Tensor:
        """Real validation pictures (n, C, H, W) in [0, 1], as the transform makes them: what samples should be like."""
        return self.held_out(n, offset)["pixels"]

    def _loader(self, images: Images, shuffle: bool) -> "Loader":
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        workers = 0 if isinstance(images, MemoryImages) else self.num_workers
        return Loader(
            images,
            batch_size=self.train_batch_size,
            sampler=Order(images, world, rank, shuffle=shuffle, seed=self.seed, drop_last=shuffle),
            drop_last=shuffle,
            collate_fn=partial(_collate, self.transform),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),  # else each epoch draws from the global generator
        )


class Order(DistributedSampler):
    """Each epoch's order follows from (seed, epoch) alone. `start`: how many samples the next iteration leaves out."""

    start = 0

    def __iter__(self) -> Iterator[int]:
        start, self.start = self.start, 0
        return itertools.islice(super().__iter__(), start, None)


class Loader(DataLoader):
    """A loader that resumes in mid-epoch (Lightning calls `state_dict`, `load_state_dict`), and in which an exception
    from a worker stays the one sentence that it was."""

    given = 0  # batches of this epoch handed out

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.given = self.sampler.start // self.batch_size  # type: ignore[attr-defined, operator]
        for batch in super().__iter__():
            if isinstance(batch, Exception):
                raise batch
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.given % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sampler.start = state["batches"] * self.batch_size  # type: ignore[attr-defined, operator]


def _collate(transform: Transform, batch: Batch | Exception) -> Batch | Exception:
    return batch if isinstance(batch, Exception) else transform(batch)


def _shuffled(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def _range(text: str, count: int) -> Tensor:
    match = re.fullmatch(r"(\d+):(\d+)", text)
    first, stop = map(int, match.groups()) if match else (0, 0)
    if not first < stop <= count:
        raise ValueError(f"train_range must be first:stop within 0:{count}, got {text!r}")
    return torch.arange(first, stop)
