"""In which batches pictures are shown, which follows from (seed, epoch), and a loader that resumes in mid-epoch."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from .tasks import Transform


class Order(DistributedSampler):
    """This process's batches, as lists of rows. Each epoch's follow from (seed, epoch) alone.

    size: rows of a batch on each of `world` processes.
    shuffle: for training, whose last partial batch is dropped. Otherwise it is kept, and padded by repeats until each
        process has equally many.
    groups (N,): if given, every batch is of rows of one group, the same one on all processes. The last batch of a group
        is smaller rather than dropped, since a rare group would never be seen; it is padded by repeats until each
        process has equally many, as many as `world` - 1.
    start: how many batches the next iteration leaves out.
    """

    start = 0

    def __init__(
        self, data: Any, size: int, world: int, rank: int, shuffle: bool, seed: int, groups: Tensor | None = None
    ):
        super().__init__(data, world, rank, shuffle=shuffle, seed=seed, drop_last=shuffle)
        self.size, self.groups = size, groups

    def __len__(self) -> int:
        if self.groups is not None:
            return sum(-(-count // (self.size * self.num_replicas)) for count in self.groups.bincount().tolist())
        return self.num_samples // self.size if self.drop_last else -(-self.num_samples // self.size)

    def __iter__(self) -> Iterator[list[Any]]:
        start, self.start = self.start, 0  # once the first batch is asked for: loaders make iterators that they drop
        batches = self._alike() if self.groups is None else self._of_groups(self.groups)
        yield from map(self.ask, batches[start : len(self)])

    def ask(self, rows: list[int]) -> list[Any]:
        """What the data set is asked for."""
        return rows

    def _alike(self) -> list[list[int]]:
        rows = list(super().__iter__())
        return [rows[i : i + self.size] for i in range(0, len(rows), self.size)]

    def _of_groups(self, groups: Tensor) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        shuffled, world = torch.randperm(len(groups), generator=generator), self.num_replicas
        batches: list[Tensor] = []
        for group in groups.unique():
            rows = shuffled[groups[shuffled] == group]
            even = torch.arange(-(-len(rows) // world) * world) % len(rows)
            batches += rows[even].split(self.size * world)
        order = torch.randperm(len(batches), generator=generator).tolist()
        return [batches[number][self.rank :: world].tolist() for number in order]


class EpochOrder(Order):
    """Asks for (epoch, row): the loader's workers outlive an epoch, and learn of the next one in no other way."""

    def ask(self, rows: list[int]) -> list[tuple[int, int]]:
        return [(self.epoch, row) for row in rows]


class Batches(Dataset):
    """A data set by whole batches, which the transform has made those of the task."""

    def __init__(self, data: Any, transform: Transform):
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, asked: Sequence[Any]) -> Any:
        batch = self.data.__getitems__(asked)
        return batch if isinstance(batch, Exception) else self.transform(batch)


class Loader(DataLoader):
    """A loader of `Batches` in an `Order` that resumes in mid-epoch (Lightning calls `state_dict`, `load_state_dict`),
    and in which an exception from a worker stays the one sentence that it was."""

    given = 0  # batches of this epoch handed out
    follows: Mapping[str, Any] = {}  # what else its batches follow from, by the config's keys

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.given = self.sampler.start  # type: ignore[attr-defined]
        for batch in super().__iter__():
            if isinstance(batch, Exception):
                raise batch
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.given % len(self), "follows": self._follows()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The first process says where the batches are not those that would have come."""
        self.sampler.start = state["batches"]  # type: ignore[attr-defined]
        was, now = state.get("follows", {}), self._follows()
        others = [f"{name} {was[name]}, now {now[name]}" for name in now if name in was and was[name] != now[name]]
        if others and self.sampler.rank == 0:  # type: ignore[attr-defined]
            print(
                f"warning: the checkpoint was made with {'; '.join(others)}: batches are others from here on",
                flush=True,
            )

    def _follows(self) -> dict[str, Any]:
        order: Any = self.sampler
        return {"train_batch_size": order.size, "processes": order.num_replicas, "seed": order.seed, **self.follows}
