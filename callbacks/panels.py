"""Grids of pictures with captions, for people to look at."""

from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate, pad

from ..sample.pictures import to_pil

GAP = 4
"""Pixels around and between pictures; between the strips of clips four times as many."""
READABLE = 96
"""Pictures narrower than this many pixels are enlarged by default."""
STRIP, STRIP_SIDE = 4, 160
"""Frames that stand for a clip, and pixels of their longer side at most."""


def check_pictures(name: str, pictures: Tensor, count: int | None = None) -> Tensor:
    """`pictures` itself, if (N, 1 or 3, H, W), or of clips (N, 1 or 3, F, H, W), with N = `count` where that is given.
    ValueError otherwise."""
    if pictures.ndim not in (4, 5) or pictures.shape[1] not in (1, 3) or count not in (None, len(pictures)):
        wanted = f"({'N' if count is None else count}, 1 or 3, H, W)"
        raise ValueError(f"{name} must be pictures of shape {wanted}, got {tuple(pictures.shape)}")
    return pictures


def grid(
    rows: Tensor | Sequence[Sequence[Tensor]],
    row_titles: Sequence[str] = (),
    column_titles: Sequence[str] = (),
    zoom: int | None = None,
    gap: int = GAP,
) -> Image.Image:
    """R rows of C pictures (R, C, 1 or 3, H, W) in [0, 1], with titles on the left and above. The pictures of a column
    may be wider than another's.

    zoom: each pixel becomes zoom x zoom, unblurred; by default enough for pictures READABLE wide. Without titles
    picture (r, c) starts at x = GAP + c (zoom W + gap), y = GAP + r (zoom H + GAP); titles shift all by one margin.
    ValueError where titles and pictures differ in number.
    """
    widths, height = [picture.shape[-1] for picture in rows[0]], rows[0][0].shape[-2]
    zoom = zoom or max(1, -(-READABLE // min(widths)))
    cells = [(zoom * width, zoom * height) for width in widths]
    for name, titles, count in (("row_titles", row_titles, len(rows)), ("column_titles", column_titles, len(rows[0]))):
        if titles and len(titles) != count:
            raise ValueError(f"{name} must be {count} texts, got {len(titles)}")
    narrow = min(cells)[0]
    font = ImageFont.load_default(min(16, max(12, narrow // 8)))
    line = sum(font.getmetrics())  # type: ignore[union-attr]
    above = [_wrap(title, cell[0], font) for title, cell in zip(column_titles, cells, strict=False)]
    beside = [_wrap(title, max(narrow, READABLE), font) for title in row_titles]
    top = GAP + line * max((len(lines) for lines in above), default=-1) + GAP if above else GAP
    left = 2 * GAP + int(max(font.getlength(text) for lines in beside for text in lines)) + 1 if beside else GAP
    lefts = [left + sum(cell[0] + gap for cell in cells[:c]) for c in range(len(cells) + 1)]
    down = zoom * height + GAP
    picture = Image.new("RGB", (lefts[-1], top + len(rows) * down), "white")
    draw = ImageDraw.Draw(picture)
    for c, lines in enumerate(above):
        x, y = lefts[c] + cells[c][0] / 2, top - GAP - line * len(lines)
        for i, text in enumerate(lines):
            draw.text((x, y + i * line), text, fill="black", font=font, anchor="ma")
    for r, row in enumerate(rows):
        y = top + r * down
        if beside:
            middle = y + (zoom * height - line * len(beside[r])) / 2
            for i, text in enumerate(beside[r]):
                draw.text((left - GAP, middle + i * line), text, fill="black", font=font, anchor="ra")
        for c, pixels in enumerate(row):
            picture.paste(to_pil(pixels).resize(cells[c], Image.Resampling.NEAREST), (lefts[c], y))
    return picture


def panel(
    condition: Tensor | None,
    candidates: Mapping[str, Tensor],
    target: Tensor | None = None,
    captions: Sequence[str] = (),
    zoom: int | None = None,
) -> Image.Image:
    """One row per sample: its condition, what each candidate made of it, and the target, all aligned.

    Pictures are (N, 1 or 3, H, W) in [0, 1]; those of another height and width than the candidates' are resized. Clips
    (N, 1 or 3, F, H, W) are shown as `strip` has them. ValueError where there are no candidates, or shapes do not
    agree.
    """
    columns = _aligned(condition, candidates, target)
    cells = [strip(shown) if shown.ndim == 5 else shown for shown in columns.values()]
    zoom = zoom or max(1, -(-READABLE // next(iter(columns.values())).shape[-1]))
    gap = 4 * GAP if any(shown.ndim == 5 for shown in columns.values()) else GAP
    return grid(list(zip(*cells, strict=True)), captions, list(columns), zoom, gap)


def animated_panel(
    condition: Tensor | None,
    candidates: Mapping[str, Tensor],
    target: Tensor | None = None,
    captions: Sequence[str] = (),
) -> list[Image.Image]:
    """The same with clips that play side by side: one panel per frame, as many as the longest has. Whatever is shorter,
    or a picture, stays as it ends."""
    columns = _aligned(condition, candidates, target)
    length = max(shown.shape[2] for shown in columns.values() if shown.ndim == 5)
    frames = []
    for number in range(length):
        now = [s[:, :, min(number, s.shape[2] - 1)] if s.ndim == 5 else s for s in columns.values()]
        frames.append(grid(torch.stack(now, 1), captions, list(columns)))
    return frames


def strip(clips: Tensor) -> Tensor:
    """Clips (N, C, F, H, W) in [0, 1] as pictures (N, C, H, W'): STRIP frames of each, evenly spaced from the first to
    the last, from left to right with a white line between them."""
    numbers = torch.linspace(0, clips.shape[2] - 1, min(STRIP, clips.shape[2])).round().long()
    framed = pad(clips[:, :, numbers], (0, 1), value=1.0)  # (N, C, STRIP, H, W + 1)
    return framed.movedim(2, 3).flatten(3)[..., :-1]


def _aligned(condition: Tensor | None, candidates: Mapping[str, Tensor], target: Tensor | None) -> dict[str, Tensor]:
    """The columns of a panel in three colours, all of the candidates' height and width, clips of STRIP_SIDE at most."""
    if not candidates:
        raise ValueError("a panel needs at least one candidate, got none")
    columns = {"condition": condition, **candidates, "target": target}
    first = next(iter(candidates.values()))
    size = list(first.shape[-2:])
    if first.ndim == 5 and max(size) > STRIP_SIDE:
        size = [max(1, round(side * STRIP_SIDE / max(size))) for side in size]
    resized = {}
    for name, pictures in columns.items():
        if pictures is None:
            continue
        pictures = check_pictures(name, pictures, len(first)).detach().float().cpu()
        if list(pictures.shape[-2:]) != size:
            frames = pictures.transpose(1, 2).flatten(0, 1) if pictures.ndim == 5 else pictures
            frames = interpolate(frames, size, mode="bilinear", antialias=True)
            pictures = frames.unflatten(0, (len(first), -1)).transpose(1, 2) if pictures.ndim == 5 else frames
        resized[name] = pictures.expand(-1, 3, *[-1] * (pictures.ndim - 2))
    return resized


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
