"""Pictures side by side, aligned by condition, inside the page."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..sample.pictures import to_pil
from .page import Html, tag
from .panels import check_pictures
from .tables import scrolling

ROWS = 6
"""Rows of pictures in each of the two selections."""
BUDGET = 3_500_000
"""Characters that all pictures of a page may take; larger ones are shrunk until they fit."""
SIDES = (256, 192, 128, 96, 64, 32)


def gallery(pictures: Mapping[str, Any]) -> tuple[Html, ...]:
    """A fixed selection, and the conditions on which the candidates differ most; nothing where there are no pictures.

    pictures: as `write_report` takes them. ValueError for other shapes.
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
    data, side = _encode(columns, [*fixed, *rest])
    size = max(max(value.shape[-2:]) for value in columns.values())
    tables = [_table(columns, captions, data, fixed, f"The first {len(fixed)} of {count}, whatever they show.")]
    if rest:
        others = f"Picked from the other {count - len(fixed)} because the candidates differ most on them: not typical."
        tables.append(_table(columns, captions, data, rest, others))
    shrunk = f" Shown at {side} of {size} pixels." if side < size else ""
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


def _encode(columns: Mapping[str, Tensor], rows: Sequence[int]) -> tuple[dict[tuple[str, int], str], int]:
    """PNGs in base64 by (column, row), on the largest of SIDES within the budget, and that side."""
    data: dict[tuple[str, int], str] = {}
    for side in SIDES:
        data = {(name, i): _png(value[i], side) for name, value in columns.items() for i in rows}
        if sum(map(len, data.values())) <= BUDGET:
            break
    return data, side


def _png(pixels: Tensor, side: int) -> str:
    picture = to_pil(pixels)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=side <= 64)
    return base64.b64encode(file.getvalue()).decode()


def _table(
    columns: Mapping[str, Tensor],
    captions: Sequence[str],
    data: Mapping[tuple[str, int], str],
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
            height, width = value.shape[-2:]
            most = width * max(1, round(112 / width))  # whole pixels where there is room
            image = tag(
                "img",
                src=f"data:image/png;base64,{data[name, i]}",
                alt=f"{name}: {about}",
                width=width,
                height=height,
                class_="pixels" if width <= 64 else None,
                style=f"max-width:{most}px" if width <= 64 else None,
            )
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
