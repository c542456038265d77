"""Pictures in and out of files."""

from pathlib import Path as File

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


def read_picture(path: str | File) -> Tensor:
    """A picture file as (C, H, W) float32 in [0, 1]; C is 1 for grey files, else 3. ValueError names a bad file."""
    try:
        with Image.open(path) as picture:
            array = np.asarray(picture.convert("L" if picture.mode in ("1", "L") else "RGB"), np.float32) / 255
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable picture: {error}") from error
    return torch.from_numpy(array.copy()).reshape(*array.shape[:2], -1).permute(2, 0, 1)


def cover(pixels: Tensor, side: int) -> Tensor:
    """Pixels (B, C, H, W) in [0, 1] as (B, C, side, side): the shorter side resized (bicubic), the centre cut out."""
    height, width = pixels.shape[-2:]
    scale = side / min(height, width)
    size = [max(side, round(height * scale)), max(side, round(width * scale))]
    if size != [height, width]:
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return pixels[..., top : top + side, left : left + side]


def to_uint8(pixels: Tensor) -> np.ndarray:
    """Pixels (..., C, H, W) in [0, 1] as uint8 (..., H, W, C), rounded."""
    return (pixels.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).movedim(-3, -1).cpu().numpy()


def to_pil(pixels: Tensor) -> Image.Image:
    """One picture (C, H, W), C of 1 or 3, in [0, 1]."""
    array = to_uint8(pixels)
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
