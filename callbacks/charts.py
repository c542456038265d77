"""Curves as inline SVG, drawn in the page's own colours so that they suit light and dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .page import Html, tag

WIDTH, HEIGHT = 420, 310
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 34, 46
COLOURS, SHAPES, DASHES = 6, 5, ("", "7 4", "2 3", "9 3 2 3")


@dataclass(frozen=True)
class Point:
    """A measured point with its standard errors, a short label, and a note that shows under the pointer.

    `shared` points belong to another line, which draws them; this one only passes through.
    """

    x: float
    y: float
    x_error: float = 0.0
    y_error: float = 0.0
    label: str = ""
    note: str = ""
    ring: bool = False
    shared: bool = False


@dataclass(frozen=True)
class Line:
    """Points in order. `style` gives colour and marker, the same for one name all over a page; `dash` varies it."""

    style: int
    points: tuple[Point, ...]
    dash: int = 0


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers within [low, high]."""
    rough = (high - low) / count
    unit = 10 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= rough * (1 - 1e-9))
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def tick_texts(values: Sequence[float]) -> list[str]:
    """The ticks written with equally many digits after the point, no more than they need."""
    digits = next((d for d in range(10) if all(abs(round(v, d) - v) < 1e-9 for v in values)), 10)
    return [f"{value + 0.0:,.{digits}f}".replace("-", "−") for value in values]


def curves(
    lines: Sequence[Line],
    *,
    name: str,
    x_label: str,
    y_label: str,
    level: tuple[str, float] | None = None,
    x_ticks: Sequence[tuple[float, str]] = (),
    band: float = 0.0,
) -> Html:
    """One chart. `name` is read to those who cannot see it; `level` is a labelled horizontal line; `x_ticks` replace
    the round numbers; `band`: how many standard errors an area about each line reaches up and down, in place of bars
    of one. Points that are not finite are left out."""
    lines = [Line(s.style, tuple(p for p in s.points if math.isfinite(p.x + p.y)), s.dash) for s in lines]
    points = [point for line in lines for point in line.points]
    if not points:
        return Html("")
    x_low, x_high = _range([v for p in points for v in (p.x - p.x_error, p.x + p.x_error)])
    y_values = [v for p in points for v in (p.y - (band or 1) * p.y_error, p.y + (band or 1) * p.y_error)]
    y_low, y_high = _range(y_values + ([level[1]] if level else []))

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [*_axes(at, (x_low, x_high), (y_low, y_high), x_ticks)]
    parts.append(tag("text", y_label, x=2, y=15, class_="title"))
    parts.append(tag("text", x_label, x=WIDTH - RIGHT, y=HEIGHT - 6, text_anchor="end", class_="title"))
    if level:
        height = at(0, level[1])[1]
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=_f(height), y2=_f(height), class_="level"))
        parts.append(tag("text", level[0], x=WIDTH - RIGHT, y=_f(height - 5), text_anchor="end", class_="level-text"))
    if band:
        parts += [tag("g", _area(line, at, band), class_=f"p{line.style % COLOURS}") for line in lines if line.points]
    for line in lines:
        parts.append(tag("g", *_draw(line, at, not band), class_=f"p{line.style % COLOURS}"))
    parts += _labels(lines, at)
    return tag("svg", *parts, class_="chart", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=name)


def marker(style: int, x: float, y: float, note: str = "", size: float = 5) -> Html:
    """The marker of a style, in the current colour."""
    title = tag("title", note) if note else None
    if style % SHAPES == 0:
        shape = tag("circle", cx=_f(x), cy=_f(y), r=size, fill="currentColor")
    else:
        corners = {
            1: ((-1, -1), (1, -1), (1, 1), (-1, 1)),
            2: ((0, -1.25), (1.2, 0.95), (-1.2, 0.95)),
            3: ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
            4: ((0, 1.25), (1.2, -0.95), (-1.2, -0.95)),
        }[style % SHAPES]
        outline = " ".join(f"{_f(x + 0.9 * size * dx)},{_f(y + 0.9 * size * dy)}" for dx, dy in corners)
        shape = tag("polygon", points=outline, fill="currentColor")
    return tag("g", title, shape) if title else shape


def legend(names: dict[str, tuple[int, int]]) -> Html:
    """The lines' names beside their colour, marker and dash: {name: (style, dash)}."""
    keys = [
        tag(
            "span",
            tag("svg", _stroke("M0 8H30", dash), marker(style, 15, 8), viewBox="0 0 30 16", aria_hidden="true",
                class_=f"p{style % COLOURS}"),
            name,
            class_="key",
        )
        for name, (style, dash) in names.items()
    ]  # fmt: skip
    return tag("p", *keys, class_="keys")


def interval(low: float, value: float, high: float, extent: float, style: int) -> Html:
    """A difference with its interval beside zero, on an axis from -extent to extent."""
    x = [70 + 66 * v / extent for v in (low, value, high)]
    return tag(
        "svg",
        tag("line", x1=70, x2=70, y1=0, y2=16, stroke="var(--soft)"),
        tag("line", x1=_f(x[0]), x2=_f(x[2]), y1=8, y2=8, stroke="currentColor", stroke_width=2),
        *(
            tag("line", x1=_f(end), x2=_f(end), y1=4, y2=12, stroke="currentColor", stroke_width=2)
            for end in (x[0], x[2])
        ),
        marker(style, x[1], 8, size=4),
        viewBox="0 0 140 16",
        aria_hidden="true",
        class_=f"interval p{style % COLOURS}",
    )


def _f(value: float) -> str:
    return f"{value:.1f}"


def _stroke(path: str, dash: int = 0) -> Html:
    pattern = DASHES[dash % len(DASHES)] or None
    return tag("path", d=path, fill="none", stroke="currentColor", stroke_width=2, stroke_dasharray=pattern)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The values' range with some air; it starts at zero where the least value is not far from it."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    start = 0.0 if 0.04 * high < low < 0.35 * high else low - 0.07 * span
    return start, high + 0.07 * span


def _axes(at, x_range, y_range, x_ticks):
    across = list(x_ticks)
    if not across:
        values = ticks(*x_range)
        across = list(zip(values, tick_texts(values), strict=True))
    values = ticks(*y_range)
    for value, text in zip(values, tick_texts(values), strict=True):
        y = at(0, value)[1]
        yield tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=_f(y), y2=_f(y), class_="rule")
        yield tag("text", text, x=LEFT - 6, y=_f(y + 4.5), text_anchor="end")
    bottom = HEIGHT - BOTTOM
    yield tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom, class_="axis")
    free = -math.inf
    for value, text in across:
        x, half = at(value, 0)[0], 3.7 * len(text)
        yield tag("line", x1=_f(x), x2=_f(x), y1=bottom, y2=bottom + 4, class_="axis")
        if x - half >= free:  # a crowded axis names only as many ticks as fit
            yield tag("text", text, x=_f(x), y=bottom + 17, text_anchor="middle")
            free = x + half + 4


def _area(line, at, band):
    """The line's band; of a single point, a bar as wide as its marker."""
    ends = [[at(p.x, p.y + sign * band * p.y_error) for p in line.points] for sign in (1, -1)]
    if len(line.points) == 1:
        ends = [[(x - 5, y), (x + 5, y)] for ((x, y),) in ends]
    outline = " ".join(f"{_f(x)},{_f(y)}" for x, y in (*ends[0], *reversed(ends[1])))
    return tag("polygon", points=outline, class_="band")


def _draw(line, at, bars):
    places = [at(p.x, p.y) for p in line.points]
    own = [point for point in line.points if not point.shared]
    for point in own if bars else ():
        for low, high, across in (
            (at(point.x - point.x_error, point.y), at(point.x + point.x_error, point.y), True),
            (at(point.x, point.y - point.y_error), at(point.x, point.y + point.y_error), False),
        ):
            if math.dist(low, high) < 1:
                continue
            caps = [f"M{_f(a)} {_f(b - 3)}v6" if across else f"M{_f(a - 3)} {_f(b)}h6" for a, b in (low, high)]
            bar = f"M{_f(low[0])} {_f(low[1])}L{_f(high[0])} {_f(high[1])}"
            yield tag("path", d=bar + "".join(caps), fill="none", stroke="currentColor", stroke_opacity=0.55)
    if len(places) > 1:
        yield _stroke("M" + "L".join(f"{_f(x)} {_f(y)}" for x, y in places), line.dash)
    for point in own:
        x, y = at(point.x, point.y)
        if point.ring:
            yield tag("circle", cx=_f(x), cy=_f(y), r=10, fill="none", stroke="currentColor", stroke_width=2)
        yield marker(line.style, x, y, point.note)


def _labels(lines, at):
    """Each point's label where it covers the least: among eight places around the point."""
    taken = []  # (left, top, right, bottom, weight)
    for line in lines:
        places = [at(p.x, p.y) for p in line.points]
        taken += [(x - 6, y - 6, x + 6, y + 6, 4) for x, y in places]
        for (x0, y0), (x1, y1) in zip(places, places[1:], strict=False):
            for i in range(1, 16):
                x, y = x0 + (x1 - x0) * i / 16, y0 + (y1 - y0) * i / 16
                taken.append((x - 1, y - 1, x + 1, y + 1, 1))
    for line in lines:
        for point in line.points:
            if not point.label or point.shared:
                continue
            x, y = at(point.x, point.y)
            wide, far = 7.4 * len(point.label), 14 if point.ring else 9
            boxes: list[tuple[int, int, tuple[float, float, float, float]]] = []
            for dx, dy in ((0, -1), (0, 1), (1, 0), (-1, 0), (1, -1), (-1, -1), (1, 1), (-1, 1)):
                reach = 0.75 * far if dx and dy else far
                left, top = x + dx * reach + (dx - 1) * wide / 2, y + dy * reach + (dy - 1) * 6
                box = (left, top, left + wide, top + 12)
                outside = 8 * (box[0] < LEFT or box[2] > WIDTH or box[1] < TOP - 12 or box[3] > HEIGHT - BOTTOM)
                hit = sum(t[4] for t in taken if t[0] < box[2] and box[0] < t[2] and t[1] < box[3] and box[1] < t[3])
                boxes.append((hit + outside, len(boxes), box))
            box = min(boxes)[2]
            taken.append((*box, 6))
            centre, base = _f((box[0] + box[2]) / 2), _f(box[3] - 1)
            text = tag("text", point.label, x=centre, y=base, text_anchor="middle", class_="label")
            yield tag("g", text, class_=f"p{line.style % COLOURS}")
