"""Pictures and clips in and out of files."""

import io
from collections.abc import Sequence
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path as File

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

FPS = 8.0
"""Frames per second of clips that do not say."""


def read_picture(path: str | File) -> Tensor:
    """A picture file as (C, H, W) float32 in [0, 1]; C is 1 for grey files, else 3. Upright by its EXIF tag;
    transparency lies on white. ValueError names a bad file."""
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
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


def write_clip(stem: File, pixels: Tensor, fps: float = FPS) -> None:
    """Writes pixels (C, F, H, W), C of 1 or 3, in [0, 1] to stem.gif and, where PyAV is installed, stem.mp4."""
    stem.with_name(f"{stem.name}.gif").write_bytes(gif([to_pil(frame) for frame in pixels.unbind(1)], fps))
    if find_spec("av") is not None:
        write_mp4(stem.with_name(f"{stem.name}.mp4"), pixels, fps)


def gif(frames: Sequence[Image.Image], fps: float = FPS) -> bytes:
    """A GIF that loops, all frames in 256 colours chosen for all of them, so that these do not flicker. It counts in
    hundredths of a second, two at least: frames last as long as `fps` says on average, up to 50."""
    ends = [round(100 * number / min(fps, 50)) for number in range(len(frames) + 1)]
    lasting = [10 * (end - start) for start, end in zip(ends, ends[1:], strict=False)]
    if frames[0].mode == "RGB":
        step = max(1, min(frames[0].size) // 64)
        some = np.concatenate([np.asarray(frame)[::step, ::step] for frame in frames])
        palette = Image.fromarray(some).quantize(256)
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    first, *rest = frames
    first.save(file := io.BytesIO(), "GIF", save_all=True, append_images=rest, duration=lasting, loop=0)
    return file.getvalue()


def write_mp4(path: File, pixels: Tensor, fps: float = FPS) -> None:
    """Pixels (C, F, H, W), C of 1 or 3, in [0, 1] as H.264, through PyAV. An odd height or width, which H.264's usual
    4:2:0 does not have, has its last line repeated."""
    import av

    height, width = pixels.shape[-2:]
    frames = F.pad(pixels.float().expand(3, -1, -1, -1), (0, width % 2, 0, height % 2), mode="replicate")
    with av.open(str(path), "w") as file:
        stream = file.add_stream("h264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "17"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[-2:], "yuv420p"
        for frame in to_uint8(frames.movedim(1, 0)):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
