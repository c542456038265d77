"""What a training step draws and minimises: condition drop-out, times, the weight of the loss, a learned variance's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..sample.model import Condition
from ..sample.noise import DiscretePath, Prediction, like, split, weights

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


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's global generators on the CPU and the device, all that training draws from, as bytes."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device.type).get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Takes back a `random_state`, as far as it is of devices that are here."""
    torch.set_rng_state(state["cpu"])
    if device.type in state and device.type != "cpu":
        torch.get_device_module(device.type).set_rng_state(state[device.type])


def min_snr_weight(prediction: Prediction, alpha: Tensor, sigma: Tensor, gamma: float) -> Tensor:
    """The weight (B,) that makes a prediction's squared error min(SNR, gamma) times that of x_0.

    Hang et al. 2023 (arXiv 2303.09556, sec. 3.4), for every prediction at once: an error e of the prediction is one of
    (sigma / (alpha b - sigma a)) e in x_0.
    """
    a, b = weights(prediction, alpha, sigma)
    snr = (alpha / sigma) ** 2
    return snr.clamp(max=gamma) * (sigma / (alpha * b - sigma * a)) ** 2


def variational_bound(
    path: DiscretePath, prediction: Prediction, out: Tensor, v: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """The variational bound's term at whole t (B,), in bits per dimension (B,): what a learned variance is trained by.

    out, v: the prediction at x_t and the learned range, each (B, *shape). The variance is beta_t^u beta~_t^(1 - u) with
    u = (v + 1) / 2, and the mean takes no gradient (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 15, sec. 3.1). Above
    t = 0: the divergence from the posterior q(x_{t-1} | x_t, x_0) (Ho et al. 2020, arXiv 2006.11239, eqs. 5 to 7).
    At t = 0: the likelihood of x_0 (eq. 13).
    """
    low, high, share = (like(c, x_0) for c in path.posterior(t))  # x_t's share is the same in both means
    guess, _ = split(prediction, out.detach(), x_t, *(like(c, x_0) for c in path.coefficients(t)))
    log_variance = low + (v + 1) / 2 * (high - low)
    off = share * (x_0 - guess)
    divergence = (log_variance - low + (low - log_variance).exp() + off**2 * (-log_variance).exp() - 1) / 2
    first = like(t == 0, x_0).bool()  # there the model's mean is its guess of x_0
    nats = torch.where(first, -_log_likelihood(x_0, guess, (log_variance / 2).exp()), divergence)
    return nats.flatten(1).mean(1) / math.log(2)


def _log_likelihood(x_0: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Of the levels that x_0 lies in, 2/255 wide on [-1, 1] with open ends (Ho et al. 2020, eq. 13)."""

    def below(edge: Tensor) -> Tensor:
        # The normal's CDF in Page's form (1977), by which the published networks were trained: its tails weigh here.
        z = (edge - mean) / deviation
        return torch.sigmoid(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))

    lower = torch.where(x_0 < -0.999, 0, below(x_0 - 1 / 255))
    upper = torch.where(x_0 > 0.999, 1, below(x_0 + 1 / 255))
    return (upper - lower).clamp(min=1e-12).log()
