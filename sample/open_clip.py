"""open_clip's image tower (ViT-H/14) as DynamiCrafter takes it: all tokens of the last layer, for a resampler."""

import math
from collections.abc import Mapping
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ldm
from .clip_image import MEAN, STD

HEAD_WIDTH = 80
"""Of ViT-H/14's attention."""


def tower_pixels(pixels: Tensor, side: int = 224) -> Tensor:
    """Pixels (B, 3, H, W) in [0, 1] as the tower takes them, (B, 3, side, side).

    Bicubic with corners aligned; where a side shrinks by f, first a Gaussian of sigma (f - 1) / 2 along each, its
    window 4 sigma wide and at least 3, reflecting at the edges: kornia's antialiased resizing, which the authors use.
    """
    factors = [size / side for size in pixels.shape[-2:]]
    if max(factors) > 1:
        for axis, factor in zip((-2, -1), factors, strict=True):
            pixels = _blur(pixels, max((factor - 1) / 2, 1e-3), axis)
    resized = F.interpolate(pixels, (side, side), mode="bicubic", align_corners=True)
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (MEAN, STD))
    return (resized - mean) / std


def _blur(pixels: Tensor, sigma: float, axis: int) -> Tensor:
    reach = int(max(4 * sigma, 3)) // 2
    offsets = torch.arange(-reach, reach + 1, device=pixels.device, dtype=pixels.dtype)
    kernel = (-(offsets**2) / (2 * sigma**2)).exp()
    lines = pixels.movedim(axis, -1)
    padded = F.pad(lines.flatten(0, -3), (reach, reach), mode="reflect").reshape(*lines.shape[:-1], -1)
    return (padded.unfold(-1, len(kernel), 1) @ (kernel / kernel.sum())).movedim(-1, axis)


@torch.no_grad()
def encode_tokens(image_encoder: nn.Module | None, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in [0, 1] as tokens (B, M, D), float32: the last layer's, before any norm. ValueError
    without an encoder."""
    if image_encoder is None:
        raise ValueError("this model came without its image encoder: give image as tokens (B, M, D), and frame")
    config: Any = image_encoder.config
    weight = next(image_encoder.parameters())
    return image_encoder(tower_pixels(pixels, config.image_size).to(weight)).last_hidden_state.float()


def read_image_tower(
    state: Mapping[str, Tensor], path: str | File, prefix: str, num_heads: int | None = None
) -> nn.Module:
    """The image tower of an original file as a CLIPVisionModel, frozen, in float32.

    prefix: of the file's whole open_clip, whose text tower is left. num_heads: 80 wide by default, as in ViT-H/14.
    ValueError where there is no tower, or for heads that do not fit.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    own = {name.removeprefix(f"{prefix}visual."): t for name, t in state.items() if name.startswith(f"{prefix}visual.")}
    if "conv1.weight" not in own:
        raise ValueError(f"{path} has no image tower ({prefix}visual.*)")
    width, _, patch_size, _ = own["conv1.weight"].shape
    if width % (num_heads or HEAD_WIDTH):
        raise ValueError(f"an image tower {width} wide is not ViT-H/14, and no shape tells its heads: give image_heads")
    positions = len(own["positional_embedding"])
    with torch.device("meta"):
        tower = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=width,
                intermediate_size=len(own["transformer.resblocks.0.mlp.c_fc.weight"]),
                num_hidden_layers=ldm.layers_of(own),
                num_attention_heads=num_heads or width // HEAD_WIDTH,
                image_size=math.isqrt(positions - 1) * patch_size,
                patch_size=patch_size,
                hidden_act="gelu",
            )
        )
    ldm.load_renamed(tower, ldm.apart(own), ldm.open_clip_name, f"the image tower of {path}", "proj$")
    ldm.number_positions(tower, positions)
    return tower.float().requires_grad_(False).eval()


def tiny_tower() -> nn.Module:
    """Random weights; five tokens of 16."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        hidden_act="gelu",
    )
    return CLIPVisionModel(config).requires_grad_(False).eval()
