"""A watch for guidance that goes too far: contrast, clipping, and the energy of the guided prediction.

Guidance pushes pictures past what the model learned; guidance by another network does so by (scale - 1) times all that
fine-tuning moved. Pictures then gain contrast, and their values crowd at black and white.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .guidance import Arm, Guidance
from .loop import Sampler, trajectories
from .model import Condition, DiffusionModel

EDGE = 1 / 255
CONTRAST, CLIPPED, ENERGY = 1.25, 0.1, 1.5
"""Beyond these an arm is warned of: its contrast against real pictures', the share of its values at black or white
beyond theirs, and its guided prediction's root mean square against the conditional one's."""


@dataclass(frozen=True)
class Saturation:
    """contrast: the pictures' mean standard deviation, over that of real ones. clipped: the share of values within
    1/255 of black or white, less that of real ones. energy: RMS of the guided over that of the conditional prediction,
    the mean over steps."""

    contrast: float
    clipped: float
    energy: float

    @property
    def too_far(self) -> bool:
        return self.contrast > CONTRAST or self.clipped > CLIPPED or self.energy > ENERGY

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "too_far": self.too_far}


def saturation(pictures: Tensor, real: Tensor, energy: float = 1.0) -> Saturation:
    """Of pictures (N, C, ...) beside real ones (M, C, ...), both in [0, 1]."""
    contrast = _contrast(pictures) / max(_contrast(real), 1e-6)
    return Saturation(contrast, _clipped(pictures) - _clipped(real), energy)


def _contrast(pictures: Tensor) -> float:
    return pictures.float().flatten(1).std(1).mean().item()


def _clipped(pictures: Tensor) -> float:
    return ((pictures < EDGE) | (pictures > 1 - EDGE)).float().mean().item()


def energies(
    model: DiffusionModel,
    condition: Condition,
    seeds: Sequence[int],
    candidates: Mapping[Arm, Guidance],
    sampler: Sampler,
) -> dict[Arm, float]:
    """How much larger each arm's guided prediction is than its conditional one: a ratio of root mean squares, the mean
    over the steps of one batch. 1 where there is no guidance."""
    ratios: dict[int, list[Tensor]] = {g: [] for g in range(len(candidates))}

    def watch(candidate: int, guided: Tensor, conditional: Tensor) -> None:
        ratios[candidate].append(guided.square().mean().sqrt() / conditional.square().mean().sqrt())

    trajectories(
        model,
        condition,
        seeds,
        list(candidates.values()),
        scheduler=sampler.make(model),
        steps=sampler.steps,
        eta=sampler.eta,
        on_guided=watch,
    )
    return {arm: torch.stack(ratios[g]).mean().item() for g, arm in enumerate(candidates)}


def in_words(arm: Arm, found: Saturation) -> str | None:
    """A warning that names the cure, or None where there is nothing to warn of."""
    signs = [
        text
        for text, there in (
            (f"{found.contrast:.2f} times the contrast of real pictures", found.contrast > CONTRAST),
            (f"{found.clipped:.0%} more of its values at black or white", found.clipped > CLIPPED),
            (f"a guided prediction {found.energy:.2f} times as strong as the conditional one", found.energy > ENERGY),
        )
        if there
    ]
    if not signs:
        return None
    name, scales = arm
    at = ", ".join(f"{scale:g}" for scale in scales)
    cure = "try a lower scale, an interval, APG, a mix with self, or self"
    return f"{name} at scale {at} goes too far: {' and '.join(signs)}; {cure}."
