"""A prior's weights in fewer bits, on disk: bfloat16, int8 by rows, nf4 by blocks; and what that changes.

The network computes in float32 again once it is loaded: what is saved is disk, not memory.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .guidance import Guidance, Prior, combine, rungs
from .model import Condition, DiffusionModel, with_network
from .noise import add_noise, data_scale, like
from .planning import evaluate, plan, sources

PRECISIONS = ("bfloat16", "int8", "nf4")
BLOCK = 64
"""Weights that share a scale in nf4."""
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The quantiles of a normal in [-1, 1] (Dettmers et al. 2023, arXiv 2305.14314, appendix E)."""


def encode(state: Mapping[str, Tensor], precision: str) -> dict[str, Tensor]:
    """The tensors as they are stored: matrices and kernels in fewer bits, the rest as it is.

    What `decode` gives is encoded to itself again, bit for bit. In bfloat16 names stay, so that diffusers reads the
    file; otherwise NAME.int8 (rows, ...) and NAME.scale (rows,), or NAME.nf4, two weights a byte, NAME.scale (blocks,)
    and NAME.shape. ValueError for another precision, or for weights that are not finite float32.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"a prior's precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    stored: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(f"only float32 weights are rounded to {precision}, {name} is {tensor.dtype}")
        if not tensor.is_floating_point() or tensor.ndim < 2:
            stored[name] = tensor
        elif not tensor.isfinite().all():
            raise ValueError(f"{name} holds weights that are not finite")
        elif precision == "bfloat16":
            stored[name] = tensor.bfloat16()
        elif precision == "int8":
            rows = tensor.flatten(1)
            scale = _exact(rows.abs().amax(1) / 127)
            stored[f"{name}.int8"] = (rows / scale[:, None]).round().to(torch.int8).reshape(tensor.shape)
            stored[f"{name}.scale"] = scale
        else:
            stored |= {f"{name}.{part}": value for part, value in _nf4(tensor).items()}
    return stored


def _exact(scale: Tensor) -> Tensor:
    """Rounded up to 17 significant bits, so that its products with 7 bits are exact; 1 where it is 0."""
    bits = scale.view(torch.int32)
    return torch.where(scale > 0, ((bits + 127) & ~127).view(torch.float32), 1.0)


def _nf4(tensor: Tensor) -> dict[str, Tensor]:
    flat = tensor.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1)
    levels = torch.tensor(NF4)
    between = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / scale.clamp(min=torch.finfo().tiny)[:, None], between).to(torch.uint8).flatten()
    return {"nf4": codes[::2] * 16 + codes[1::2], "scale": scale, "shape": torch.tensor(tensor.shape)}


def decode(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's tensors, in float32, from those that `encode` made."""
    state = {}
    for name, tensor in stored.items():
        name, _, kind = name.rpartition(".")
        if kind == "int8":
            scale = stored[f"{name}.scale"]
            state[name] = tensor.float() * scale.view(-1, *[1] * (tensor.ndim - 1))
        elif kind == "nf4":
            codes = torch.stack([tensor >> 4, tensor & 15], 1).long()
            shape = stored[f"{name}.shape"].tolist()
            blocks = torch.tensor(NF4)[codes].view(-1, BLOCK) * stored[f"{name}.scale"][:, None]
            state[name] = blocks.flatten()[: torch.Size(shape).numel()].view(shape)
        elif not (kind in ("scale", "shape") and stored.keys() & {f"{name}.int8", f"{name}.nf4"}):
            whole = f"{name}.{kind}" if name else kind
            state[whole] = tensor.float() if tensor.is_floating_point() else tensor
    return state


def at_precision(prior: Prior, precision: str) -> Prior:
    """The prior with its network's weights rounded as `encode` stores them, in a copy. ValueError as `encode`, and
    where the prior is the model itself, whose weights are not stored twice."""
    if prior.model is prior.onto:
        raise ValueError("the prior is the fine-tuned network itself: it is not stored again, at any precision")
    network = copy.deepcopy(prior.model.network)
    network.load_state_dict(decode(encode(network.state_dict(), precision)))
    return replace(prior, model=with_network(prior.model, network))


@torch.no_grad()
def guided_change(
    model: DiffusionModel, before: Guidance, after: Guidance, x_0: Tensor, condition: Condition, levels: int = 5
) -> dict[str, Any]:
    """How far the guided prediction moves from `before` to `after`, which differ in their priors alone.

    x_0 (B, *shape) and its condition, noised by one fixed draw at `levels` times spread evenly over the model's path.
    As JSON: times, and at each the root mean square of the difference over that of the prediction; their mean.
    """
    times = model.path.draw((torch.arange(levels, dtype=torch.float64) + 0.5) / levels).double()
    generator = torch.Generator().manual_seed(0)
    changes = []
    for time in times:
        t = time.expand(len(x_0))
        eps = torch.randn(x_0.shape, generator=generator).to(x_0)
        x_t = add_noise(like(data_scale(model.path, t), x_0) * x_0, eps, *model.path.coefficients(t))
        old, new = _guided(model, [before, after], x_t, t, condition)
        size = old.square().mean().clamp(min=torch.finfo(old.dtype).tiny)  # fresh networks may predict zero
        changes.append(((new - old).square().mean() / size).sqrt().item())
    return {"times": times.tolist(), "relative_rms": changes, "mean_relative_rms": sum(changes) / len(changes)}


def _guided(
    model: DiffusionModel, guidances: Sequence[Guidance], x_t: Tensor, t: Tensor, condition: Condition
) -> list[Tensor]:
    """Every candidate's guided prediction, at its own scales wherever t lies."""
    needed = [sources(guidance, guidance.scales) for guidance in guidances]
    calls = plan(model, condition, len(t), guidances, needed)
    predictions, _ = evaluate(calls, x_t.expand(len(guidances), *x_t.shape), t, guidances, None)
    guided = []
    for g, guidance in enumerate(guidances):
        used, between = rungs(guidance.scales)
        guided.append(combine(guidance, [predictions[g, k] for k in used], between, guidance.make_guider()))
    return guided
