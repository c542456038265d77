"""A watch for guidance that goes too far: contrast, clipping, and the energy of the guided prediction.

Guidance pushes pictures past what the model learned; guidance by another network does so by (scale - 1) times all that
fine-tuning moved. Pictures then gain contrast, and their values crowd at black and white.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .guidance import Arm

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


def energy_ratio(guided: Tensor, conditional: Tensor) -> Tensor:
    """How much larger a guided prediction is than the conditional one: the ratio of their root mean squares, ()."""
    return guided.square().mean().sqrt() / conditional.square().mean().sqrt()


class Energies:
    """The `energy_ratio` of each arm at each step, watched while `compare` samples; 1 where there is no guidance."""

    def __init__(self) -> None:
        self._ratios: dict[Arm, Tensor] = {}

    def add(self, arm: Arm, ratios: Tensor) -> None:
        """Ratios (steps,) of an arm."""
        self._ratios[arm] = torch.cat([self._ratios[arm], ratios]) if arm in self._ratios else ratios

    def means(self) -> dict[Arm, float]:
        """Over all steps that were watched."""
        return {arm: ratios.mean().item() for arm, ratios in self._ratios.items()}


def in_words(arm: Arm, found: Saturation, baseline: str = "self") -> str | None:
    """A warning that names the cure, or None where there is nothing to warn of. baseline: the model's own candidate."""
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
    cures = ["a lower scale", "an interval", "APG"]
    cures += [] if name == baseline else [f"a mix with {baseline}", baseline]
    cure = f"try {', '.join(cures[:-1])}, or {cures[-1]}"
    return f"{name} at scale {at} goes too far: {' and '.join(signs)}; {cure}."
