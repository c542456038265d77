"""Coloured shapes that move over a shaded background: a small set of captioned clips that needs no files."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

COLOURS = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.7, 0.2),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.85, 0.1),
    "white": (1.0, 1.0, 1.0),
    "black": (0.0, 0.0, 0.0),
}
SHAPES = ("square", "circle", "diamond")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
LENGTH = 64
"""Frames of a clip."""
FPS = 8.0


@dataclass(frozen=True)
class MovingShape:
    """One clip: where the shape starts (right, down) as shares of the width and height, and as shares of the shorter
    side how far it goes each frame and its radius. What leaves on one side comes back on the other."""

    colour: str
    shape: str
    direction: str
    start: tuple[float, float]
    speed: float
    radius: float
    background: np.ndarray
    """The colours (2, 3) of the background at its left and at its right."""

    @classmethod
    def draw(cls, seed: int) -> "MovingShape":
        """Everything by the seed alone."""
        generator = np.random.default_rng(seed)
        colour, shape, direction = (str(generator.choice(list(names))) for names in (COLOURS, SHAPES, DIRECTIONS))
        start, speed, radius = (
            generator.uniform(0.3, 0.7, 2),
            generator.uniform(0.005, 0.02),
            generator.uniform(0.12, 0.22),
        )
        return cls(colour, shape, direction, tuple(start), speed, radius, generator.uniform(0.3, 0.7, (2, 3)))

    @property
    def text(self) -> str:
        return f"a {self.colour} {self.shape} moves {self.direction}"

    def frames(self, numbers: Sequence[int], height: int, width: int) -> np.ndarray:
        """These frames as uint8 (F, 3, height, width); edges are a pixel soft."""
        side = min(height, width)
        steps = self.speed * np.asarray(numbers)
        offsets = []
        for size, first, sign in zip((width, height), self.start, DIRECTIONS[self.direction], strict=True):
            reach = size / side
            at = (np.arange(size) + 0.5) / side - (first * reach + sign * steps)[:, None]
            offsets.append(np.abs((at + reach / 2) % reach - reach / 2))  # the nearest way round, (F, size)
        across, down = offsets[0][:, None, :], offsets[1][:, :, None]
        if self.shape == "square":
            distance = np.maximum(across, down)
        elif self.shape == "circle":
            distance = np.hypot(across, down)
        else:
            distance = (across + down) / 1.4
        cover = ((self.radius - distance) * side + 0.5).clip(0, 1)[:, None]  # (F, 1, height, width)
        blend = np.linspace(0, 1, width)
        ground = self.background[0][:, None] * (1 - blend) + self.background[1][:, None] * blend  # (3, width)
        colour = np.array(COLOURS[self.colour])[:, None, None]
        frames = cover * colour + (1 - cover) * ground[:, None, :]
        return (frames * 255).round().astype(np.uint8)
