"""A page of HTML in one file: tags whose text is escaped, and how it all looks."""

import base64
import hashlib
from html import escape
from typing import Any

LEAVES = {"meta", "img", "source", "input", "br", "circle", "line", "path", "rect", "polygon", "polyline"}


class Html(str):
    """Text that is HTML already."""


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element. Children that are not Html are escaped; None is left out; `class_` is class, `_` in names is `-`."""
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in LEAVES:
        return Html(f"<{name}{pairs}/>")
    return Html(f"<{name}{pairs}>{join(*children)}</{name}>")


def join(*children: Any) -> Html:
    """The children one after another, escaped unless Html."""
    return Html(
        "".join(child if isinstance(child, Html) else escape(str(child)) for child in children if child is not None)
    )


def document(title: str, *body: Html, style: str = "", script: str = "") -> Html:
    """The whole page; it may load nothing from anywhere and run nothing but `script`, which its own policy enforces."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    policy += f"; script-src 'sha256-{digest}'" if script else ""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(STYLE + style)),
    )
    scripts = [tag("script", Html(script))] if script else []
    return Html("<!doctype html>\n" + tag("html", head, tag("body", *body, *scripts), lang="en") + "\n")


# Lines are coloured after Okabe and Ito (2008), who chose colours that stay apart under colour blindness.
STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --soft: #59636e; --rule: #d9dee3; --tint: #f5f7f9;
  --good: #00684a; --good-tint: #e3f4ec; --open: #7a4b00; --open-tint: #fdf1d8;
  --p0: #0072b2; --p1: #d55e00; --p2: #00835f; --p3: #b0548a; --p4: #8a6d00; --p5: #3f3f46; }
@media (prefers-color-scheme: dark) { :root { --page: #111418; --ink: #e7eaee; --soft: #9aa5b1; --rule: #333a43;
  --tint: #1a1f25; --good: #5fd6a8; --good-tint: #12302a; --open: #f2c063; --open-tint: #35290f;
  --p0: #5bb8f0; --p1: #ff8f4d; --p2: #35c99b; --p3: #e79ac4; --p4: #e5cf4a; --p5: #c3c9d1; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", "Liberation Sans", sans-serif; -webkit-text-size-adjust: 100%; overflow-wrap: break-word; }
main { max-width: 70rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: clamp(1.5rem, 1.1rem + 2vw, 2.1rem); line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.015em; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 3rem 0 .4rem; letter-spacing: -.01em; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p, ul { margin: .3rem 0 .8rem; max-width: 44rem; }
.soft, figcaption { color: var(--soft); }
.small, figcaption, dl { font-size: .875rem; line-height: 1.45; }
.formula { font-family: "STIX Two Math", Cambria, "DejaVu Serif", Georgia, serif; white-space: nowrap; }
.verdict { margin: 1.4rem 0 0; padding: 1.1rem 1.25rem; border-radius: .6rem; background: var(--tint);
  border-left: .35rem solid var(--open); }
.verdict.clear { border-left-color: var(--good); }
.verdict h2 { margin: 0 0 .35rem; font-size: 1.45rem; }
.verdict p:last-child { margin-bottom: 0; }
.badge { display: inline-block; padding: .1rem .55rem; border-radius: 1rem; font-size: .8rem; font-weight: 600;
  line-height: 1.5; vertical-align: .2em; letter-spacing: 0; white-space: nowrap; background: var(--open-tint);
  color: var(--open); }
.badge.clear { background: var(--good-tint); color: var(--good); }
.key { display: inline-flex; align-items: center; gap: .35rem; margin-right: 1rem; white-space: nowrap; }
.key svg { width: 1.9rem; height: .9rem; flex: none; }
.keys { margin: .4rem 0 .2rem; font-size: .9rem; max-width: none; }
.p0 { color: var(--p0); } .p1 { color: var(--p1); } .p2 { color: var(--p2); }
.p3 { color: var(--p3); } .p4 { color: var(--p4); } .p5 { color: var(--p5); }
.charts { display: grid; gap: 1.2rem 1.6rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20.5rem), 1fr)); }
.charts.large { grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
figure { margin: .6rem 0 0; min-width: 0; }
.charts figure { max-width: 34rem; }
.chart { display: block; width: 100%; height: auto; overflow: visible; font-size: 13px; }
.chart text { fill: var(--soft); font-variant-numeric: tabular-nums; }
.chart .title { fill: var(--ink); font-weight: 600; }
.chart .label { fill: currentColor; font-weight: 600; paint-order: stroke; stroke: var(--page); stroke-width: 4px;
  stroke-linejoin: round; }
.chart .rule { stroke: var(--rule); } .chart .axis { stroke: var(--soft); }
.chart .band { fill: currentColor; fill-opacity: .16; }
.chart .level { stroke: var(--soft); stroke-dasharray: 2 4; }
.chart .level-text { paint-order: stroke; stroke: var(--page); stroke-width: 4px; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.wide table { min-width: 100%; }
.numbers th, .numbers td { padding: .42rem .5rem; text-align: right; border-bottom: 1px solid var(--rule);
  white-space: nowrap; font-weight: 400; font-size: .92rem; }
.numbers th:first-child, .numbers .words { text-align: left; }
.numbers th:first-child { position: sticky; left: 0; background: var(--page); }
.numbers thead th { vertical-align: bottom; color: var(--soft); font-size: .82rem; line-height: 1.3;
  white-space: normal; }
.numbers tbody + tbody tr:first-child > * { border-top: 2px solid var(--rule); }
.numbers tr.chosen > * { background: var(--good-tint); }
.numbers tr.chosen th { font-weight: 600; }
.numbers small { color: var(--soft); font-size: .8rem; }
.numbers b { font-weight: 700; }
.numbers td.words { white-space: normal; min-width: 9rem; }
.numbers td.long { min-width: 15rem; }
.numbers .interval { display: block; width: 9rem; height: 1.1rem; margin-left: auto; }
.verdict .numbers tr:not(.chosen) > :first-child { background: var(--tint); }
.numbers th svg { vertical-align: -.12em; }
.numbers .free { white-space: normal; }
.pictures { display: grid; gap: 1.5rem 2.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 29rem), 1fr)); }
.pictures.large { grid-template-columns: 1fr; }
.pictures table { width: 100%; table-layout: fixed; border-spacing: 0; }
.pictures th, .pictures td { padding: .2rem; font-weight: 400; font-size: .8rem; line-height: 1.25; text-align: center;
  vertical-align: top; overflow-wrap: anywhere; hyphens: auto; }
.pictures thead th { vertical-align: bottom; padding-bottom: .35rem; font-weight: 600; }
.pictures .text { vertical-align: middle; width: clamp(4.2rem, 12%, 8rem); }
.pictures img { display: block; width: 100%; height: auto; margin: 0 auto; border-radius: 2px; }
.pixels { image-rendering: pixelated; }
pre { margin: .3rem 0 1rem; padding: .8rem 1rem; border-radius: .5rem; background: var(--tint); overflow-x: auto;
  font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; font-size: .92em; }
pre code { font-size: inherit; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) minmax(0, 1fr); gap: .25rem 1.2rem;
  margin: .5rem 0 1rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; }
:focus-visible { outline: 2px solid var(--p0); outline-offset: 2px; }
@media (max-width: 40rem) {
  main { padding-top: 1.2rem; }
  .verdict { padding: .9rem 1rem; }
  .numbers th, .numbers td { padding: .35rem .35rem; font-size: .85rem; vertical-align: top; }
  .numbers td small, .numbers th .badge { display: block; width: fit-content; margin-left: auto; line-height: 1.3; }
  .numbers th .badge { margin: 0; }
  .numbers tbody th { white-space: normal; min-width: 7.6rem; }
  .pictures th, .pictures td { padding: .1rem; font-size: .72rem; }
}
@media print { .wide { overflow: visible; } figure, tr, pre { break-inside: avoid; } }
"""
