"""Which network evaluations a step needs, and their predictions: rungs that share a network share a batch.

So do a network and itself without its adapter.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .adapter_rows import Unadapted
from .guidance import Guidance, Prior, Scales, rungs
from .machine import row_major
from .model import Condition, DiffusionModel, keep_only

Slots = dict[tuple[int, int], Tensor]
"""Tensors (B, *shape) by candidate and rung."""
OWN = -1
"""In place of a rung: the model's own unconditional prediction, where a prior is mixed with it."""


@dataclass
class Call:
    """One network's share of a step: the rungs of candidates that it evaluates, in one batch.

    slots: (candidate, rung, the prior that the rung is read through). condition: parts of (len(slots) B, ...).
    base: for each slot, whether its rows go without the network's adapter, as `unadapted` makes them.
    """

    model: DiffusionModel
    slots: list[tuple[int, int, Prior | None]]
    condition: Condition
    base: list[bool]
    unadapted: Unadapted | None = None

    def predict(self, x: Tensor, t: Tensor, part: slice) -> tuple[Tensor, Tensor | None]:
        """The network's outputs for a part of the call's rows, B to a slot."""
        off = [base for base in self.base for _ in range(len(x) // len(self.slots))][part]
        rows = {name: value[part] for name, value in self.condition.items()}
        with self.unadapted.rows(off) if self.unadapted and any(off) else nullcontext():
            return self.model.denoise_with_variance(x[part], t[part], rows)


def sources(guidance: Guidance, scales: Scales) -> list[int]:
    """The predictions that one candidate needs at these scales: rungs, and OWN."""
    used = rungs(scales)[0]
    return [OWN, *used] if used[0] == 0 and guidance.prior is not None and guidance.mix < 1 else used


def asked(guidance: Guidance, timesteps: Sequence[float]) -> list[list[int]]:
    """The predictions that one candidate asks networks for, step by step: its sources, without p_0 where the last
    difference is taken again (`Guidance.refresh`)."""
    found, guided = [], 0
    for t in timesteps:
        scales = guidance.scales_at(float(t))
        used, needed = rungs(scales)[0], sources(guidance, scales)
        if used[0] == 0 and len(used) > 1:
            needed = used[1:] if guided % guidance.refresh else needed
            guided += 1
        found.append(needed)
    return found


def evaluations(guidance: Guidance, timesteps: Sequence[float]) -> int:
    """Network evaluations of one sample along `timesteps`."""
    return sum(map(len, asked(guidance, timesteps)))


def plan(
    model: DiffusionModel,
    condition: Condition,
    batch: int,
    guidances: Sequence[Guidance],
    needed: Sequence[Sequence[int]],
) -> list[Call]:
    """The network evaluations of a step, one call per network. needed: what each candidate asks for, see `sources`."""
    calls: dict[int, Call] = {}
    conditions: dict[int, list[Condition]] = {}
    own, cache = Prior(model, model), dict[Any, Condition]()
    for i, (guidance, predictions) in enumerate(zip(guidances, needed, strict=True)):
        for k in predictions:
            prior = None if k > 0 else own if k == OWN or guidance.prior is None else guidance.prior
            key: Any = prior or k
            if key not in cache:
                cache[key] = (
                    prior.condition(condition, batch)
                    if prior
                    else keep_only(model, condition, model.ladder[k - 1], batch)
                )
            network = prior.model if prior else model
            apart = network.network
            shared = apart if isinstance(apart, Unadapted) and apart.network is model.network else None
            network = model if shared else network
            call = calls.setdefault(id(network), Call(network, [], {}, []))
            call.unadapted = call.unadapted or shared
            call.slots.append((i, k, prior))
            call.base.append(shared is not None)
            conditions.setdefault(id(call), []).append(cache[key])
    for call in calls.values():
        parts = conditions[id(call)]
        call.condition = {part: row_major(torch.cat([condition[part] for condition in parts])) for part in parts[0]}
    return list(calls.values())


def evaluate(
    calls: Sequence[Call], x_t: Tensor, t: Tensor, guidances: Sequence[Guidance], max_batch: int | None
) -> tuple[Slots, Slots]:
    """Predictions in the model's own terms, and learned variances where there are any, in float32.

    x_t (G, B, *shape), t (B,) float64 on the CPU. A mixed prior is (1 - mix) own + mix prior (see Guidance).
    """
    batch = len(t)
    predictions: Slots = {}
    variances: Slots = {}
    for call in calls:
        located = [prior.locate(x_t[g], t) if prior else (x_t[g], t) for g, _, prior in call.slots]
        x = torch.cat([x for x, _ in located]).to(device_and_dtype(call.model)[1])
        times = torch.cat([t for _, t in located]).to(x.device, torch.float32)
        rows = max_batch or len(x)
        outs = [call.predict(x, times, slice(i, i + rows)) for i in range(0, len(x), rows)]
        out = torch.cat([prediction for prediction, _ in outs]).float()
        for (g, k, prior), prediction in zip(call.slots, out.split(batch), strict=True):
            predictions[g, k] = prior.express(prediction, x_t[g], t) if prior else prediction
        learned = [variance for _, variance in outs if variance is not None]
        if learned:
            slots = [(g, k) for g, k, _ in call.slots]
            variances |= dict(zip(slots, torch.cat(learned).float().split(batch), strict=True))
    for g, guidance in enumerate(guidances):
        if (own := predictions.pop((g, OWN), None)) is not None:
            predictions[g, 0] = torch.lerp(own, predictions[g, 0], guidance.mix)
    return predictions, variances


def device_and_dtype(model: DiffusionModel) -> tuple[torch.device, torch.dtype]:
    """Where a model's network lives, and what it computes in."""
    parameter = next((p for p in model.network.parameters() if p.is_floating_point()), torch.empty(0))
    # What diffusers' networks compute in; their parameters may be stored in less.
    dtype = getattr(model.network, "dtype", parameter.dtype)
    return parameter.device, dtype if isinstance(dtype, torch.dtype) else parameter.dtype
