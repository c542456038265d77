"""A scheduler's timesteps, and whether its noise levels there are the model's."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from .model import DiffusionModel
from .noise import log_snr


def set_timesteps(
    model: DiffusionModel, scheduler: Any, steps: int | None = None, timesteps: Sequence[float] | None = None
) -> None:
    """Sets the scheduler's timesteps, on the CPU: `steps` of its own choice, or `timesteps` where it takes them.

    ValueError unless one of the two is given, and unless the noise levels there are those of the model's path.
    """
    if (steps is None) == (timesteps is None):
        raise ValueError(f"give either steps or timesteps, got steps={steps}, timesteps={timesteps}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if timesteps is None:
        scheduler.set_timesteps(steps, device="cpu")
    elif "timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(timesteps=list(timesteps), device="cpu")
    else:
        raise ValueError(f"{type(scheduler).__name__} takes no timesteps of its own; give steps")
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else the second of two equal first timesteps, after rounding, is taken
    if hasattr(scheduler, "sigmas"):
        _check_levels(model, scheduler)


def _check_levels(model: DiffusionModel, scheduler: Any) -> None:
    """Options such as flow sigmas, or a shift of given timesteps, part a scheduler's levels from the model's."""
    name, t = type(scheduler).__name__, scheduler.timesteps.double()
    sigma = scheduler.sigmas[: len(t)]
    alpha = torch.ones_like(sigma) if hasattr(scheduler, "alphas_cumprod") else 1 - sigma
    drift = (model.path.time(log_snr(alpha.double(), sigma.double())) - t).abs().max()
    if not (drift <= 1 and sigma.isfinite().all() and (t.diff() <= 0).all()):  # one unit of t: they round
        raise ValueError(
            f"{name}'s noise levels are not those of the model's path at its timesteps, or do not fall from a finite "
            "one; give falling timesteps within the path, and no option that shifts its sigmas"
        )
    if name == "EulerAncestralDiscreteScheduler":
        up = (sigma[1:] ** 2 * (sigma[:-1] ** 2 - sigma[1:] ** 2) / sigma[:-1] ** 2) ** 0.5
        if (sigma[1:] ** 2 < up**2).any():  # its own float32 formula would take this difference's root
            raise ValueError(f"{name} cannot take {len(t)} steps here, one of them is too long; take more")
