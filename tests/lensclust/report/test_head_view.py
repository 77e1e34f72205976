"""The head view in a real browser: every control does what it says, and nothing leaves the page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from lensclust.report.attention import attention_frame
from lensclust.report.page import write_page
from lensclust.report.views.heads import AttentionSample, HeadView
from tests.lensclust.report.test_report import HOSTILE, make_run

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
SHAPE, PROMPTS, OPENED = (3, 4), 9, 10
TOKENS = (("<bos>", " a", "\n"), (HOSTILE, " the", "", "�", " cat", " sat"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not (shutil.which(CHROMIUM) and shutil.which(DRIVER)):
        pytest.skip(f"no {CHROMIUM} and {DRIVER} here")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1100,1200"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def attention(n: int, opened: int, seed: int) -> np.ndarray:
    """Patterns of ``n`` tokens as bytes, each row summing to 1."""
    rng = np.random.default_rng(seed)
    full = np.tril(rng.random((opened, n, n)) ** 4)
    full /= full.sum(-1, keepdims=True)
    query, key = np.tril_indices(n)
    return (full[:, query, key] * 255).round().astype(np.uint8)


def planted() -> HeadView:
    rng = np.random.default_rng(0)
    ari = np.arange(12.0).reshape(SHAPE) / 12
    ami = 1 - ari
    ami[2, 3] = np.nan
    places = sorted(np.ndindex(*SHAPE), key=lambda place: -ari[place])[:OPENED]
    return HeadView(
        title=f"Heads {HOSTILE}",
        caption=f"Planted. {HOSTILE}",
        scores={"ari": ari, f"ami {HOSTILE}": ami},
        opened=tuple((int(b), int(h)) for b, h in places),
        points=rng.normal(size=(OPENED, PROMPTS, 2)),
        explained=np.linspace(0.9, 0.1, OPENED),
        labels={
            "task": tuple(f"task {i % 3} {HOSTILE}" for i in range(PROMPTS)),
            "input": tuple("ab"[i % 2] for i in range(PROMPTS)),
        },
        texts=tuple(f"prompt {i} {HOSTILE}" for i in range(PROMPTS)),
        samples=tuple(
            AttentionSample(f"sample {i} {HOSTILE}", tokens, attention(len(tokens), OPENED, i))
            for i, tokens in enumerate(TOKENS)
        ),
    )


VIEW = planted()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("heads") / "run")
    for path in (run / "figures").iterdir():
        path.unlink()
    (run / "views").mkdir()
    (run / "views" / "1_heads.json").write_text(json.dumps(VIEW.to_json()))
    return write_page([run])


@pytest.fixture
def page(browser: Any, file: Path) -> Iterator[Any]:
    browser.get_log("browser")
    browser.get_log("performance")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get(file.as_uri())
    near(browser)
    WebDriverWait(browser, 60).until(lambda b: all_of(b, ".pattern canvas"))
    yield browser
    assert browser.get_log("browser") == []
    assert requests(browser) == [file.as_uri()]
    assert not browser.find_elements("css selector", ".view img")


def requests(browser: Any) -> list[str]:
    """What the browser has asked for."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [
        each["request"]["url"] for each in asked if not each["request"]["url"].startswith("data:")
    ]


def near(page: Any) -> None:
    """Views are made when they come near."""
    page.execute_script("document.querySelector('section.view').scrollIntoView()")


def one(page: Any, selector: str) -> Any:
    return page.find_element("css selector", selector)


def all_of(page: Any, selector: str) -> list[Any]:
    return page.find_elements("css selector", selector)


def cell(page: Any, block: int, head: int) -> Any:
    return all_of(page, ".heat td")[block * SHAPE[1] + head]


def press(page: Any, *keys: str) -> None:
    ActionChains(page).send_keys(*keys).perform()


def focused(page: Any) -> str:
    return page.switch_to.active_element.get_attribute("aria-label")


def opened(page: Any) -> str:
    return one(page, ".opened > h4").text


def colour(node: Any) -> str:
    """``rgb(...)``, however the browser writes it."""
    return (
        node.value_of_css_property("background-color")
        .removesuffix(", 1)")
        .replace("rgba(", "rgb(")
        .removesuffix(")")
        + ")"
    )


def colours(page: Any) -> list[str]:
    return [colour(each) for each in all_of(page, ".heat td")]


def test_the_best_head_is_open_at_first(page: Any) -> None:
    assert opened(page) == "Block 2, head 3"
    assert cell(page, 2, 3).get_attribute("aria-selected") == "true"
    said = one(page, ".view .status").text
    assert "ari 0.917" in said
    assert "90 % of the variance" in said
    assert HOSTILE in one(page, ".view h3").text
    assert HOSTILE in said


def test_the_heat_map_says_and_shows_the_score_that_is_chosen(page: Any) -> None:
    heat = one(page, ".heat")
    assert heat.get_attribute("role") == "grid"
    assert heat.get_attribute("aria-label").startswith("ari of every head")
    assert len(all_of(page, ".heat td")) == 12
    assert cell(page, 1, 2).get_attribute("aria-label") == "block 1, head 2: ari 0.500"
    before = colours(page)
    assert before[0] == "rgb(68, 1, 84)", "the lowest is the dark end of viridis"
    assert before[11] == "rgb(253, 231, 37)"
    Select(one(page, ".view select")).select_by_index(1)
    assert one(page, ".heat").get_attribute("aria-label").startswith(f"ami {HOSTILE} of every")
    assert colour(cell(page, 0, 0)) == "rgb(253, 231, 37)"
    assert "not measured" in cell(page, 2, 3).get_attribute("aria-label")
    assert cell(page, 2, 3).text == "–"
    assert opened(page) == "Block 2, head 3", "the open head stays open"


def test_cells_can_be_read_on_their_colours(page: Any) -> None:
    for each in all_of(page, ".heat td"):
        ink, paper = (
            [int(c) for c in each.value_of_css_property(name).strip("rgba()").split(",")[:3]]
            for name in ("color", "background-color")
        )
        bright, dim = sorted((luminance(ink), luminance(paper)), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5


def luminance(rgb: list[int]) -> float:
    """Relative luminance as WCAG 2.1 defines it."""
    parts = [
        c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)
    ]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def test_the_heat_map_is_one_stop_for_the_keyboard(page: Any) -> None:
    stops = [c for c in all_of(page, ".heat td") if c.get_attribute("tabindex") == "0"]
    assert len(stops) == 1
    page.execute_script("arguments[0].focus()", stops[0])
    assert focused(page).startswith("block 2, head 3")
    for key, place in (
        (Keys.ARROW_UP, (1, 3)),
        (Keys.ARROW_LEFT, (1, 2)),
        (Keys.HOME, (1, 0)),
        (Keys.ARROW_LEFT, (1, 0)),
        (Keys.END, (1, 3)),
        (Keys.PAGE_UP, (0, 3)),
        (Keys.PAGE_DOWN, (2, 3)),
        (Keys.ARROW_DOWN, (2, 3)),
        (Keys.ARROW_UP, (1, 3)),
    ):
        press(page, key)
        assert focused(page).startswith("block {}, head {}:".format(*place))
        assert sum(c.get_attribute("tabindex") == "0" for c in all_of(page, ".heat td")) == 1
    assert opened(page) == "Block 2, head 3", "moving opens nothing"
    press(page, Keys.ENTER)
    assert opened(page) == "Block 1, head 3"
    press(page, Keys.ARROW_RIGHT, Keys.ARROW_UP, Keys.SPACE)
    assert opened(page) == "Block 0, head 3"
    assert [c.get_attribute("aria-selected") for c in all_of(page, ".heat td")].count("true") == 1


def test_a_head_that_does_not_open_says_so(page: Any) -> None:
    closed = cell(page, 0, 0)
    assert closed.get_attribute("aria-disabled") == "true"
    closed.click()
    assert one(page, ".view .status").text.startswith("Block 0, head 0 cannot be opened")
    assert opened(page) == "Block 2, head 3"
    assert len(all_of(page, ".heat td[aria-disabled]")) == 12 - OPENED


def places(page: Any) -> np.ndarray:
    script = """return [...document.querySelectorAll('.points path')].map((mark) =>
        mark.style.transform.match(/-?[\\d.]+/g).map(Number))"""
    return np.array(page.execute_script(script))


def test_the_plane_is_that_of_the_open_head(page: Any) -> None:
    for place in ((2, 3), (1, 1)):
        cell(page, *place).click()
        drawn, wanted = places(page), VIEW.points[VIEW.opened.index(place)] * [1, -1]
        scale = np.ptp(drawn, axis=0) / np.ptp(wanted, axis=0)
        assert scale[0] == pytest.approx(scale[1], rel=0.01), "one scale for both axes"
        moved = (drawn - drawn.mean(0)) / scale
        np.testing.assert_allclose(moved, wanted - wanted.mean(0), atol=0.02)


def test_points_are_read_and_coloured_as_in_any_plane(page: Any) -> None:
    assert [b.text for b in all_of(page, ".legend button")][1] == f"task 1 {HOSTILE}"
    Select(one(page, ".scatter select")).select_by_visible_text("input")
    assert [b.text for b in all_of(page, ".legend button")] == ["a", "b"]
    cell(page, 1, 1).click()
    assert [b.text for b in all_of(page, ".legend button")] == ["a", "b"], "the colour is kept"
    one(page, ".points").send_keys(Keys.HOME)
    assert f"prompt 0 {HOSTILE}" in one(page, ".said").text
    assert one(page, ".points").get_attribute("aria-label").endswith("Block 1, head 1.")


def shown_weights(page: Any) -> list[str]:
    return [t.get_attribute("aria-label").rpartition(": ")[2] for t in all_of(page, ".tokens span")]


def wanted_weights(sample: int, place: tuple[int, int], query: int) -> list[str]:
    held = VIEW.samples[sample]
    n = len(held.tokens)
    full = np.zeros((n, n))
    full[np.tril_indices(n)] = held.weights[VIEW.opened.index(place)] / 255
    later = ["comes later"] * (n - query - 1)
    return [f"attended {weight:.2f}" for weight in full[query, : query + 1]] + later


def test_tokens_say_what_the_chosen_one_looks_at(page: Any) -> None:
    assert shown_weights(page) == wanted_weights(0, (2, 3), 2)
    assert [t.text for t in all_of(page, ".tokens span")] == ["<bos>", "␣a", "⏎"]
    Select(one(page, ".attention select")).select_by_index(1)
    assert one(page, ".tokens span").text == HOSTILE.replace(" ", "␣")
    assert shown_weights(page) == wanted_weights(1, (2, 3), 5)
    assert one(page, ".looks").text.startswith("␣sat (5) looks at ")
    cell(page, 1, 0).click()
    assert shown_weights(page) == wanted_weights(1, (1, 0), 5)
    all_of(page, ".tokens span")[3].click()
    assert shown_weights(page) == wanted_weights(1, (1, 0), 3)
    page.execute_script("arguments[0].focus()", all_of(page, ".tokens span")[3])
    for key, query in (
        (Keys.ARROW_LEFT, 2),
        (Keys.HOME, 0),
        (Keys.ARROW_LEFT, 0),
        (Keys.END, 5),
        (Keys.ARROW_RIGHT, 5),
    ):
        press(page, key)
        assert shown_weights(page) == wanted_weights(1, (1, 0), query)
        chosen = [t.get_attribute("aria-selected") for t in all_of(page, ".tokens span")]
        assert chosen.index("true") == query
        assert chosen.count("true") == 1


def test_the_pattern_is_drawn_by_circuitsvis(page: Any) -> None:
    """The first token sees itself alone: its cell has the full colour."""
    script = """const canvas = document.querySelector('.pattern canvas');
        const held = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        const wanted = [11, 92, 173, 255];
        let full = 0;
        for (let i = 0; i < held.length; i += 4) full += wanted.every((v, c) => held[i + c] === v);
        return full / (canvas.width * canvas.height)"""
    WebDriverWait(page, 20).until(lambda b: b.execute_script(script) > 0.02)
    Select(one(page, ".attention select")).select_by_index(1)
    WebDriverWait(page, 20).until(lambda b: 0.002 < b.execute_script(script) < 0.04)
    assert len(all_of(page, ".pattern canvas")) == 1


def test_nothing_hostile_runs(page: Any) -> None:
    Select(one(page, ".attention select")).select_by_index(1)
    assert page.execute_script("return document.querySelectorAll('[onerror]').length") == 0
    assert HOSTILE.replace(" ", "␣") in one(page, ".looks").text + one(page, ".tokens").text


@pytest.mark.parametrize("width", [360, 1100])
def test_the_page_is_no_wider_than_its_window(page: Any, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.refresh()
    near(page)
    WebDriverWait(page, 60).until(lambda b: all_of(b, ".pattern canvas"))
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    heat, detail = one(page, ".map").rect, one(page, ".opened").rect
    assert (heat["x"] + heat["width"] <= detail["x"]) == (width > 500), "beside each other"
    assert (heat["y"] + heat["height"] <= detail["y"]) == (width < 500), "or one below the other"
    page.get_log("performance")  # the page was asked for twice
    page.get(page.current_url)


def test_a_page_without_heads_carries_no_circuitsvis(tmp_path: Path) -> None:
    text = write_page([make_run(tmp_path / "run")]).read_text(encoding="utf-8")
    assert "CircuitsVis" not in text


def test_the_page_holds_circuitsvis_once(file: Path, tmp_path: Path) -> None:
    run = file.parent
    text = write_page([run, run], tmp_path / "both.html").read_text(encoding="utf-8")
    assert text.count("var CircuitsVis=") == 1
    assert len(text) < 2_000_000


def test_a_notebook_shows_attention_without_asking_anybody(browser: Any, tmp_path: Path) -> None:
    patterns = np.tril(np.random.default_rng(0).random((3, 6, 6)))
    frame = attention_frame(TOKENS[1], patterns, [f"head {HOSTILE} {i}" for i in range(3)])
    file = tmp_path / "notebook.html"
    file.write_text(f"<!DOCTYPE html><meta charset=utf-8>{frame}", encoding="utf-8")
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(file.as_uri())
    browser.switch_to.frame(0)
    WebDriverWait(browser, 60).until(lambda b: len(all_of(b, "canvas")) == 4)
    assert one(browser, "h2").text == f"head {HOSTILE} 0"
    assert not all_of(browser, "img")
    browser.switch_to.default_content()
    assert browser.get_log("browser") == []
    assert [url for url in requests(browser) if url != "about:srcdoc"] == [file.as_uri()]


def test_a_notebook_shows_the_view_as_the_page_does(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "notebook.html"
    file.write_text(f"<!DOCTYPE html><meta charset=utf-8>{VIEW._repr_html_()}", encoding="utf-8")
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(file.as_uri())
    browser.switch_to.frame(0)
    WebDriverWait(browser, 60).until(lambda b: all_of(b, ".pattern canvas"))
    cell(browser, 1, 1).click()
    assert opened(browser) == "Block 1, head 1"
    assert HOSTILE in one(browser, "h3").text
    assert not all_of(browser, "img")
    browser.switch_to.default_content()
    assert browser.get_log("browser") == []
    assert [url for url in requests(browser) if url != "about:srcdoc"] == [file.as_uri()]
