"""A record and pictures to make pages of, and a page as its parser sees it."""

from html.parser import HTMLParser

import torch

from priorguide.sample.matched import matched

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Everything in a page that the tests ask about; fails where tags do not balance."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag not in ("b", "small", "span", "code"):
            self.texts.append(" ")

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def pictures(self) -> list[dict[str, str | None]]:
        return [attrs for attrs in self.all("img") if "data-row" in attrs]

    @property
    def sections(self) -> list[str | None]:
        return [attrs.get("aria-labelledby") for attrs in self.all("section")]


def row(prior: str, scale: float, fd: float, psnr: float) -> dict:
    return {
        "prior": prior,
        "scales": [scale],
        "metrics": {
            "fd": {"value": fd, "error": 0.31},
            "kid": {"value": fd / 300, "error": 0.0011},
            "psnr": {"value": psnr, "error": 0.094},
            "accuracy": {"value": 0.5 + scale / 100, "error": 0.016},
            "coverage": {"value": 0.7 - scale / 100, "error": 0.014},
        },
        "seconds_per_image": 0.0121,
        "evaluations": 25 if scale == 1 else 50,
        "extra_bytes": 2_858_438 if prior == "base" else 0,
        "peak_bytes": 23_200_000 if prior == "self" else 12_100_000,
    }


def a_record() -> dict:
    rows = [row("none", 1.0, 6.2, 16.6)]
    for scale, fd_self, fd_base in ((1.5, 5.7, 5.3), (3.0, 7.2, 4.9)):
        rows += [row("self", scale, fd_self, 16.8 + scale / 10), row("base", scale, fd_base, 17 + scale / 10)]
    return {
        "title": "Garments from their edges",
        "task": "edges",
        "description": "A small network fine-tuned to draw from edges.",
        "rows": rows,
        "verdict": {
            "prior": "base",
            "scales": [3.0],
            "confident": True,
            "decide_by": "kid",
            "sentence": "Deploy base at scale 3: it beats self at 1.5.",
            "chosen": {"self": [1.5], "base": [3.0]},
            "rule": {"baseline": "self", "level": 0.95},
            "conditions": 1000,
            "comparisons": [
                {
                    "prior": "base",
                    "scales": [3.0],
                    "baseline_scales": [1.5],
                    "metric": "kid",
                    "difference": -0.0041,
                    "interval": [-0.0067, -0.0015],
                    "guards": {"psnr": {"difference": 0.41, "interval": [0.33, 0.49], "allowed": 0.1, "holds": True}},
                    "outcome": "better",
                }
            ],
        },
        "matched": matched(rows, {"self": [1.5], "base": [3.0]}, "self", "kid", ["psnr", "accuracy"]),
        "needed": {},
        "health": {
            name: {"log_snr": [4.0, 0.0, -4.0], "loss": loss, "gap": gap, "sentence": told}
            for name, loss, gap, told in (
                ("self", [0.3, 0.2, 0.1], [0.0, 0.0, 0.0], None),
                ("base", [0.33, 0.2, 0.09], [0.2, 0.1, 0.05], "base knows the data."),
            )
        },
        "history": [
            {"step": s, "rows": [row("self", 3.0, 9 - s / 100, 16), row("base", 3.0, 8 - s / 100, 16)]}
            for s in (100, 200)
        ],
        "floor": {"fd": {"value": 0.63, "error": 0.05}, "kid": 0.0002},
        "sampling": {"scheduler": "ddim", "steps": 25, "options": {"clip_sample": True}},
        "seconds_total": 160,
        "environment": {"torch": "2.13.0"},
        "bundle": "runs/bundle",
        "how_to_sample": [{"title": "Command line", "code": "priorguide sample runs/bundle --seed 0"}],
    }


def some_pictures(count: int = 8, side: int = 16) -> dict:
    draw = torch.Generator().manual_seed(0)
    names = ("self, scale 1.5", "base, scale 3")
    return {
        "condition": torch.rand(count, 1, side, side, generator=draw),
        "target": torch.rand(count, 3, side, side, generator=draw),
        "candidates": {name: torch.rand(count, 3, side, side, generator=draw) for name in names},
        "caption": [f"coat {i}" for i in range(count)],
    }
