"""Training pictures at their own aspect ratio: the sizes they are cut to, and which picture goes to which."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Sides = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class Buckets:
    """Sizes beside the square of side `resolution`, so that training pictures need not be cut to squares.

    max_ratio: how many times as long as the shorter side the longer one may be.
    step: sides are multiples of so many pixels, the resolution too; a multiple of what the model can halve.

    A picture goes to the size whose ratio of sides is nearest to its own, is resized to cover it, and what is left over
    is cut off; each batch is of one size. NovelAI's aspect ratio bucketing, as SDXL was trained (Podell et al. 2023,
    arXiv 2307.01952, sec. 2.3 and its appendix). Pictures for validation and comparisons stay squares, so that their
    figures compare with those of other runs.
    """

    max_ratio: float = 2.0
    step: int = 64

    def __post_init__(self) -> None:
        if not self.max_ratio >= 1:
            raise ValueError(f"buckets.max_ratio must be at least 1, got {self.max_ratio}")
        if self.step < 1:
            raise ValueError(f"buckets.step must be at least 1, got {self.step}")

    def __str__(self) -> str:
        return f"of max_ratio {self.max_ratio} and step {self.step}"

    def sizes(self, resolution: int) -> list[Sides]:
        """All sizes, from the square outwards, each high one before the wide one of the same sides: for each shorter
        side the longest other one with which the area is at most resolution^2.

        ValueError for a resolution that is no multiple of `step`.
        """
        if resolution % self.step:
            raise ValueError(
                f"resolution must be a multiple of buckets.step ({self.step}), got {resolution}: change either"
            )
        found = [(resolution, resolution)]
        for short in range(resolution - self.step, 0, -self.step):
            long = resolution**2 // short // self.step * self.step
            if long > self.max_ratio * short:
                break
            found += [(long, short), (short, long)]
        return found


def nearest(pictures: Tensor, sizes: Sequence[Sides]) -> Tensor:
    """For pictures' own sides (N, 2) the number (N,) of the size whose aspect ratio is nearest by its logarithm.

    sizes: in the order that decides between two that are equally near. 0 for a picture whose sides are 0.
    """
    height, width = pictures.double().clamp(min=1).unsqueeze(-1).unbind(1)
    wanted = torch.tensor(sizes, dtype=torch.float64)
    across, down = height * wanted[:, 1], width * wanted[:, 0]  # whole numbers, so that equal ratios are equal
    return (torch.maximum(across, down) / torch.minimum(across, down)).argmin(1)


APART = 1.05
"""Two pictures of a pair whose aspect ratios are further apart than by this factor do not show the same once cut."""


def describe(groups: Tensor, sizes: Sequence[Sides], pictures: Tensor, others: Tensor) -> str:
    """One line: how many pictures each size has.

    pictures: their own sides (N, 2), 0 where unknown. others: those of what is cut like them, as of a pair's originals.
    """
    counts = groups.bincount(minlength=len(sizes)).tolist()
    parts = [f"{n} at {height}x{width}" for n, (height, width) in zip(counts, sizes, strict=True) if n]
    unread = int((pictures == 0).any(1).sum())
    told = f"; {unread} of unknown size, as their headers cannot be read, count as squares" if unread else ""
    across, down = (pictures * others.flip(1)).double().unbind(1)  # 0 where either is unknown
    if apart := int((torch.maximum(across, down) > APART * torch.minimum(across, down)).sum()):
        told += f"; in {apart} pairs the aspect ratios of the two are over {APART - 1:.0%} apart: they are cut unalike"
    return f"buckets: of {len(groups)} training pictures {', '.join(parts)} (height x width){told}"
