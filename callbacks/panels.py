"""Grids of pictures with captions, for people to look at."""

from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

from ..sample.pictures import to_pil

GAP = 4
"""Pixels around and between pictures."""
READABLE = 96
"""Pictures narrower than this many pixels are enlarged by default."""


def check_pictures(name: str, pictures: Tensor, count: int | None = None) -> Tensor:
    """`pictures` itself, if (N, 1 or 3, H, W) with N = `count` where that is given. ValueError otherwise."""
    if pictures.ndim != 4 or pictures.shape[1] not in (1, 3) or count not in (None, len(pictures)):
        wanted = f"({'N' if count is None else count}, 1 or 3, H, W)"
        raise ValueError(f"{name} must be pictures of shape {wanted}, got {tuple(pictures.shape)}")
    return pictures


def grid(
    rows: Tensor | Sequence[Sequence[Tensor]],
    row_titles: Sequence[str] = (),
    column_titles: Sequence[str] = (),
    zoom: int | None = None,
) -> Image.Image:
    """R rows of C pictures (R, C, 1 or 3, H, W) in [0, 1], with titles on the left and above.

    zoom: each pixel becomes zoom x zoom, unblurred; by default enough for pictures READABLE wide. Without titles
    picture (r, c) starts at x = GAP + c (zoom W + GAP), y = GAP + r (zoom H + GAP); titles shift all by one margin.
    ValueError where titles and pictures differ in number.
    """
    height, width = rows[0][0].shape[-2:]
    zoom = zoom or max(1, -(-READABLE // width))
    cell = (zoom * width, zoom * height)
    for name, titles, count in (("row_titles", row_titles, len(rows)), ("column_titles", column_titles, len(rows[0]))):
        if titles and len(titles) != count:
            raise ValueError(f"{name} must be {count} texts, got {len(titles)}")
    font = ImageFont.load_default(min(16, max(12, cell[0] // 8)))
    line = sum(font.getmetrics())  # type: ignore[union-attr]
    above = [_wrap(title, cell[0], font) for title in column_titles]
    beside = [_wrap(title, max(cell[0], READABLE), font) for title in row_titles]
    top = GAP + line * max((len(lines) for lines in above), default=-1) + GAP if above else GAP
    left = 2 * GAP + int(max(font.getlength(text) for lines in beside for text in lines)) + 1 if beside else GAP
    size = (left + len(rows[0]) * (cell[0] + GAP), top + len(rows) * (cell[1] + GAP))
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for c, lines in enumerate(above):
        x, y = left + c * (cell[0] + GAP) + cell[0] / 2, top - GAP - line * len(lines)
        for i, text in enumerate(lines):
            draw.text((x, y + i * line), text, fill="black", font=font, anchor="ma")
    for r, row in enumerate(rows):
        y = top + r * (cell[1] + GAP)
        if beside:
            middle = y + (cell[1] - line * len(beside[r])) / 2
            for i, text in enumerate(beside[r]):
                draw.text((left - GAP, middle + i * line), text, fill="black", font=font, anchor="ra")
        for c, pixels in enumerate(row):
            enlarged = to_pil(pixels).resize(cell, Image.Resampling.NEAREST)
            picture.paste(enlarged, (left + c * (cell[0] + GAP), y))
    return picture


def panel(
    condition: Tensor | None,
    candidates: Mapping[str, Tensor],
    target: Tensor | None = None,
    captions: Sequence[str] = (),
    zoom: int | None = None,
) -> Image.Image:
    """One row per sample: its condition, what each candidate made of it, and the target, all aligned.

    Pictures are (N, 1 or 3, H, W) in [0, 1]; those of another height and width than the candidates' are resized.
    ValueError where there are no candidates, or shapes do not agree.
    """
    if not candidates:
        raise ValueError("a panel needs at least one candidate, got none")
    columns = {"condition": condition, **candidates, "target": target}
    shown = {name: pictures for name, pictures in columns.items() if pictures is not None}
    first = next(iter(candidates.values()))
    resized = []
    for name, pictures in shown.items():
        pictures = check_pictures(name, pictures, len(first)).detach().float().cpu()
        if pictures.shape[-2:] != first.shape[-2:]:
            pictures = interpolate(pictures, first.shape[-2:], mode="bilinear", antialias=True)
        resized.append(pictures.expand(-1, 3, -1, -1))
    return grid(torch.stack(resized, 1), captions, list(shown), zoom)


def _wrap(text: str, width: float, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """The text in lines of at most `width` pixels; a word longer than a line ends in dots."""
    lines: list[str] = []
    for word in text.split():
        if font.getlength(word) > width:
            while len(word) > 1 and font.getlength(word + "…") > width:
                word = word[:-1]
            word += "…"
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines or [""]
