"""The health of an unconditional prediction: how well each prior predicts held-out data, before it guides anything.

Guidance by a prior amplifies by (scale - 1) what fine-tuning moved. Where the base predicts the fine-tune's data worse
than the fine-tune's own null does, the data has left the base's domain, and the base tends to lose.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .distances import Estimate, mean
from .guidance import Prior
from .model import Condition, DiffusionModel
from .noise import add_noise, convert, data_scale, like, log_snr
from .planning import device_and_dtype


@dataclass(frozen=True)
class Health:
    """One prior's null prediction on held-out data, at several noise levels.

    log_snr: the levels, from the least noisy. loss: the mean squared error of epsilon at each. gap: the root mean
    square of its epsilon less the model's own. excess: the loss less the model's own, paired by picture and noise and
    averaged over the levels, as a share of the model's own loss; 0 for the model itself.
    """

    log_snr: tuple[float, ...]
    loss: tuple[float, ...]
    gap: tuple[float, ...]
    excess: Estimate

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def null_health(
    model: DiffusionModel,
    priors: Mapping[str, Prior | None],
    x_0: Tensor,
    condition: Condition,
    *,
    mix: Mapping[str, float] | None = None,
    levels: int = 10,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, Health]:
    """The health of every prior on x_0 (N, *shape), at `levels` times spread evenly over the path's own.

    priors: bound onto the model; None is the model itself. condition: of the same rows, for parts that are never
    dropped. mix: the share of a prior whose rest is the model's own null prediction, as it guides. Every prior sees the
    same noise, one draw per picture and level.
    """
    device, _ = device_and_dtype(model)
    bound = {name: prior or Prior(model, model) for name, prior in priors.items()}
    times = model.path.draw((torch.arange(levels, dtype=torch.float64) + 0.5) / levels).double()
    generator = torch.Generator().manual_seed(seed)
    losses: dict[str, list[Tensor]] = {name: [] for name in [*bound, ""]}
    gaps: dict[str, list[float]] = {name: [] for name in bound}
    for time in times:
        parts: dict[str, list[Tensor]] = {name: [] for name in losses}
        far: dict[str, list[Tensor]] = {name: [] for name in bound}
        for start in range(0, len(x_0), batch_size):
            clean = x_0[start : start + batch_size].to(device)
            eps = torch.randn(clean.shape, generator=generator).to(device)
            t = time.expand(len(clean))
            alpha, sigma = model.path.coefficients(t)
            x_t = add_noise(like(data_scale(model.path, t), clean) * clean, eps, alpha, sigma)
            rows = {name: part[start : start + batch_size].to(device) for name, part in condition.items()}
            own = _epsilon(Prior(model, model), x_t, t, rows)
            parts[""].append(_square(own - eps))
            for name, prior in bound.items():
                found = own if prior.model is model and not prior.keep else _epsilon(prior, x_t, t, rows)
                found = own.lerp(found, (mix or {}).get(name, 1.0))  # epsilon is affine in any prediction
                parts[name].append(_square(found - eps))
                far[name].append(_square(found - own))
        for name in losses:
            losses[name].append(torch.cat(parts[name]))
        for name in bound:
            gaps[name].append(torch.cat(far[name]).mean().sqrt().item())
    snr = log_snr(*model.path.coefficients(times)).tolist()
    own_loss = torch.stack(losses[""]).mean(0)  # (N,)
    health: dict[str, Health] = {}
    for name in bound:
        table = torch.stack(losses[name])  # (levels, N)
        difference = mean((table.mean(0) - own_loss).cpu())
        scale = own_loss.mean().item()
        excess = Estimate(difference.value / scale, difference.error / scale)
        health[name] = Health(tuple(snr), tuple(table.mean(1).tolist()), tuple(gaps[name]), excess)
    return health


def _epsilon(prior: Prior, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The prior's null prediction as epsilon, at the bound model's x_t and t."""
    model = prior.onto
    x, own_t = prior.locate(x_t, t)
    dtype = device_and_dtype(prior.model)[1]
    out = prior.model.denoise(x.to(dtype), own_t.to(x.device, torch.float32), prior.condition(condition, len(t)))
    out = prior.express(out.float(), x_t, t)
    alpha, sigma = (like(c, out) for c in model.path.coefficients(t))
    return convert(out, x_t, model.prediction, "epsilon", alpha, sigma)


def _square(difference: Tensor) -> Tensor:
    return difference.square().flatten(1).mean(1)


def in_words(name: str, health: Health, level: float = 1.96) -> str:
    """What a prior's health says of it, in one sentence."""
    value, error = health.excess.value, health.excess.error
    low, high = value - level * error, value + level * error
    ends = sorted((abs(low), abs(high)))
    interval = f"{100 * abs(value):.1f} % (95 % interval {100 * ends[0]:.1f} to {100 * ends[1]:.1f} %)"
    if not math.isfinite(value):
        return f"{name}: its null loss on held-out data is not finite."
    if low > 0:
        return (
            f"{name} predicts held-out data without a condition worse than the model's own null by {interval}: a sign "
            "that fine-tuning left its domain, where it tends to lose."
        )
    if high < 0:
        return f"{name} predicts held-out data without a condition better than the model's own null by {interval}."
    tie = f"{100 * low:+.1f} to {100 * high:+.1f} %"
    return f"{name} predicts held-out data without a condition as well as the model's own: {tie}."
