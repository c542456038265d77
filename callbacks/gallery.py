"""Pictures and clips side by side, aligned by condition, inside the page."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..sample.pictures import to_pil
from .page import Html, tag
from .panels import check_pictures, strip
from .records import rates
from .tables import scrolling

ROWS = 6
"""Rows of pictures in each of the two selections."""
BUDGET = 3_500_000
"""Characters that all pictures of a page may take; larger ones are shrunk until they fit."""
SIDES = (256, 192, 128, 96, 64, 32)
CLIP_SIDES = SIDES[2:]
"""Clips begin smaller: sixteen frames take what sixteen pictures do."""
LOSSY = {"quality": 75, "method": 2}


def gallery(pictures: Mapping[str, Any]) -> tuple[Html, ...]:
    """A fixed selection, and the conditions on which the candidates differ most; nothing where there are no pictures.

    pictures: as `write_report` takes them, "fps" for clips. ValueError for other shapes.
    """
    candidates: dict[str, Tensor] = dict(pictures.get("candidates") or {})
    if not candidates:
        return ()
    count = len(next(iter(candidates.values())))
    named = {"condition": pictures.get("condition"), **candidates, "target": pictures.get("target")}
    columns = {
        name: check_pictures(name, value, count).detach().float().cpu()
        for name, value in named.items()
        if value is not None
    }
    captions = [str(text) for text in pictures.get("caption") or [""] * count]
    if len(captions) != count:
        raise ValueError(f"caption must be {count} texts, one per condition, got {len(captions)}")
    fixed = list(range(min(ROWS, count)))
    rest = [i for i in most_different([columns[name] for name in candidates]) if i not in fixed][:ROWS]
    data, side = encode(columns, [*fixed, *rest], rates(pictures, count))
    size = max(max(value.shape[-2:]) for value in columns.values())
    tables = [_table(columns, captions, data, fixed, f"The first {len(fixed)} of {count}, whatever they show.")]
    if rest:
        others = f"Picked from the other {count - len(fixed)} because the candidates differ most on them: not typical."
        tables.append(_table(columns, captions, data, rest, others))
    shrunk = f" Shown at {side} of {size} pixels." if side < size else ""
    if any(value.ndim == 5 for value in columns.values()):
        shrunk += " Clips play compressed; where motion is to be reduced, some of their frames stand for them."
    return (
        tag("p", f"Each row is one condition, drawn by every candidate from the same noise.{shrunk}"),
        tag("div", *tables, class_="pictures large" if size > 64 or len(columns) > 7 else "pictures"),
    )


def most_different(candidates: Sequence[Tensor]) -> list[int]:
    """Indices by falling mean squared deviation between the candidates' pictures, each (N, C, H, W); none for one."""
    if len(candidates) < 2:
        return []
    mean = sum(candidates[1:], candidates[0]) / len(candidates)
    deviation = torch.stack([(pictures - mean).square().flatten(1).mean(1) for pictures in candidates]).mean(0)
    return deviation.argsort(descending=True, stable=True).tolist()


def without_condition(pictures: Mapping[str, Any]) -> Html | None:
    """What every prior draws by itself: "alone" {name: (n, 1 or 3, H, W) in [0, 1], or clips}, a row each."""
    given = pictures.get("alone") or {}
    if not given:
        return None
    count = len(next(iter(given.values())))
    columns = {name: check_pictures(name, value, count).detach().float().cpu() for name, value in given.items()}
    data, _ = encode(columns, range(count), rates(pictures, count), BUDGET // 7)
    lines = []
    for name, value in columns.items():
        cells = [embedded(data[name, i], value, name, i, f"without a condition, {i + 1}") for i in range(count)]
        lines.append(tag("tr", tag("th", name, scope="row", class_="text"), *(tag("td", cell) for cell in cells)))
    caption = "What each prior draws by itself, without a condition: a column is one noise."
    table = tag("div", tag("table", tag("tbody", *lines)), class_="pictures", style="max-width:38rem")
    return scrolling(table, caption)


Encoded = tuple[tuple[str, str], ...]
"""Ways to show one cell, each its type and the file in base64; the second of a clip is for those who want no motion."""


def encode(
    columns: Mapping[Any, Tensor], rows: Sequence[int], fps: Sequence[float], budget: int = BUDGET
) -> tuple[dict[tuple[Any, int], Encoded], int]:
    """What `_still` and `_playing` make of each (column, row), on the largest side within the budget, and that side."""
    data: dict[tuple[Any, int], Encoded] = {}
    clips = any(value.ndim == 5 for value in columns.values())
    for side in CLIP_SIDES if clips else SIDES:
        data = {
            (name, i): _playing(value[i], side, fps[i]) if value.ndim == 5 else _still(value[i], side)
            for name, value in columns.items()
            for i in rows
        }
        if sum(len(text) for encoded in data.values() for _, text in encoded) <= budget:
            break
    return data, side


def _still(pixels: Tensor, side: int) -> Encoded:
    picture = _small(pixels, side)
    return (("image/png", _file(picture, "PNG", optimize=side <= 64)),)


def _playing(pixels: Tensor, side: int, fps: float) -> Encoded:
    """A clip (C, F, H, W) as an animated WebP, and as a strip of frames."""
    frames = [_small(frame, side) for frame in pixels.unbind(1)]
    played = _file(
        frames[0], "WEBP", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0, **LOSSY
    )
    return ("image/webp", played), ("image/webp", _file(_small(strip(pixels[None])[0], 2 * side), "WEBP", **LOSSY))


def _file(picture: Image.Image, kind: str, **options: Any) -> str:
    """The picture's file in base64."""
    picture.save(file := io.BytesIO(), kind, **options)
    return base64.b64encode(file.getvalue()).decode()


def _small(pixels: Tensor, side: int) -> Image.Image:
    picture = to_pil(pixels)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def embedded(encoded: Encoded, pixels: Tensor, name: str, row: int, about: str) -> Html:
    """One cell of `encode`, of pixels (..., H, W); the page's script finds it by its data-row and data-name."""
    height, width = pixels.shape[-2:]
    most = width * max(1, round(112 / width))  # whole pixels where there is room
    shown, *calm = (f"data:{kind};base64,{text}" for kind, text in encoded)
    image = tag(
        "img",
        src=shown,
        alt=f"{name}: {about}",
        width=width,
        height=height,
        data_row=row,
        data_name=name,
        class_="pixels" if width <= 64 else None,
        style=f"max-width:{most}px" if width <= 64 else None,
    )
    if calm:
        return tag("picture", tag("source", media="(prefers-reduced-motion: reduce)", srcset=calm[0]), image)
    return image


def _table(
    columns: Mapping[str, Tensor],
    captions: Sequence[str],
    data: Mapping[tuple[str, int], Encoded],
    rows: Sequence[int],
    caption: str,
) -> Html:
    """One selection. The condition, or its caption where it is no picture, heads its row."""
    titled = "condition" not in columns
    lines = []
    for i in rows:
        about = captions[i] or f"condition {i + 1}"
        cells = [tag("th", about, scope="row", class_="text")] if titled else []
        for name, value in columns.items():
            image = embedded(data[name, i], value, name, i, about)
            if name == "condition":
                cells.append(tag("th", image, captions[i], scope="row"))
            else:
                cells.append(tag("td", image))
        lines.append(tag("tr", *cells))
    heads = [tag("td", class_="text")] if titled else []
    heads += [tag("th", name, scope="col") for name in columns]
    table = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *lines))
    least = len(heads) * 3.6  # beyond about six columns a phone scrolls the table, rather than shrink it away
    return scrolling(tag("div", table, style=f"min-width:{least:.1f}rem"), caption)
