"""Guidance of a LoRA by itself, by its base in one batch, and by a second network: a section of step.py."""

from collections.abc import Callable
from functools import partial

import torch
from narrow import BATCH, apart, edited, given, in_turns

from priorguide.sample.candidates import Candidate
from priorguide.sample.guidance import Guidance, unconditional
from priorguide.sample.loop import Sampler, trajectories
from priorguide.train.adapters import Lora, adapter_of
from priorguide.train.fine_tune import FineTune

WAYS = ("self, adapter unmerged", "base, the adapter off, one batch", "base, a second network beside the adapter",
        "self, adapter merged", "base, a second network beside the merged one")  # fmt: skip


def guided(way: str, steps: int) -> Callable[[], object]:
    """A call that samples one batch."""
    model = edited().eval()
    second = edited().eval() if "second" in way else None
    FineTune(model, lora=Lora(), ema_decay=0)
    for name, parameter in model.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    if "merged" in way and "unmerged" not in way:
        model.network = adapter_of(model.network).merged()
    model.eval().network.requires_grad_(False)
    prior = unconditional(second, onto=model) if second else Candidate("base").bind(model) if "off" in way else None
    (batch,) = given(BATCH)
    condition = {name: batch[name] for name in ("image", "text")}
    scheduler = Sampler(steps=steps).make(model)
    guidance = [Guidance((1.5, 7.5), prior)]
    return lambda: trajectories(model, condition, range(BATCH), guidance, scheduler=scheduler, steps=steps)


def adapter(rounds: int) -> list[str]:
    peaks = {way: apart(partial(guided, way, 2)) for way in WAYS}  # first, while nothing is there to be used again
    seconds = in_turns({way: guided(way, 3) for way in WAYS}, rounds)
    first = WAYS[0]
    lines = ["| guidance with two scales | seconds, ratio | peak memory beside the first |", "|---|---|---|"]
    for way in WAYS:
        more = (peaks[way] - peaks[first]) / 2**20
        lines.append(f"| {way} | {seconds[way] / seconds[first]:.2f} | {more:+.0f} MiB |")
    size = sum(p.nbytes for p in edited().network.parameters()) / 2**20
    return [*lines, "", f"A network's own weights: {size:.0f} MiB."]
