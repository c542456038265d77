"""How clips behave in time, each number per clip: `temporal(pixels, features=None)`.

VBench (Huang et al. 2024, arXiv 2311.17982) names what is measured. Its networks are replaced: DINO and CLIP by the
feature network that is given, RAFT by block matching (Jain & Jain 1981), as video codecs find motion.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SIDE, BLOCK, STRIDE, REACH = 64, 8, 4, 8
"""In pixels: the shorter side that frames are resized to (which takes noise out of large ones), the blocks that are
looked for in the next frame, how far apart they are, and how far they are looked for."""
DETOUR = 0.002
"""What a pixel's distance adds to the mean absolute difference of two blocks, so that flat ones stand still."""
FASTEST = 0.05
"""The share of a frame whose motion counts: VBench takes the fastest 5 %."""


@torch.no_grad()
def temporal(pixels: Tensor, features: Tensor | None = None) -> dict[str, Tensor]:
    """{"consistency", "flicker", "dynamic_degree"}, each (N,) float32 on the CPU, of clips (N, C, F, H, W) in [0, 1].

    consistency: cosine similarity of a frame's features with those of the first and of the previous frame, their mean
        over all frames but the first, at most 1: VBench's subject and background consistency. features: (N, F, D), as
        `frame_features` gives them; without any the pixels. Higher is better.
    flicker: mean absolute difference of neighbouring frames, in [0, 1]; VBench's temporal flickering is 1 - flicker.
        Motion raises it too: it compares clips that move alike. Lower is better.
    dynamic_degree: how far the fastest 5 % of a frame move to the next frame, as a share of the shorter side, their
        mean over all frames; it can tell up to 1/8 a frame. VBench calls a clip dynamic where this exceeds 6/256 in
        4 of 16 frames. Neither higher nor lower is better, but a clip that stands still has perfect consistency and
        flicker.

    ValueError for other shapes, and for fewer than two frames.
    """
    if pixels.ndim != 5 or pixels.shape[1] not in (1, 3) or pixels.shape[2] < 2:
        raise ValueError(f"clips must have shape (N, 1 or 3, 2 or more frames, H, W), got {tuple(pixels.shape)}")
    clips = pixels.detach().float().transpose(1, 2)  # one at a time: (F, C, H, W)
    seen = clips.flatten(2) if features is None else features
    rows = [
        torch.stack([_consistency(own), _flicker(frames), _dynamic_degree(frames)])
        for frames, own in zip(clips, seen, strict=True)
    ]
    return dict(zip(("consistency", "flicker", "dynamic_degree"), torch.stack(rows, 1), strict=True))


def _consistency(features: Tensor) -> Tensor:
    features = F.normalize(features, dim=1)
    previous, first = (features[1:] * features[:-1]).sum(1), features[1:] @ features[0]
    return ((previous + first) / 2).mean().cpu()


def _flicker(frames: Tensor) -> Tensor:
    return (frames[1:] - frames[:-1]).abs().mean().cpu()


def _dynamic_degree(frames: Tensor) -> Tensor:
    height, width = frames.shape[-2:]
    size = [round(side * SIDE / min(height, width)) for side in (height, width)]
    grey = F.interpolate(frames.mean(1, keepdim=True), size, mode="bilinear", antialias=True)
    speed = motion(grey[:-1], grey[1:]).norm(dim=1).flatten(1)
    fastest = speed.topk(max(1, round(FASTEST * speed.shape[1])), dim=1).values
    return (fastest.mean() / SIDE).cpu()


def motion(first: Tensor, second: Tensor) -> Tensor:
    """Where the blocks of `first` are in `second`, grey (B, 1, H, W) in [0, 1]: (B, 2, rows, columns), in pixels, right
    and down. Brightness that changes evenly does not count: its local mean is removed."""
    first, second = (each - _mean(each) for each in (first, second))
    height, width = first.shape[-2:]
    around = F.pad(second, [REACH] * 4, mode="replicate")
    costs, steps = [], 2 * REACH + 1
    for down in range(steps):
        for right in range(steps):
            difference = (first - around[..., down : down + height, right : right + width]).abs()
            detour = DETOUR * math.hypot(down - REACH, right - REACH)
            costs.append(F.avg_pool2d(difference, BLOCK, STRIDE)[:, 0] + detour)
    cost = torch.stack(costs, 1).unflatten(1, (steps, steps))  # (B, down, right, rows, columns)
    best = cost.flatten(1, 2).argmin(1)
    down, right = best // steps, best % steps
    row = cost.gather(1, down[:, None, None].expand(-1, 1, steps, -1, -1))[:, 0]
    column = cost.gather(2, right[:, None, None].expand(-1, steps, 1, -1, -1))[:, :, 0]
    return torch.stack([right - REACH + _between(row, right), down - REACH + _between(column, down)], 1)


def _between(costs: Tensor, best: Tensor) -> Tensor:
    """How far from the best of whole steps (B, ...) the least of costs (B, steps, ...) lies, in (-1/2, 1/2).

    By a parabola through the best and its neighbours, and no further than where two slopes would meet, which leaves a
    perfect match where it is."""
    near = [costs.gather(1, (best + step).clamp(0, costs.shape[1] - 1)[:, None])[:, 0] for step in (-1, 0, 1)]
    before, at, after = near
    parabola = (before - after) / (2 * (before + after - 2 * at)).clamp(min=1e-9)
    most = at / (at + torch.minimum(before, after)).clamp(min=1e-9)
    return parabola.clamp(-most, most)


def _mean(values: Tensor) -> Tensor:
    """The mean over a square of 9 pixels a side around each, edges repeated."""
    return F.avg_pool2d(F.pad(values, [4] * 4, mode="replicate"), 9, 1)
