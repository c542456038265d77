"""What the data modules of pictures share: splits, orders, loaders that resume in mid-epoch."""

import hashlib
import itertools
import random
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from .cache import Cache, Encoded, Key
from .sources import Images
from .tasks import Batch, Transform

FINGERPRINTED = 32


class Splits(NamedTuple):
    train: Images
    held: Images
    class_names: tuple[str, ...]


class PictureData(LightningDataModule, ABC):
    """Training and validation pictures from one source; each data module says what `_open` reads.

    The options are those of `LabelledImages`; `transform` makes the batches of the source those of the task.
    """

    center_crop, random_flip = True, False

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

    def train_dataloader(self) -> "Loader":
        """Shuffled, and what is random drawn by (seed, epoch); divided among the devices, the last partial batch
        dropped. With a cache, its samples, in the same order."""
        if self.cache is not None:
            return self._loader(self.encoded(), EpochOrder, shuffle=True, transform=dict)
        return self._loader(*self.training(), shuffle=True)

    def training(self) -> tuple[Any, type["Order"]]:
        """The training pictures, and the order that asks for them: one that names the epoch where a draw follows from
        it."""
        if self.center_crop and not self.random_flip:
            return self.splits.train, Order
        return Augmented(self.splits.train, self.seed, self.center_crop, self.random_flip), EpochOrder

    def encoded(self) -> Encoded:
        """The cache's samples, there or not yet. ValueError where it would hold the same draws several times."""
        assert self.cache is not None
        if self.cache.variants > 1 and self.training()[1] is Order:
            raise ValueError(
                f"nothing of these data is drawn at random: set cache.variants to 1, not {self.cache.variants}"
            )
        return Encoded(self.cache, torch.zeros(len(self.splits.train), dtype=torch.long))

    def to_encode(self, keys: Sequence[Sequence[Key]]) -> DataLoader:
        """Training batches as the model encodes them, of these samples each."""
        pictures, order = self.training()
        wanted = keys if order is EpochOrder else [[row for _, row in batch] for batch in keys]
        return DataLoader(
            pictures,
            batch_sampler=wanted,  # type: ignore[arg-type]
            collate_fn=partial(_collate, self.transform),
            num_workers=self._workers(),
            worker_init_fn=_leave_sigterm,
            generator=torch.Generator().manual_seed(0),
        )

    def val_dataloader(self) -> "Loader":
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

    def _workers(self) -> int:
        return self.num_workers if getattr(self.splits.train, "decodes", False) else 0

    def _loader(self, images: Any, order: type["Order"], shuffle: bool, transform: Transform | None = None) -> "Loader":
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        workers = self._workers()
        sampler = order(images, world, rank, shuffle=shuffle, seed=self.seed, drop_last=shuffle)
        if shuffle and len(sampler) < self.train_batch_size:
            raise ValueError(
                f"train_batch_size must be at most the training pictures of a device ({len(sampler)}), "
                f"got {self.train_batch_size}"
            )
        return Loader(
            images,
            batch_size=self.train_batch_size,
            sampler=sampler,
            drop_last=shuffle,
            collate_fn=partial(_collate, transform or self.transform),
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_leave_sigterm,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),  # else each epoch draws from the global generator
        )


def _leave_sigterm(_: int) -> None:
    """A signal to the whole process group is the run's to answer: a worker that died of it would end the run badly."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Order(DistributedSampler):
    """Each epoch's order follows from (seed, epoch) alone. `start`: how many samples the next iteration leaves out."""

    start = 0

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        return itertools.islice(super().__iter__(), start, None)


class EpochOrder(Order):
    """Yields (epoch, index): the loader's workers outlive an epoch, and learn of the next one in no other way."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, index) for index in super().__iter__())


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
