"""What a training step draws and minimises: condition drop-out, times, and the weight of the loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..sample.model import Condition
from ..sample.noise import Prediction, weights

Density = Literal["uniform", "logit_normal", "mode"]


@dataclass(frozen=True)
class Drop:
    """One event of the drop-out table: these condition parts are replaced by their null, with this probability."""

    parts: tuple[str, ...]
    probability: float


def check_table(table: Sequence[Drop], droppable: frozenset[str]) -> None:
    """ValueError unless the events are disjoint probabilities of parts that the model has."""
    total = sum(event.probability for event in table)
    if any(event.probability < 0 for event in table) or total > 1 + 1e-9:
        raise ValueError(f"drop-out probabilities must be at least 0 and sum to at most 1, got a sum of {total}")
    for event in table:
        if unknown := set(event.parts) - droppable:
            raise ValueError(f"drop-out names {sorted(unknown)}, but the model's parts are {sorted(droppable)}")


def drop(condition: Condition, null: Condition, table: Sequence[Drop], u: Tensor) -> Condition:
    """The condition with parts replaced by their null, as the table's events say.

    One draw u (B,), uniform on [0, 1), decides for each sample: event i happens where the probabilities before it
    sum to at most u and those up to it to more. The order is part of the contract: [text .05, text+image .05,
    image .05] is the scheme of InstructPix2Pix and Zero-1-to-3, [label .1] that of DiT.
    """
    parts = dict(condition)
    low = 0.0
    for event in table:
        happens = (low <= u) & (u < low + event.probability)
        low += event.probability
        for name in event.parts:
            mask = happens.reshape(-1, *[1] * (parts[name].ndim - 1))
            parts[name] = torch.where(mask, null[name].to(parts[name].dtype), parts[name])
    return parts


def draw_uniform(density: Density, batch: int, device: torch.device) -> Tensor:
    """u (B,) in [0, 1] for `path.draw`: uniform, or SD3's logit-normal or mode density (arXiv 2403.03206, sec. 3.1)."""
    if density == "uniform":
        return torch.rand(batch, device=device)
    from diffusers.training_utils import compute_density_for_timestep_sampling

    return compute_density_for_timestep_sampling(
        density, batch, logit_mean=0.0, logit_std=1.0, mode_scale=1.29, device=device
    )


def min_snr_weight(prediction: Prediction, alpha: Tensor, sigma: Tensor, gamma: float) -> Tensor:
    """The weight (B,) that makes a prediction's squared error min(SNR, gamma) times that of x_0.

    Hang et al. 2023 (arXiv 2303.09556, sec. 3.4), for every prediction at once: an error e of the prediction is one of
    (sigma / (alpha b - sigma a)) e in x_0.
    """
    a, b = weights(prediction, alpha, sigma)
    snr = (alpha / sigma) ** 2
    return snr.clamp(max=gamma) * (sigma / (alpha * b - sigma * a)) ** 2
