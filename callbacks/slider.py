"""One candidate's picture over another's with a slider between them, and every candidate's pictures by scale."""

from collections.abc import Mapping
from typing import Any

from .gallery import ROWS, embedded, encode
from .page import Html, tag
from .panels import check_pictures
from .quantities import candidate_text, scale_text
from .records import rates

BUDGET = 1_000_000
"""Characters that the pictures by scale may take, beside the gallery's."""


def slider(names: list[str]) -> Html | None:
    """Where two candidates lie one over the other, which its script fills with the page's pictures; none with one."""
    if len(names) < 2:
        return None
    sides = []
    for number, side in enumerate(("left", "right")):
        choices = (
            tag("option", name, value=name, selected="" if i == number else None) for i, name in enumerate(names)
        )
        axis = tag("input", type="range", min=0, max=0, step=1, value=0, aria_label=f"Scale of the {side}")
        sides.append(
            tag(
                "fieldset",
                tag("legend", side.capitalize()),
                tag("select", *choices, aria_label=f"Candidate on the {side}"),
                tag("label", tag("span"), axis, class_="axis", hidden=""),
                data_side=side,
            )
        )
    stage = tag(
        "div",
        tag("img", class_="under", alt=""),
        tag("img", class_="over", alt=""),
        tag("span", class_="bar"),
        tag("input", type="range", min=0, max=100, step=1, value=50, aria_label="How much of the left picture is seen"),
        class_="stage",
    )
    return tag(
        "div",
        tag("h3", "One over the other"),
        tag("label", "Condition ", tag("select", class_="row")),
        tag("div", *sides, class_="sides"),
        stage,
        tag("p", class_="small soft told", role="status"),
        class_="slider",
        hidden="",
    )


def by_scale(pictures: Mapping[str, Any]) -> Html | None:
    """The first conditions' pictures at every scale, in a fold; none where no candidate has several scales.

    pictures: "arms" {(prior, scales): (N, 1 or 3, H, W) in [0, 1], or clips}, "caption" and "fps" as for `gallery`.
    """
    given = pictures.get("arms") or {}
    priors = dict.fromkeys(prior for prior, _ in given)
    if all(sum(prior == other for other, _ in given) < 2 for prior in priors):
        return None
    total = len(next(iter(given.values())))
    arms = {arm: check_pictures(candidate_text(*arm), value, total).detach().cpu() for arm, value in given.items()}
    size = max(max(value.shape[-2:]) for value in arms.values())
    for count in (min(ROWS, total), min(ROWS // 2, total)):
        data, side = encode(arms, range(count), rates(pictures, total), BUDGET)
        if side >= min(size, 128):
            break
    captions = [str(text) for text in pictures.get("caption") or [""] * total]
    blocks = []
    for row in range(count):
        about = captions[row] or f"condition {row + 1}"
        blocks.append(tag("h4", about))
        for prior in priors:
            cells = []
            for name, scales in sorted(arm for arm in arms if arm[0] == prior):
                arm = name, scales
                image = embedded(data[arm, row], arms[arm], candidate_text(*arm), row, about)
                caption = tag("figcaption", f"γ {scale_text(scales)}")
                cells.append(tag("figure", image, caption, data_prior=prior, data_scale=scale_text(scales)))
            blocks.append(tag("div", tag("span", prior), *cells, class_="strip"))
    shrunk = f", shown at {side} of {size} pixels" if side < size else ""
    return tag("details", tag("summary", f"The first {count} conditions at every scale{shrunk}"), *blocks)
