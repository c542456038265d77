import base64
import copy
import hashlib
import io
import json
import re
from urllib.parse import unquote

import pytest
import torch
from pages import Page, a_record, row, some_pictures
from PIL import Image
from rich.console import Console

from priorguide.callbacks.charts import Line, Point, curves, tick_texts, ticks
from priorguide.callbacks.gallery import BUDGET, most_different
from priorguide.callbacks.quantities import duration, measured, memory, number
from priorguide.callbacks.report import write_report
from priorguide.callbacks.tables import numbers, terminal_table


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return write_report(tmp_path_factory.mktemp("page"), a_record(), some_pictures()).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


def test_order_of_the_page(page):
    order = ["verdict", "tradeoff", "matched", "best", "table", "health", "vote", "pictures"]
    order += ["scale", "training", "sample", "measured"]
    assert page.sections == order
    assert {attrs.get("id") for attrs in page.all("h2")} == set(order)


def test_nothing_is_fetched_and_only_its_own_script_runs(text, page):
    assert not re.search(r"(?:https?:)?//|@import|url\(", re.sub(r'src="data:image/png;base64,[^"]*"', "", text))
    assert page.all("script") == [{}] and not page.all("link") and not page.all("iframe")
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    (policy,) = [attrs["content"] for attrs in page.all("meta") if attrs.get("http-equiv")]
    assert policy.startswith("default-src 'none'")
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.endswith(f"; script-src 'sha256-{digest}'")


def test_a_page_of_one_candidate_has_no_script_and_no_vote(tmp_path):
    pictures = some_pictures()
    del pictures["candidates"]["base, scale 3"]
    record = a_record()
    del record["verdict"]["chosen"]["base"]
    page = Page(write_report(tmp_path, record, pictures).read_text())
    assert not page.all("script") and "vote" not in page.sections and "One over the other" not in page.text


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
    images = page.pictures
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
    shown = [attrs["alt"] for attrs in page.pictures if attrs["alt"].startswith("target")]
    ranked = [i for i in most_different([same, other]) if i > 5]
    assert ranked[:2] in ([10, 7], [7, 10])
    assert shown == [f"target: coat {i}" for i in (0, 1, 2, 3, 4, 5, *ranked)]


def test_table_has_headers_winner_and_uncertainty(page):
    heads = [attrs["scope"] for attrs in page.all("th")]
    assert heads.count("row") >= 6 + 1 and "col" in heads
    text = page.text
    for expected in ("4.9 ± 0.3", "17.30 ± 0.09", "53.0 ± 1.6", "12.1 ms", "2.9 MB", "0.63 ± 0.05"):
        assert expected in text
    assert text.count("base, γ 3 verdict") == 2  # beside its rivals, and among all rows
    assert "−0.0041 [−0.0067, −0.0015]" in text and "PSNR dB +0.41 [+0.33, +0.49], may lose 0.1: holds" in text
    assert all(attrs["class"] == "numbers" for attrs in page.all("table")[:3])


def test_charts_are_described_and_coloured_alike(text, page):
    charts = [attrs for attrs in page.all("svg") if attrs.get("class") == "chart"]
    assert len(charts) == 2 + 2 + 5 + 5 and all(attrs["role"] == "img" and attrs["aria-label"] for attrs in charts)
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
    assert seen == {"base": 14, "self": 12}


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
    record["needed"] = {attack: 10**6}
    record["health"][attack] = {**record["health"]["base"], "sentence": attack}
    record["matched"][0]["priors"][attack] = None
    record["votes"] = {"ballots": {attack: []}, "pairs": [{"pair": [attack] * 2, "wins": [1, 0], "same": 0}]}
    record["votes"]["pairs"][0]["interval"] = [0.0, 1.0]
    record["override"] = {"prior": attack, "scales": [3.0], "reason": attack, "date": attack}
    record["rows"][0]["metrics"][attack] = {"value": 1.0, "error": 0.1}
    pictures = some_pictures()
    pictures["candidates"][attack] = pictures["candidates"]["base, scale 3"]
    pictures["caption"][0] = attack
    pictures["arms"] = {(attack, (s,)): pictures["candidates"][attack] for s in (1.0, 2.0)}
    page = Page(write_report(tmp_path, record, pictures).read_text())
    assert len(page.all("script")) == 1
    assert all(attrs["src"].startswith("data:") and "onerror" not in attrs for attrs in page.pictures)
    assert not any("src" in attrs for attrs in page.all("img") if attrs not in page.pictures)
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
    record["matched"] = [entry for entry in record["matched"] if entry["agreement"] == "psnr"]
    del record["floor"]
    pictures = some_pictures() | {"target": None, "condition": None}
    page = Page(write_report(tmp_path, record, pictures).read_text())
    assert not {"Accuracy", "Coverage", "unseen"} & set(page.text.split())
    assert len(page.pictures) == 8 * 2 and "coat 0" in page.text
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
    assert page.text.count("none, γ 1 verdict") == 2


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
    pictures["arms"] = {("base", (scale,)): noise for scale in (1.0, 2.0, 3.0)}
    file = write_report(tmp_path, a_record(), pictures)
    assert file.stat().st_size < 5_000_000
    page = Page(file.read_text())
    shown = [attrs for attrs in page.pictures if "scale" not in attrs["data-name"]]
    assert len(shown) == 36 and sum(len(attrs["src"]) for attrs in shown) < 1.01 * BUDGET
    assert len(page.pictures) - 36 == 3 * 3, "fewer conditions at every scale, since they are large"
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


def test_real_pictures_are_told_to_the_digits_of_the_rows():
    page = str(numbers(a_record(), a_record()["rows"], ""))
    assert "<td>0.0002</td>" in page.partition("unseen real pictures")[2]  # a KID of 0.0002 beside ± 0.0011


def terminal(record: dict, width: int = 100) -> list[str]:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(terminal_table(record))
    return console.file.getvalue().splitlines()


def test_terminal_table_fits_and_marks_the_winner():
    lines = terminal(a_record())
    assert max(map(len, lines)) <= 100
    (winner,) = [line for line in lines if "▶" in line]
    assert winner.split()[:3] == ["▶", "base", "3"]
    for cell in ("4.9 ± 0.3", "17.30 ± 0.09", "53.0 ± 1.6", "67.0 ± 1.4", "12.1 ms", "50", "12 MB"):
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
        del entry["metrics"]["coverage"], entry["peak_bytes"]
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


def test_distances_at_matched_agreement_are_told_or_said_not_to_be_reached(tmp_path):
    record = a_record()
    (table,) = re.findall(r'<section aria-labelledby="matched">.*?</section>', render_text(tmp_path, record))
    text = " ".join(Page(table).text.split())
    assert "self, γ 1.5 0.0190 ± 0.0011" in text  # the baseline at its own scale, in every column
    # base passes PSNR 16.6 (scale 1) and 17.15 (scale 1.5): 16.95 lies 0.35 / 0.55 of the way from KID 6.2 to 5.3 / 300
    place = record["matched"][0]["priors"]["base"]
    assert place["distance"] == pytest.approx((6.2 - 0.9 * 0.35 / 0.55) / 300)
    assert f"{measured(place['distance'], place['error'])} scale 1.32" in text
    record["matched"][0]["priors"]["base"] = None
    record["matched"][0]["level"]["value"] = 20.0
    assert "not reached its most is 17.30" in Page(render_text(tmp_path, record)).text
    record["matched"][0]["level"]["value"] = 2.0
    assert "not reached its least is 16.60" in Page(render_text(tmp_path, record)).text


def render_text(folder, record: dict) -> str:
    return write_report(folder, record).read_text()


def test_health_says_its_sentence_and_draws_the_loss_relative_to_the_models_own(tmp_path):
    record = a_record()
    text = render_text(tmp_path, record)
    (section,) = re.findall(r'<section aria-labelledby="health">.*?</section>', text)
    assert Page(section).text.count("base knows the data.") == 1
    notes = re.findall("<title>(.*?)</title>", section)
    assert {"base, log-SNR 4.0: 1.10", "base, log-SNR 0.0: 1.00", "base, log-SNR −4.0: 0.900"} <= set(notes)
    del record["health"]["self"]
    (section,) = re.findall(r'<section aria-labelledby="health">.*?</section>', render_text(tmp_path, record))
    assert section.count('class="chart"') == 1  # without the model's own loss, its gap alone


def test_what_would_settle_an_open_verdict_is_said(tmp_path):
    record = a_record() | {"needed": {"base": 35_724}}
    text = Page(render_text(tmp_path, record)).text
    assert "about 36,000 conditions would have an even chance to settle base against self: 35,000 more" in text
    record["needed"]["base"] = None
    assert "does not speak for base against self" in Page(render_text(tmp_path, record)).text


def test_bands_reach_as_far_as_the_intervals():
    line = Line(0, (Point(0, 10, y_error=1), Point(1, 10, y_error=2)))
    svg = curves([line], name="n", x_label="x", y_label="y", band=1.96)
    (outline,) = re.findall(r'<polygon points="([^"]*)" class="band"', svg)
    x, y = zip(*(map(float, pair.split(",")) for pair in outline.split()), strict=True)
    middle = float(re.search(r'<circle cx="[\d.]+" cy="([\d.]+)"', svg)[1])
    assert x[0] == x[3] < x[1] == x[2]
    assert (y[1] - y[2]) == pytest.approx(2 * (y[0] - y[3]), abs=0.3)
    assert (y[0] + y[3]) / 2 == pytest.approx(middle, abs=0.1)
    assert "v6" not in svg and "h6" not in svg  # no bars besides


def test_pictures_by_scale_are_in_order_and_shown_where_there_are_several(tmp_path):
    pictures = some_pictures()
    same = pictures["candidates"]["base, scale 3"]
    pictures["arms"] = {("base", (s,)): same for s in (10.0, 3.0, 1.5)}
    page = Page(write_report(tmp_path, a_record(), pictures).read_text())
    figures = [(attrs["data-prior"], attrs["data-scale"]) for attrs in page.all("figure") if "data-prior" in attrs]
    assert figures == 6 * [("base", "1.5"), ("base", "3"), ("base", "10")]
    pictures["arms"] = {("base", (3.0,)): same}
    assert not Page(write_report(tmp_path, a_record(), pictures).read_text()).all("details")


def test_pictures_without_a_condition_stand_beside_the_health(tmp_path):
    pictures = some_pictures() | {"alone": {name: torch.rand(6, 1, 16, 16) for name in ("self", "base")}}
    page = Page(write_report(tmp_path, a_record(), pictures).read_text())
    assert len(page.pictures) == 12 + len(
        Page(write_report(tmp_path, a_record(), some_pictures()).read_text()).pictures
    )
    assert "base: without a condition, 6" in [picture["alt"] for picture in page.pictures]
    assert "What each prior draws by itself" in page.text


def test_the_decision_record_can_be_saved_from_the_page(tmp_path):
    record = a_record() | {
        "candidates": {"base": {"candidate": "base", "network": "PixelUNet", "mix": 0.5, "scales": [[1.5], [3.0]]}},
        "checkpoints": [{"file": "checkpoints/last.ckpt", "step": 400, "sha256": "ab" * 32}],
        "data": {"held_out_sha256": "cd" * 32},
        "commit": "ef" * 20,
    }
    page = Page(write_report(tmp_path, record).read_text())
    (link,) = [a for a in page.all("a") if a.get("download") == "record.json"]
    assert json.loads(unquote(link["href"].removeprefix("data:application/json,"))) == record
    for told in (
        "base scales 1.5; 3; network PixelUNet; mix 0.5",
        "step 400, SHA-256 abababababab…",
        "ef" * 20,
        "cdcdcd",
    ):
        assert told in page.text, told
