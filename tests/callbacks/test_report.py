import base64
import copy
import io
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image
from rich.console import Console

from priorguide.callbacks.charts import Line, Point, curves, tick_texts, ticks
from priorguide.callbacks.gallery import BUDGET, most_different
from priorguide.callbacks.quantities import duration, measured, memory, number
from priorguide.callbacks.report import write_report
from priorguide.callbacks.tables import terminal_table

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
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

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


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return write_report(tmp_path_factory.mktemp("page"), a_record(), some_pictures()).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


def test_order_of_the_page(page):
    order = ["verdict", "tradeoff", "table", "pictures", "scale", "training", "sample", "measured"]
    assert page.sections == order
    assert {attrs.get("id") for attrs in page.all("h2")} == set(order)


def test_nothing_is_fetched_and_nothing_runs(text, page):
    assert not re.search(r"(?:https?:)?//|@import|url\(", re.sub(r'src="data:image/png;base64,[^"]*"', "", text))
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    (policy,) = [attrs["content"] for attrs in page.all("meta") if attrs.get("http-equiv")]
    assert policy.startswith("default-src 'none'")


def test_verdict_is_said_once_and_first(page):
    assert "Deploy base at scale 3 clear result It beats self at 1.5." in page.text
    assert page.text.count("Deploy base at scale 3") == 1
    assert "uncond + γ (cond − uncond)" in page.text


def test_uncertain_verdict_says_so(tmp_path):
    record = a_record()
    record["verdict"] |= {"prior": "self", "scales": [1.5], "confident": False, "sentence": "No clear winner: self."}
    page = Page(write_report(tmp_path, record).read_text())
    assert "Deploy self at scale 1.5 no clear winner" in page.text and "clear result" not in page.text


def test_all_pictures_are_embedded_named_and_whole(page):
    images = page.all("img")
    assert len(images) == 8 * 4  # 6 fixed and the 2 others, of condition, 2 candidates and target
    pictures = some_pictures()
    for attrs in images:
        kind, data = attrs["src"].split(",")
        assert kind == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (16, 16)
    first = next(attrs for attrs in images if attrs["alt"] == "base, scale 3: coat 0")
    decoded = Image.open(io.BytesIO(base64.b64decode(first["src"].split(",")[1])))
    expected = (pictures["candidates"]["base, scale 3"][0] * 255).round().byte().permute(1, 2, 0)
    assert decoded.tobytes() == expected.numpy().tobytes()


def test_picked_pictures_are_those_that_differ_most_and_said_to_be(tmp_path):
    pictures = some_pictures(12)
    same = pictures["candidates"]["self, scale 1.5"]
    other = same.clone()
    for i, shift in ((7, 0.3), (10, 0.6), (2, 0.9)):
        other[i] = (same[i] + shift) % 1
    pictures["candidates"]["base, scale 3"] = other
    assert most_different([same, other])[:1] in ([2], [10])
    page = Page(write_report(tmp_path, a_record(), pictures).read_text())
    assert "The first 6 of 12, whatever they show." in page.text
    assert "Picked from the other 6 because the candidates differ most on them: not typical." in page.text
    shown = [attrs["alt"] for attrs in page.all("img") if attrs["alt"].startswith("target")]
    ranked = [i for i in most_different([same, other]) if i > 5]
    assert ranked[:2] in ([10, 7], [7, 10])
    assert shown == [f"target: coat {i}" for i in (0, 1, 2, 3, 4, 5, *ranked)]


def test_table_has_headers_winner_and_uncertainty(page):
    heads = [attrs["scope"] for attrs in page.all("th")]
    assert heads.count("row") >= 6 + 1 and "col" in heads
    text = page.text
    for expected in ("4.9 ± 0.3", "17.30 ± 0.09", "53.0 ± 1.6", "12.1 ms", "2.9 MB", "0.63 ± 0.05"):
        assert expected in text
    assert text.count("base, γ 3 deploy") == 2  # beside its rivals under the verdict, and among all rows
    assert "−0.0041 [−0.0067, −0.0015]" in text and "PSNR dB +0.41 [+0.33, +0.49], may lose 0.1: holds" in text
    assert all(attrs["class"] == "numbers" for attrs in page.all("table")[:3])


def test_charts_are_described_and_coloured_alike(text, page):
    charts = [attrs for attrs in page.all("svg") if attrs.get("class") == "chart"]
    assert len(charts) == 2 + 5 + 5 and all(attrs["role"] == "img" and attrs["aria-label"] for attrs in charts)
    # Every marker of base is a square (polygon) in colour 1, self a circle in colour 0, all over the page.
    seen = {"base": 0, "self": 0}
    for chart in re.findall(r'<svg class="chart".*?</svg>', text):
        for style, group in re.findall(r'<g class="p(\d)">(.*?)(?=<g class="p|</svg>)', chart):
            if "<title>base" in group:
                assert style == "1" and "<polygon" in group
                seen["base"] += 1
            if "<title>self" in group:
                assert style == "0" and "<circle" in group
                seen["self"] += 1
    assert seen == {"base": 12, "self": 12}


def test_text_is_escaped(tmp_path):
    attack = '<script>alert(1)</script><img src="x" onerror="y">"\'&'
    record = a_record()
    record |= {"title": attack, "description": attack, "bundle": attack, "environment": {attack: attack}}
    record["sampling"] = {attack: [attack]}
    record["how_to_sample"] = [{"title": attack, "code": attack}]
    record["rows"].append(row(attack, 3.0, 5, 17))
    record["history"][0]["rows"].append(row(attack, 3.0, 5, 17))
    record["verdict"] |= {"sentence": attack, "prior": attack}
    record["verdict"]["comparisons"][0] |= {"prior": attack, "outcome": attack, "guards": {attack: attack}}
    record["rows"][0]["metrics"][attack] = {"value": 1.0, "error": 0.1}
    pictures = some_pictures()
    pictures["candidates"][attack] = pictures["candidates"]["base, scale 3"]
    pictures["caption"][0] = attack
    page = Page(write_report(tmp_path, record, pictures).read_text())
    assert not page.all("script")
    assert all(attrs["src"].startswith("data:") and "onerror" not in attrs for attrs in page.all("img"))
    assert page.text.count("<script>alert(1)</script>") > 10


@pytest.mark.parametrize(
    ("missing", "section"),
    [("history", "training"), ("verdict", "verdict"), ("how_to_sample", "sample"), ("rows", "table")],
)
def test_missing_parts_are_left_out(tmp_path, missing, section):
    record = a_record()
    del record[missing]
    page = Page(write_report(tmp_path, record, some_pictures()).read_text())
    assert section not in page.sections and "measured" in page.sections
    assert "None" not in page.text and "nan" not in page.text


def test_missing_metrics_and_pictures_are_left_out(tmp_path):
    record = a_record()
    for entry in (*record["rows"], *(r for h in record["history"] for r in h["rows"])):
        for key in ("accuracy", "coverage"):
            del entry["metrics"][key]
    del record["floor"]
    pictures = some_pictures() | {"target": None, "condition": None}
    page = Page(write_report(tmp_path, record, pictures).read_text())
    assert not {"Accuracy", "Coverage", "unseen"} & set(page.text.split())
    assert len(page.all("img")) == 8 * 2 and "coat 0" in page.text
    assert "pictures" not in Page(write_report(tmp_path, record).read_text()).sections
    bare = Page(write_report(tmp_path, {"rows": []}).read_text())
    assert bare.sections == []


def test_not_measured_and_not_finite_numbers(tmp_path):
    record = a_record()
    record["rows"][1]["metrics"]["psnr"] = {"value": float("inf"), "error": float("nan")}
    record["rows"][2]["metrics"]["fd"] = {"value": float("nan"), "error": None}
    page = Page(write_report(tmp_path, record).read_text())
    assert "∞" in page.text and "nan" not in page.text and "inf " not in page.text
    numbers = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("x", "y", "cx", "cy", "d", "points")]
    assert numbers and not any("nan" in v or "inf" in v for v in numbers)


def test_scale_one_is_shared_and_may_win(tmp_path):
    record = a_record()
    record["verdict"] |= {"prior": "self", "scales": [1.0], "chosen": {"self": [1.0], "base": [3.0]}}
    page = Page(write_report(tmp_path, record).read_text())
    assert page.text.count("none, γ 1 deploy") == 2


def test_two_scales(tmp_path):
    record = a_record() | {"history": []}
    record["rows"] = []
    for prior, first, second in (("none", 1.0, 7.5), ("self", 1.5, 7.5), ("base", 1.5, 7.5), ("base", 2.0, 3.0)):
        record["rows"].append(row(prior, first, 5, 17) | {"scales": [first, second]})
    record["verdict"] |= {"scales": [1.5, 7.5], "chosen": {"self": [1.5, 7.5], "base": [1.5, 7.5]}, "comparisons": []}
    page = Page(write_report(tmp_path, record).read_text())
    assert "Deploy base at scale 1.5, 7.5" in page.text and "p₀ + Σₖ γₖ (pₖ − pₖ₋₁)" in page.text
    assert "base, other scale 7.5" in page.text and "scale γ₁" in page.text


def test_large_pictures_are_shrunk_to_keep_the_page_small(tmp_path):
    noise = torch.rand(12, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    pictures = {"candidates": {"self": noise, "base": noise.flip(0), "other": noise.flip(2)}}
    file = write_report(tmp_path, a_record(), pictures)
    assert file.stat().st_size < 5_000_000
    page = Page(file.read_text())
    assert len(page.all("img")) == 36 and sum(len(attrs["src"]) for attrs in page.all("img")) < 1.01 * BUDGET
    assert re.search(r"Shown at \d+ of 256 pixels", page.text)


def test_pictures_of_other_shapes_are_refused(tmp_path):
    pictures = some_pictures()
    with pytest.raises(ValueError, match="target must be pictures"):
        write_report(tmp_path / "a", a_record(), pictures | {"target": torch.zeros(3, 3, 16, 16)})
    with pytest.raises(ValueError, match="caption must be 8 texts"):
        write_report(tmp_path / "a", a_record(), pictures | {"caption": ["one"]})
    assert not (tmp_path / "a").exists()


def test_a_failed_write_leaves_the_last_page_and_nothing_else(tmp_path, monkeypatch):
    file = write_report(tmp_path, a_record())
    before = file.read_bytes()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_report(tmp_path, a_record() | {"title": "another"})
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_path_is_a_folder_or_the_file_itself(tmp_path):
    assert write_report(tmp_path / "new" / "report", {}) == tmp_path / "new" / "report" / "index.html"
    assert write_report(tmp_path / "x.html", {}) == tmp_path / "x.html"


def test_the_record_is_left_as_it_was(tmp_path):
    record = a_record()
    before = copy.deepcopy(record)
    write_report(tmp_path, record, some_pictures())
    terminal_table(record)
    assert record == before


def terminal(record: dict, width: int = 100) -> list[str]:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(terminal_table(record))
    return console.file.getvalue().splitlines()


def test_terminal_table_fits_and_marks_the_winner():
    lines = terminal(a_record())
    assert max(map(len, lines)) <= 100
    (winner,) = [line for line in lines if "▶" in line]
    assert winner.split()[:3] == ["▶", "base", "3"]
    for cell in ("4.9 ± 0.3", "17.30 ± 0.09", "53.0 ± 1.6", "67.0 ± 1.4", "12.1 ms", "50", "2.9 MB"):
        assert cell in winner
    heads = " ".join(" ".join(lines[:6]).split())
    for head in ("prior", "scale", "Fréchet", "PSNR", "Accuracy", "Coverage", "time per", "ations", "memory"):
        assert head in heads


def test_terminal_table_says_the_power_of_ten_of_small_numbers():
    lines = terminal(a_record())
    assert "×10³" in "".join(lines) and "16.3 ± 1.1" in next(line for line in lines if "▶" in line)


def test_terminal_table_folds_long_names_and_omits_what_is_missing():
    record = a_record()
    for entry in record["rows"]:
        del entry["metrics"]["coverage"], entry["extra_bytes"]
        entry["prior"] = {"base": "an earlier checkpoint of it"}.get(entry["prior"], entry["prior"])
    lines = terminal(record)
    assert max(map(len, lines)) <= 100 and "Coverage" not in "".join(lines) and "memory" not in "".join(lines)
    assert any("checkpoint" in line for line in lines)
    assert "[red]" in "\n".join(terminal({"rows": [row("[red]x", 2.0, 5, 17)]}))


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (7.234, 0.31, "7.2 ± 0.3"),
        (0.01854, 0.00104, "0.0185 ± 0.0010"),
        (17.302, 0.094, "17.30 ± 0.09"),
        (1234.5, 99.7, "1,234 ± 100"),
        (12.6, 0.99, "12.6 ± 1.0"),
        (-0.5, 0.2, "−0.5 ± 0.2"),
        (0.123456, 0.0, "0.123"),
        (1234.5, 0.0, "1,234"),
        (0.0, 0.0, "0"),
        (float("inf"), 0.0, "∞"),
    ],
)
def test_numbers_have_the_digits_that_their_error_allows(value, error, expected):
    assert measured(value, error) == expected


def test_units():
    assert [duration(s) for s in (0.00062, 0.0121, 0.9999, 59.96, 160, 3900)] == [
        "0.62 ms", "12.1 ms", "1.0 s", "1 min 0 s", "2 min 40 s", "1 h 5 min",
    ]  # fmt: skip
    assert [memory(b) for b in (0, 999, 2_858_438, 17_200_000, 3.4e9, 5e13)] == [
        "none", "999 B", "2.9 MB", "17 MB", "3.4 GB", "50,000 GB",
    ]  # fmt: skip
    assert number(0.004, 0.001, sign=True) == "+0.0040"


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (4.6, 12.9), (-0.003, 0.05), (16.4, 18.1), (0, 4e5)])
def test_ticks_are_round_within_and_evenly_spaced(low, high):
    values = ticks(low, high)
    assert 3 <= len(values) <= 8 and low <= values[0] and values[-1] <= high
    steps = {round(b - a, 9) for a, b in zip(values, values[1:], strict=False)}
    assert len(steps) == 1
    texts = tick_texts(values)
    assert len(set(texts)) == len(texts)
    assert [float(text.replace(",", "").replace("−", "-")) for text in texts] == pytest.approx(values)


def test_chart_places_points_by_their_values():
    points = (Point(0, 10, label="a"), Point(1, 20, y_error=2), Point(2, 10), Point(3, float("nan")))
    svg = curves([Line(0, points)], name="n", x_label="x", y_label="y")
    x, y = zip(*((float(a), float(b)) for a, b in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)), strict=True)
    assert len(x) == 3 and x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.11)
    assert y[0] == y[2] > y[1]
    assert curves([], name="n", x_label="x", y_label="y") == ""
