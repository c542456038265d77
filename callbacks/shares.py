"""The held-out conditions of a comparison: enough of them, shared among ranks, encoded a few at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from ..sample.evaluate import to_device
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


class Encoded:
    """A batch as a model's frozen encoders give it: every row encoded once, when it is first asked for, and kept on the
    CPU, whatever the weights of the network."""

    def __init__(self, batch: dict[str, Any]):
        self.batch = batch
        self._kept: dict[str, tuple[int, dict[str, Tensor]]] = {}

    def condition(self, model: DiffusionModel, n: int, size: int, device: torch.device) -> Condition:
        """The first n rows' condition, on the CPU; what is missing is encoded on the device, `size` rows at a time."""
        return self._first("condition", model.encode_condition, n, size, device)

    def x_0(self, model: DiffusionModel, n: int, size: int, device: torch.device) -> Tensor:
        """The first n rows' x_0 (n, *shape), likewise."""
        return self._first("x_0", lambda rows: {"x_0": model.encode_pixels(rows["pixels"])}, n, size, device)["x_0"]

    def _first(
        self, what: str, encode: Callable[[dict[str, Any]], dict[str, Tensor]], n: int, size: int, device: torch.device
    ) -> dict[str, Tensor]:
        done, kept = self._kept.get(what, (0, {}))
        parts = [kept] if done else []
        for start in range(done, n, size):
            chunk = {name: value[start : min(start + size, n)] for name, value in self.batch.items()}
            parts.append({name: part.cpu() for name, part in encode(to_device(chunk, device)).items()})
        if n > done:
            kept = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            self._kept[what] = n, kept
        return {name: part[:n] for name, part in kept.items()}


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
