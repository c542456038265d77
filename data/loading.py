"""What the data modules of pictures share: splits, what is drawn at random, loaders."""

import atexit
import hashlib
import multiprocessing
import random
import signal
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .buckets import Buckets, describe, nearest
from .cache import Cache, Encoded, Key
from .orders import Batches, EpochOrder, Loader, Order
from .sources import Images
from .tasks import Batch, Transform

FINGERPRINTED = 32


class Splits(NamedTuple):
    train: Images
    held: Images
    class_names: tuple[str, ...]


class PictureData(LightningDataModule, ABC):
    """Training and validation pictures from one source; each data module says what `_open` reads.

    The options are those of `LabelledImages`; `transform` makes the batches of the source those of the task. `buckets`
    need the `resolution` of the source, whose pictures tell their `sides`, or are squares.
    """

    center_crop, random_flip = True, False
    other: str | None = None  # the batch key of each row's other picture, if any, which is cut as the first one is
    train_range: str | None = None

    def __init__(
        self,
        train_batch_size: int,
        max_train_samples: int | None,
        max_val_samples: int | None,
        val_fraction: float,
        seed: int,
        num_workers: int,
        transform: Transform = dict,
        cache: Cache | None = None,
        buckets: Buckets | None = None,
        resolution: int = 0,
    ):
        super().__init__()
        for name, value in (("max_train_samples", max_train_samples), ("max_val_samples", max_val_samples)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, got {val_fraction}")
        self.train_batch_size, self.seed, self.num_workers = train_batch_size, seed, num_workers
        self.max_train_samples, self.max_val_samples = max_train_samples, max_val_samples
        self.val_fraction, self.transform, self.cache = val_fraction, transform, cache
        self.buckets, self.sizes = buckets, buckets.sizes(resolution) if buckets else []
        self.resolution: Any = resolution

    @abstractmethod
    def _open(self) -> tuple[Images, Images | None, tuple[str, ...]]:
        """(training pictures, validation pictures or None, class names). ValueError for a bad source."""

    @cached_property
    def splits(self) -> Splits:
        """The chosen pictures, without the transform; opened on first use."""
        train, held, names = self._open()
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

    def prepare_data(self) -> None:
        self._open()  # one process per machine downloads; the others find it done

    def setup(self, stage: str | None = None) -> None:
        _ = self.splits
        if stage == "fit" and self.trainer is not None:  # a comparison outside a trainer reads no headers
            _ = self.groups  # by all processes at once

    @cached_property
    def groups(self) -> Tensor | None:
        """Which of `sizes` each training picture is cut to (N,); None without buckets.

        The first process reads the pictures' headers, and tells the others: a file that one process alone cannot read
        for a moment must not give it an order of its own.
        """
        if self.buckets is None:
            return None
        groups, first = None, self.trainer is None or self.trainer.is_global_zero
        if first:
            pictures = self.splits.train
            sides = pictures.sides() if hasattr(pictures, "sides") else torch.ones(len(pictures), 2)
            others = pictures.sides(self.other) if self.other and hasattr(pictures, "sides") else sides
            groups = nearest(sides, self.sizes)
            print(describe(groups, self.sizes, sides, others), flush=True)
        return groups if self.trainer is None else self.trainer.strategy.broadcast(groups)

    def train_dataloader(self) -> Loader:
        """Shuffled, and what is random drawn by (seed, epoch); divided among the devices, the last partial batch
        dropped, or with buckets made smaller. With a cache, its samples, in the same order."""
        if self.cache is not None:
            return self._loader(self.encoded(), EpochOrder, shuffle=True, transform=dict)
        return self._loader(*self.training(), shuffle=True)

    def training(self) -> tuple[Any, type[Order]]:
        """The training pictures, and the order that asks for them: one that names the epoch where a draw follows from
        it."""
        pictures: Any = self.splits.train
        groups = self.groups
        if groups is not None and groups.any():
            pictures = pictures.cut_to(self.sizes, groups)
        if self.center_crop and not self.random_flip:
            return pictures, Order
        return Augmented(pictures, self.seed, self.center_crop, self.random_flip), EpochOrder

    def encoded(self) -> Encoded:
        """The cache's samples, there or not yet. ValueError where it would hold the same draws several times."""
        assert self.cache is not None
        if self.cache.variants > 1 and self.training()[1] is Order:
            raise ValueError(
                f"nothing of these data is drawn at random: set cache.variants to 1, not {self.cache.variants}"
            )
        alike = torch.zeros(len(self.splits.train), dtype=torch.long)
        return Encoded(self.cache, alike if self.groups is None else self.groups)

    def to_encode(self, keys: Sequence[Sequence[Key]]) -> DataLoader:
        """Training batches as the model encodes them, of these samples each."""
        pictures, order = self.training()
        wanted = keys if order is EpochOrder else [[row for _, row in batch] for batch in keys]
        return DataLoader(
            Batches(pictures, self.transform),
            batch_size=None,
            sampler=wanted,
            num_workers=self._workers(),
            worker_init_fn=_leave_sigterm,
            generator=torch.Generator().manual_seed(0),
        )

    def val_dataloader(self) -> Loader:
        return self._loader(self.splits.held, Order, shuffle=False)

    def held_out(self, n: int, offset: int = 0) -> Batch:
        """Validation pictures offset .. offset + n - 1, in their fixed order, transformed. Draws nothing at random."""
        if not (n >= 1 and 0 <= offset <= len(self.splits.held) - n):
            raise ValueError(f"there are {len(self.splits.held)} validation pictures, got n = {n}, offset = {offset}")
        return self.transform(self.splits.held.__getitems__(range(offset, offset + n)))

    def reference(self, n: int, offset: int = 0) -> Tensor:
        """Real validation pictures (n, C, H, W) in [0, 1], as the transform makes them: what samples should be like."""
        return self.held_out(n, offset)["pixels"]

    def fingerprint(self) -> dict[str, Any]:
        """What tells this data from other data, as JSON: the rows of either split, and the SHA-256 of FINGERPRINTED of
        each, evenly spread, as they are before transform and augmentation."""
        digest = hashlib.sha256()
        for rows in (self.splits.train, self.splits.held):
            spread = torch.linspace(0, len(rows) - 1, min(len(rows), FINGERPRINTED)).round().long()
            batch = rows.__getitems__(spread.tolist())
            if isinstance(batch, Exception):
                raise batch
            for name, value in sorted(batch.items()):
                held = value.contiguous().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()
                digest.update(name.encode() + held)
        return {"train": len(self.splits.train), "held_out": len(self.splits.held), "sha256": digest.hexdigest()}

    def settings(self) -> dict[str, Any]:
        """The options that training samples may follow from, by their keys, as JSON: to say why they are others."""
        names = ("resolution", "center_crop", "random_flip", "seed", "max_train_samples", "val_fraction", "train_range")
        return {name: getattr(self, name) for name in names} | {"buckets": self.buckets and str(self.buckets)}

    def _workers(self) -> int:
        return self.num_workers if getattr(self.splits.train, "decodes", False) else 0

    def _loader(self, images: Any, order: type[Order], shuffle: bool, transform: Transform | None = None) -> Loader:
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        workers, groups = self._workers(), self.groups if shuffle else None
        sampler = order(images, self.train_batch_size, world, rank, shuffle=shuffle, seed=self.seed, groups=groups)
        if not len(sampler):
            raise ValueError(
                f"train_batch_size must be at most the training pictures of a device ({sampler.num_samples}), "
                f"got {self.train_batch_size}"
            )
        loader = Loader(
            Batches(images, transform or self.transform),
            batch_size=None,  # whole batches are asked for
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_leave_sigterm,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),  # else each epoch draws from the global generator
        )
        loader.follows = {"buckets": self.buckets and str(self.buckets)}
        return loader


def _leave_sigterm(_: int) -> None:
    """A signal to the whole process group is the run's to answer: a worker that died of it would end the run badly."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Python sends SIGTERM to the workers of loaders that are left at its end, and would wait for them forever."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


class Augmented(Dataset):
    """Pictures asked for by (epoch, index), which with `seed` say whether they are flipped and where they are cut out;
    all pictures of a row alike."""

    def __init__(self, pictures: Any, seed: int, center_crop: bool, random_flip: bool):
        self.pictures, self.seed, self.center_crop, self.random_flip = pictures, seed, center_crop, random_flip

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitems__(self, asked: Sequence[tuple[int, int]]) -> Any:
        draws = [random.Random(f"{self.seed} {epoch} {index}") for epoch, index in asked]
        flip = torch.tensor([self.random_flip and draw.random() < 0.5 for draw in draws])
        places = None if self.center_crop else [(draw.random(), draw.random()) for draw in draws]
        indices = [index for _, index in asked]
        batch = self.pictures.__getitems__(indices) if places is None else self.pictures.__getitems__(indices, places)
        if not isinstance(batch, Exception):
            for name in {"pixels", "image"} & batch.keys():
                batch[name][flip] = batch[name][flip].flip(-1)
        return batch


def _shuffled(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))
