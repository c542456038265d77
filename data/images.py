"""From a picture, in a file or in memory, to a square of bytes."""

import io
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow raises on broken files."""

LONGEST = 50
"""The longer side over the shorter: a strip of few bytes would take gigabytes once its shorter side is resized."""

Place = tuple[float, float]
"""Where a square is cut out, down and across: 0 is the first place possible, just below 1 the last."""

Size = int | tuple[int, int]
"""Of what is cut out: the side of a square, or (height, width)."""

ORIENTATION = ExifTags.Base.Orientation

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def _open(source: str | File | Mapping[str, Any] | None) -> Image.Image:
    file: Any = source
    if isinstance(source, Mapping):
        file = source["path"] if source["bytes"] is None else io.BytesIO(source["bytes"])
    if file is None:
        raise ValueError("there is no picture")
    return Image.open(file)


def decode(
    source: str | File | Mapping[str, Any] | None,
    resolution: Size,
    channels: int,
    pad: bool = True,
    place: Place | None = None,
) -> Tensor:
    """A picture as uint8 (channels, *resolution).

    `source`: a path, or {"bytes", "path"} as `datasets` keeps pictures. Upright by its EXIF tag; transparency lies on
    white; CMYK, palettes and 16-bit grey are converted. With `pad`, small grey pictures may be padded; see `fit`.
    One of `UNREADABLE` is raised for a bad file.
    """
    with _open(source) as opened:
        return convert(opened, resolution, channels, pad, place)


def upright_size(source: str | File | Mapping[str, Any] | None) -> tuple[int, int] | None:
    """(height, width) of what `decode` would see, by the picture's header alone; None where that cannot be read."""
    try:
        with _open(source) as opened:
            width, height = opened.size
            # Pillow turns the size of a TIFF itself, and would decode a PNG to look for its tags behind the pixels.
            turned = opened.format != "TIFF" and Image.Image.getexif(opened).get(ORIENTATION, 1) in (5, 6, 7, 8)
    except UNREADABLE:
        return None
    return (width, height) if turned else (height, width)


def convert(opened: Image.Image, resolution: Size, channels: int, pad: bool, place: Place | None = None) -> Tensor:
    """An opened picture, or the frame that it is at, as `decode` gives it."""
    picture = ImageOps.exif_transpose(opened)
    grey = picture.mode in ("1", "L", "I", "I;16", "I;16B", "F")
    if picture.mode.startswith("I"):  # Pillow's own conversion may clip 16 bits instead of scaling them
        picture = Image.fromarray((np.asarray(picture) // 256).clip(0, 255).astype(np.uint8))
    elif picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    array = np.array(picture.convert("L" if channels == 1 else "RGB"))
    pixels = torch.from_numpy(array).reshape(*array.shape[:2], channels).permute(2, 0, 1)
    return fit(pixels[None], resolution, pad and grey, place)[0]


def fit(pixels: Tensor, resolution: Size, pad: bool, place: Place | None = None) -> Tensor:
    """uint8 (B, C, H, W) as uint8 (B, C, *resolution).

    With `pad`, pictures at most 4 pixels too small, evenly so (28x28 at 32), get a frame of zeros; otherwise they are
    resized to cover it (bicubic, antialiased) and cut, at the centre unless `place` says where.
    ValueError for a strip, whose longer side is more than LONGEST times the shorter.
    """
    height, width = pixels.shape[-2:]
    tall, wide = (resolution, resolution) if isinstance(resolution, int) else resolution
    missing = (tall - height, wide - width)
    if missing == (0, 0):
        return pixels
    if pad and all(0 <= m <= 4 and m % 2 == 0 for m in missing):
        return F.pad(pixels, (missing[1] // 2,) * 2 + (missing[0] // 2,) * 2)
    if max(height, width) > LONGEST * min(height, width):
        raise ValueError(
            f"the longer side may be {LONGEST} times the shorter at most, got {height} x {width} (height x width)"
        )
    scale = max(tall / height, wide / width)
    size = [max(tall, round(height * scale)), max(wide, round(width * scale))]
    pixels = F.interpolate(pixels.contiguous(), size, mode="bicubic", antialias=True)
    room = (size[0] - tall, size[1] - wide)
    top, left = (side // 2 for side in room)
    if place is not None:
        top, left = (int(at * (side + 1)) for at, side in zip(place, room, strict=True))
    return pixels[..., top : top + tall, left : left + wide].contiguous()
