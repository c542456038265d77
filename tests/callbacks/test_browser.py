"""The page's script in a real browser: the slider, the scale axis and the blind vote."""

import json
from urllib.parse import unquote

import pytest
import torch
from browser import CHROMIUM, DRIVER, Browser
from pages import a_record, some_pictures

from priorguide.callbacks.report import write_report
from priorguide.callbacks.votes import candidates, with_votes

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
    pytest.mark.skipif(DRIVER is None, reason="chromedriver is not installed"),
]
SIDE, STAGE = 'fieldset[data-side="{}"] ', ".stage input"


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    pictures = some_pictures()
    draw = torch.Generator().manual_seed(1)
    scales = {"self": (1.0, 1.5, 3.0), "base": (1.0, 1.5, 3.0)}
    pictures["arms"] = {(p, (s,)): torch.rand(8, 3, 16, 16, generator=draw) for p, all_ in scales.items() for s in all_}
    for prior, scale in (("self", 1.5), ("base", 3.0)):
        pictures["arms"][prior, (scale,)] = pictures["candidates"][f"{prior}, scale {scale:g}"]
    pictures["alone"] = {name: torch.rand(6, 3, 16, 16, generator=draw) for name in ("self", "base")}
    return write_report(tmp_path_factory.mktemp("page"), a_record(), pictures).as_uri()


@pytest.fixture
def page(browser, address) -> Browser:
    browser.look(1000)
    browser.open(address)
    return browser


def over(page: Browser) -> tuple[str, str, str]:
    """What lies on the left and on the right of the divider, and the clip of the upper picture."""
    body = """const [over, under] = ['.over', '.under'].map((name) => document.querySelector('.stage ' + name));
              return [over.alt, under.alt, over.style.clipPath]"""
    return tuple(page.evaluate(body))


def test_nothing_is_fetched_and_the_policy_lets_the_script_run(page):
    assert page.complaints() == []
    assert (
        page.evaluate("return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:'))") == []
    )
    assert page.evaluate("return !document.querySelector('.slider').hidden && !document.querySelector('.booth').hidden")
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.bad=1'}))"
    )
    assert page.evaluate("return window.bad") is None


def test_the_slider_follows_the_pointer(page):
    assert over(page) == ("self, scale 1.5: coat 0", "base, scale 3: coat 0", "inset(0px 50% 0px 0px)")
    page.drag(STAGE, 0.5, 0.8)
    assert page.evaluate("return Number(document.querySelector('.stage input').value)") == pytest.approx(80, abs=2)
    left = page.evaluate(
        """const stage = document.querySelector('.stage').getBoundingClientRect();
           const bar = document.querySelector('.bar').getBoundingClientRect();
           return (bar.left + bar.width / 2 - stage.left) / stage.width"""
    )
    assert left == pytest.approx(0.8, abs=0.02)


def test_the_slider_follows_the_keyboard_and_says_what_it_is(page):
    page.type(STAGE, "right", "right", "right")
    assert over(page)[2] == "inset(0px 47% 0px 0px)"
    page.type(STAGE, "home")
    assert over(page)[2] == "inset(0px 100% 0px 0px)"
    assert page.label(STAGE) == ("slider", "How much of the left picture is seen")
    assert page.label(SIDE.format("left") + "select")[1] == "Candidate on the left"
    assert page.evaluate("return document.querySelector('.stage input').getAttribute('aria-valuetext')").startswith(
        "0 %"
    )


def test_the_axis_goes_through_the_scales_of_one_side(page):
    axis = SIDE.format("right") + ".axis input"
    assert page.label(axis) == ("slider", "Scale of the right")
    chosen = page.evaluate("return document.querySelector('.stage .under').src")
    page.type(axis, "left")
    assert over(page)[:2] == ("self, scale 1.5: coat 0", "base, scale 1.5: coat 0")
    wanted = 'document.querySelector(\'.strip img[data-row="0"][data-name="base, scale 1.5"]\').src'
    assert page.evaluate(f"return document.querySelector('.stage .under').src === {wanted}")
    assert page.evaluate("return document.querySelector('.stage .under').src") != chosen
    page.type(axis, "left", "left", "left")
    assert over(page)[1] == "base, scale 1: coat 0"
    page.evaluate(  # a condition that has no pictures at other scales
        "const row = document.querySelector('.slider .row'); row.value = '7'; row.dispatchEvent(new Event('change'))"
    )
    assert over(page)[:2] == ("self, scale 1.5: coat 7", "base, scale 3: coat 7")
    assert page.evaluate(f"return document.querySelector('{axis}').disabled")


def text(page: Browser, selector: str) -> str:
    return page.evaluate("return document.querySelector(arguments[0]).textContent", selector)


def ballot(page: Browser) -> dict:
    """What the link to save the votes would save."""
    kind, text = page.evaluate("return document.querySelector('.booth .save').href").split(",", 1)
    assert kind == "data:application/json"
    return json.loads(unquote(text))


def begin(page: Browser, seed: int) -> None:
    page.evaluate("document.querySelector('.booth').dataset.seed = arguments[0]", seed)
    page.click(".booth .start")


def test_a_vote_by_keyboard_is_blind_shuffled_and_counted(page, tmp_path):
    begin(page, 7)
    assert page.evaluate("return document.activeElement.className") == "ballot"
    seen = page.evaluate("return document.querySelector('.ballot').outerHTML.replace(/data:image[^\"]*/g, '')")
    assert "self" not in seen and "base" not in seen
    for key in ("left", "right", "down", "left", "backspace", "right"):
        page.type(".ballot", key)
    cast = ballot(page)
    assert [vote["choice"] for vote in cast["votes"]] == ["left", "right", "same", "right"]
    assert (
        cast["seed"] == 7 and page.evaluate("return document.querySelector('.progress').textContent") == "Pair 5 of 8"
    )
    for _ in range(4):
        page.click('[data-choice="left"]')
    cast = ballot(page)
    assert sorted(vote["condition"] for vote in cast["votes"]) == list(range(8))
    assert [vote["condition"] for vote in cast["votes"]] != list(range(8))
    assert len({vote["left"] for vote in cast["votes"]}) == 2, "sides are shuffled"
    assert text(page, ".progress").startswith("All 8 pairs")
    (file := tmp_path / "votes.json").write_text(json.dumps(cast))
    (pair,) = with_votes(a_record(), file)["votes"]["pairs"]
    assert pair["pair"] == candidates(a_record()) and sum(pair["wins"]) == 7 and pair["same"] == 1


def test_the_picture_shown_is_the_one_that_is_counted(page):
    begin(page, 3)
    body = """const src = (name) => document.querySelector(`.pictures img[data-row="${arguments[0].condition}"]`
                + `[data-name="${arguments[0][name]}"]`).src;
              return [src('left'), src('right')]"""
    for _ in range(8):
        shown = page.evaluate("return ['.left', '.right'].map((s) => document.querySelector('.two ' + s).src)")
        page.type(".ballot", "left")
        assert page.evaluate(body, ballot(page)["votes"][-1]) == shown


def test_the_order_follows_from_the_seed(browser, address):
    orders = []
    for seed in (5, 5, 6):
        browser.open(address)
        begin(browser, seed)
        for _ in range(8):
            browser.type(".ballot", "left")
        orders.append([(vote["condition"], vote["left"]) for vote in ballot(browser)["votes"]])
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_fits_its_window_in_light_and_dark(page, width, scheme):
    page.look(width, scheme)
    begin(page, 1)
    page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    assert page.evaluate("return document.documentElement.scrollWidth") <= width
    colour = page.evaluate("return getComputedStyle(document.body).backgroundColor")
    assert colour == {"light": "rgb(255, 255, 255)", "dark": "rgb(17, 20, 24)"}[scheme]
    tall = page.evaluate(
        "return Math.min(...[...document.querySelectorAll('.answers button')].map(b => b.offsetHeight))"
    )
    assert tall >= 32, "buttons that a finger can hit"
