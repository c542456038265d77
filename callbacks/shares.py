"""The held-out conditions of a comparison: enough of them, shared among ranks, encoded a few at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from ..sample.guidance import Arm
from ..sample.model import Condition, DiffusionModel


def check_enough(data: Any, conditions: int, reference: int) -> None:
    """ValueError unless the data hold out as many pictures as a comparison needs, where they say how many they do."""
    held = getattr(getattr(data, "splits", None), "held", None)
    if held is not None and len(held) < conditions + reference:
        raise ValueError(
            f"the comparison needs {conditions} held-out conditions (num_conditions) and {reference} others to compare "
            f"with (num_reference, where there is a metric network), the data hold out {len(held)}: lower these, or "
            "raise val_fraction"
        )


def share(n: int, rank: int, world: int) -> Tensor:
    """A rank's conditions, the same number on every rank; those past the end repeat the first."""
    return torch.arange(rank, rank + world * -(-n // world), world) % n


def encode(model: DiffusionModel, batch: dict[str, Any], size: int) -> Condition:
    """The batch's condition, encoded `size` rows at a time."""
    encoded = [model.encode_condition(chunk) for chunk in chunks(batch, size)]
    return {name: torch.cat([part[name] for part in encoded]) for name in encoded[0]}


def chunks(batch: dict[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """The batch, `size` rows at a time."""
    for start in range(0, len(next(iter(batch.values()))), size):
        yield {name: value[start : start + size] for name, value in batch.items()}


def rows(value: Any, rows: Tensor) -> Any:
    """The rows of a tensor or of a list, one per condition."""
    return value[rows] if isinstance(value, Tensor) else [value[row] for row in rows.tolist()]


def gather(pl_module: L.LightningModule, pictures: dict[Arm, Tensor], n: int, world: int) -> dict[Arm, Tensor]:
    """Every rank's share, put back in the order of the conditions; equal pictures stay one tensor."""
    gathered: dict[int, Tensor] = {}
    for mine in pictures.values():
        if id(mine) not in gathered:
            shares: Any = pl_module.all_gather(mine.to(pl_module.device))  # (world, share, C, H, W)
            gathered[id(mine)] = shares.transpose(0, 1).flatten(0, 1)[:n].cpu()
    return {arm: gathered[id(mine)] for arm, mine in pictures.items()}


def least(pl_module: L.LightningModule, number: int, world: int) -> int:
    """The least of all ranks' numbers."""
    if world == 1:
        return number
    numbers: Any = pl_module.all_gather(torch.tensor(number, device=pl_module.device))
    return int(numbers.min())


@contextmanager
def moved(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """The modules on the device, and back where they were."""
    homes = [next((p.device for p in module.parameters()), device) for module in modules]
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        for module, home in zip(modules, homes, strict=True):
            module.to(home)
