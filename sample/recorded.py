"""A batch of pictures with all that decides their bits, and the same batch sampled again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .guidance import Guidance
from .loop import Sampler, trajectories
from .machine import device_name, environment, reproducible
from .model import Condition, DiffusionModel


@dataclass(frozen=True, eq=False)
class Recorded:
    """A batch of pictures, with all that decides their bits; `Recorded.draw` makes it.

    condition: parts of (B, ...). seeds: B of them. pictures: float32 pixels (B, C, H, W) in [0, 1].
    max_batch: as in `trajectories`. threads: torch's. device: its type, or the GPU's name.
    """

    condition: Condition
    seeds: tuple[int, ...]
    pictures: Tensor
    max_batch: int | None
    threads: int
    device: str

    @classmethod
    def draw(
        cls,
        model: DiffusionModel,
        condition: Condition,
        seeds: Sequence[int],
        guidance: Guidance,
        sampler: Sampler,
        max_batch: int | None = None,
    ) -> "Recorded":
        """Samples the batch on its own, as `Bundle.replay` will. ValueError unless the networks are in eval mode."""
        models = {model, guidance.prior.model if guidance.prior else model}
        for network in models:
            if any(module.training for module in network.modules()):
                raise ValueError(f"{type(network).__name__} is in train mode; call eval() on it before recording")
        with reproducible(*models):
            made = pictures(model, condition, seeds, guidance, sampler, sampler.make(model), max_batch).cpu()
        return cls(condition, tuple(seeds), made, max_batch, torch.get_num_threads(), device_name(device_of(model)))

    def about(self) -> dict[str, Any]:
        return {"batch": len(self.seeds), "max_batch": self.max_batch, "threads": self.threads, "device": self.device}


@dataclass(frozen=True, eq=False)
class Replay:
    """A recorded batch sampled again: `identical` is bit for bit; `changes` names what the machine has other than
    then, as {name: (then, now)}.

    reproduced: whether these are the recorded pictures: bit for bit, or within 1e-4 where something has changed. With a
    GPU, then or now, whose kernels need not add in one order, within 1e-3 of 1 on the average of each picture, half of
    what 8 bits round by.
    """

    pictures: Tensor
    identical: bool
    reproduced: bool
    max_abs_difference: float
    changes: dict[str, tuple[Any, Any]]

    @classmethod
    def beside(cls, then: Recorded, pictures: Tensor, environment_then: Mapping[str, Any], device: str) -> "Replay":
        """The pictures, sampled now on `device`, beside those of then and there."""
        before, now = {**environment_then, "device": then.device}, {**environment(), "device": device}
        changes = {name: (before[name], now.get(name)) for name in before if before[name] != now.get(name)}
        difference, identical = (pictures - then.pictures).abs().flatten(1), torch.equal(pictures, then.pictures)
        most, mean = difference.max().item(), difference.mean(1).max().item()
        near = mean <= 1e-3 if {then.device, device} != {"cpu"} else most <= 1e-4 and bool(changes)
        return cls(pictures, identical, identical or near, most, changes)


def pictures(
    model: DiffusionModel,
    condition: Condition,
    seeds: Sequence[int],
    guidance: Guidance,
    sampler: Sampler,
    scheduler: Any,
    max_batch: int | None,
) -> Tensor:
    """Pixels (B, C, H, W) in [0, 1] of seeds and conditions, guided so."""
    device = device_of(model)
    condition = {name: part.to(device) for name, part in condition.items()}
    options: dict[str, Any] = {"steps": sampler.steps, "eta": sampler.eta, "max_batch": max_batch}
    x_0 = trajectories(model, condition, seeds, [guidance], scheduler=scheduler, **options)[0]
    with torch.no_grad():
        return model.decode(x_0).float()


def device_of(model: DiffusionModel) -> torch.device:
    return next((parameter.device for parameter in model.network.parameters()), torch.device("cpu"))
