"""What a batch of labelled pictures becomes for a task: batched, without randomness, batch dict in and out.

A batch has "pixels" (B, C, H, W) in [0, 1] and "label" (B,) int64. A task may carry `class_names` of its own, where its
labels are not the data set's classes.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Batch = dict[str, Any]
Transform = Callable[[Batch], Batch]

TURNS = 8


def classes(batch: Batch) -> Batch:
    """Class-conditional: the pixels and the class. ValueError where the data has no labels."""
    if "label" not in batch:
        raise ValueError(f"the task needs labelled pictures, the data has only {sorted(batch)}")
    return {"pixels": batch["pixels"], "label": batch["label"]}


def edges(batch: Batch) -> Batch:
    """From outlines: "image" is the edge map (B, 1, H, W), 0 or 1; the class, if there is one, is kept for scoring."""
    return {**batch, "image": edge_map(batch["pixels"])}


def edge_map(pixels: Tensor, threshold: float = 2.5) -> Tensor:
    """Where the Sobel magnitude of the grey picture, scaled to [-1, 1], exceeds `threshold` (at most sqrt(80)).

    pixels (B, C, H, W) in [0, 1] -> (B, 1, H, W), 0 or 1.
    """
    grey = F.pad(pixels.mean(1, keepdim=True) * 2 - 1, (1, 1, 1, 1), mode="replicate")
    down, across = grey[..., 2:, :] - grey[..., :-2, :], grey[..., 2:] - grey[..., :-2]
    vertical = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    horizontal = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    return (vertical**2 + horizontal**2 > threshold**2).to(pixels.dtype)


def rotate(batch: Batch) -> Batch:
    """Turn by "label" x 45 degrees, counter-clockwise: "image" is the picture as it was, "pixels" the turned one.

    The turn of a picture depends on its pixels alone, so that every run asks the same of it. The class is "class" now.
    """
    source = batch["pixels"]
    turns = _key(source) % TURNS
    out = {"pixels": turn(source, turns), "image": source, "label": turns}
    return {**out, "class": batch["label"]} if "label" in batch else out


rotate.class_names = tuple(f"{360 // TURNS * k} degrees" for k in range(TURNS))  # type: ignore[attr-defined]


def turn(pixels: Tensor, turns: Tensor) -> Tensor:
    """pixels (B, C, H, W) turned by turns (B,) x 45 degrees about the centre; bilinear, zeros from outside."""
    angle = turns * (2 * math.pi / TURNS)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    across = pixels.shape[-1] / pixels.shape[-2]  # places go from -1 to 1 on the longer side as on the shorter
    matrix = torch.stack([cos, -sin / across, zero, sin * across, cos, zero], 1).reshape(-1, 2, 3).to(pixels)
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _key(pixels: Tensor) -> Tensor:
    """A whole number (B,) from each picture's bytes, the same on every machine."""
    values = (pixels * 255).round().long().flatten(1)
    factors = torch.arange(1, values.shape[1] + 1, device=values.device) * 2_654_435_761 % 65_521  # Knuth's multiplier
    return (values * factors).sum(1) % 1_000_003


TASKS: dict[str, Transform] = {"classes": classes, "edges": edges, "rotate": rotate}


def find(name: str) -> Transform:
    """A task by its name here, or any function by its dotted name. ValueError if there is none."""
    if name in TASKS:
        return TASKS[name]
    module, _, function = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"transform must be one of {sorted(TASKS)} or a dotted name, got {name!r} ({error})"
        ) from error
    if not callable(found):
        raise ValueError(f"transform {name!r} must be a function, got {type(found).__name__}")
    return found
