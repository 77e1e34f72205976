"""The page in a real browser: every control does what it says, and nothing else happens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from lensclust.report.page import write_page
from lensclust.report.views.clusters import ClusterView
from tests.browser import Browser
from tests.lensclust.report.test_report import HOSTILE, make_run

STATUS = "document.querySelector('.table-box [role=status]').textContent"
TASKS = ["plural", "past", HOSTILE]
N = 60


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with figures, scores of every kind of value, and clusters at 3 layers and 2 steps."""
    folder = make_run(tmp_path_factory.mktemp("page") / "run")
    rng = np.random.default_rng(0)
    scores = pd.DataFrame(
        {
            "site": [f"resid {i % 7}" for i in range(230)],
            "value": rng.normal(size=230),
            "note": [HOSTILE if i % 50 == 0 else "plain" for i in range(230)],
        }
    )
    scores.loc[[3, 4, 5], "value"] = [np.nan, np.inf, -np.inf]
    scores.to_parquet(folder / "scores.parquet")
    (folder / "views").mkdir()
    rows = pd.DataFrame(
        {"task": [TASKS[i % 3] for i in range(N)], "input": [str(i % 4) for i in range(N)]}
    )
    frames = [
        rows.assign(step=step, layer=layer, x=rng.normal(size=N), y=rng.normal(size=N),
                    explained=0.5 + layer / 10, text=[f"prompt {i} {HOSTILE}" for i in range(N)])
        for step in (0, 100) for layer in (0, 1, 2)
    ]  # fmt: skip
    ari = pd.DataFrame({"step": [100] * 3, "layer": range(3), "value": [0.1, 0.4, 0.9]})
    view = ClusterView.from_frame(
        pd.concat(frames), labels=["task", "input"], title=f"Clusters {HOSTILE}", caption="Points.",
        scores=ari,
    )  # fmt: skip
    (folder / "views" / "1_clusters.json").write_text(json.dumps(view.to_json()))
    write_page([folder])
    return folder


@pytest.fixture
def page(run: Path, browser: Browser) -> Iterator[Browser]:
    """The page, opened; afterwards it has neither complained nor asked for anything."""
    browser.open(run / "report.html")
    yield browser
    assert browser.errors() == []
    asked = [url for url in browser.requests() if not url.startswith(("data:", "blob:"))]
    assert asked == [(run / "report.html").resolve().as_uri()]
    assert browser.run(
        "return document.images.length === document.querySelectorAll('.still').length"
    )


def test_every_figure_has_its_still_once_the_page_is_there(page: Browser) -> None:
    figures = len(page.all("figure"))
    assert figures > 0
    page.until(f"return document.querySelectorAll('figure .still').length === {figures}")
    page.until("return [...document.images].every(each => each.complete)")
    assert page.run("return [...document.images].every(each => each.naturalWidth > 0 && each.alt)")
    assert not page.all(".canvas > noscript")


def rows_shown(page: Browser) -> list[list[str]]:
    return page.run(
        "return [...document.querySelectorAll('.table-box tbody tr')]"
        ".map(row => [...row.cells].map(cell => cell.textContent))"
    )


def open_table(page: Browser) -> None:
    page.one("details.table summary").click()
    page.until("return document.querySelector('.table-box').dataset.state === 'ready'")


def test_the_table_sorts_by_any_column_with_missing_values_last(page: Browser) -> None:
    open_table(page)
    (value,) = [b for b in page.all(".scores th button") if b.text == "value"]
    for way, edge in (("descending", "∞"), ("ascending", "−∞")):
        value.click()
        assert (
            page.one("th[aria-sort='ascending'], th[aria-sort='descending']").get_attribute(
                "aria-sort"
            )
            == way
        )
        assert rows_shown(page)[0][1] == edge
        numbers = [float(row[1]) for row in rows_shown(page)[1:]]
        assert numbers == sorted(numbers, reverse=way == "descending")
        for _ in range(4):
            page.all(".pager button")[1].click()
        assert rows_shown(page)[-1][1] == "–"
        assert not page.all(".pager button")[1].is_enabled()


def test_the_table_filters_and_gives_out_what_is_left(page: Browser) -> None:
    open_table(page)
    page.one("input[type='search']").send_keys("img RESID")
    page.until(f"return {STATUS}.startsWith('5 of 230')")
    assert {row[2] for row in rows_shown(page)} == {HOSTILE}
    page.run(
        "window.made = []; URL.createObjectURL = (blob) => { window.made.push(blob); return '#'; }"
    )
    button = next(b for b in page.all(".table-box button") if b.text.startswith("Download 5 rows"))
    button.click()
    text = page.driver.execute_async_script("window.made[0].text().then(arguments[0])")
    lines = text.strip().split("\r\n")
    assert lines[0] == "site,value,note"
    assert len(lines) == 6
    page.one("input[type='search']").clear()
    page.one("input[type='search']").send_keys(" ")
    choice = Select(page.all(".table-box select")[0])
    assert [option.text for option in choice.options] == ["all", *(f"resid {i}" for i in range(7))]
    choice.select_by_visible_text("resid 3")
    page.until(f"return {STATUS}.startsWith('33 of')")
    assert {row[0] for row in rows_shown(page)} == {"resid 3"}


def places(page: Browser) -> list[str]:
    return page.run(
        "return [...document.querySelectorAll('.mark')].map(mark => mark.style.transform)"
    )


def test_sliders_move_the_points_and_say_where_they_are(page: Browser) -> None:
    page.run("document.querySelector('.view').scrollIntoView()")
    page.until("return document.querySelectorAll('.mark').length")
    assert len(page.all(".mark")) == N
    status = page.one(".view [role=status]")
    assert status.text == "Layer 2 · step 100 · ARI 0.90 · 70 % of the variance shown."
    layer, step = page.all(".view input[type=range]")
    seen = [places(page)]
    for slider, key, said in (
        (layer, Keys.ARROW_LEFT, "Layer 1 · step 100 · ARI 0.40 · 60 % of the variance shown."),
        (step, Keys.ARROW_LEFT, "Layer 1 · step 0 · 60 % of the variance shown."),
        (layer, Keys.ARROW_LEFT, "Layer 0 · step 0 · 50 % of the variance shown."),
    ):
        slider.send_keys(key)
        assert status.text == said
        seen.append(places(page))
    assert len({tuple(each) for each in seen}) == 4
    layer.send_keys(Keys.END)
    step.send_keys(Keys.END)
    assert places(page) == seen[0]
    play = next(b for b in page.all(".view button") if b.text == "Play layers")
    play.click()
    assert status.text.startswith("Layer 0 · step 100")
    page.until(
        "return document.querySelector('.view [role=status]').textContent.startsWith('Layer 2')"
    )
    page.until("return document.querySelector('.view button').textContent === 'Play layers'")


def test_points_are_coloured_picked_and_read_by_keyboard(page: Browser) -> None:
    page.run("document.querySelector('.view').scrollIntoView()")
    page.until("return document.querySelectorAll('.mark').length")
    keys = page.all(".key")
    assert [key.text for key in keys] == TASKS
    keys[0].click()
    assert len(page.all(".mark.faint")) == N - N // 3
    assert page.all(".key")[0].get_attribute("aria-pressed") == "true"
    page.all(".key")[0].click()
    assert not page.all(".mark.faint")
    # Colour never stands alone: each label has a shape of its own as well.
    looks = page.run("return [...document.querySelectorAll('.mark')].map(m => m.getAttribute('d'))")
    assert len(set(looks)) == 3
    Select(page.one(".scatter select")).select_by_visible_text("input")
    assert [key.text for key in page.all(".key")] == ["0", "1", "2", "3"]
    picture = page.one("svg.points")
    picture.send_keys(Keys.ARROW_RIGHT * 2)
    assert page.one(".said").text == f"task: past · input: 1\nprompt 1 {HOSTILE}"
    picture.send_keys(Keys.ESCAPE)
    assert page.one(".said").text.startswith("Point at a mark")


def test_the_rule_is_read_by_pointer_and_by_keyboard_and_printed(page: Browser) -> None:
    shown = (
        "return [...document.querySelectorAll('.rule')].filter(r => r.offsetParent !== null).length"
    )
    assert page.run(shown) == 0
    # A screen reader says it with the verdict.
    described = "e => document.getElementById(e.getAttribute('aria-describedby')).textContent"
    rules = page.run(f"return [...document.querySelectorAll('.ruled')].map({described})")
    assert len(rules) == 3
    assert all("95% interval over seeds at least 0.5" in rule for rule in rules)
    page.run("document.querySelector('.ruled').focus()")
    assert page.run(shown) == 1
    assert "95% interval over seeds at least 0.5" in page.all(".rule")[0].text
    page.run("document.activeElement.blur()")
    page.print_media()
    assert page.run(shown) == 3
    assert not page.run(
        "return [...document.querySelectorAll('details, .controls')].some(e => e.offsetParent)"
    )


@pytest.mark.parametrize("dark", [False, True])
def test_both_widths_hold_the_same_parts_in_the_same_order(
    run: Path, browser: Browser, dark: bool
) -> None:
    found = []
    for width in (1280, 360):
        browser.open(run / "report.html", width=width, dark=dark)
        browser.run("for (const d of document.querySelectorAll('details')) d.open = true")
        browser.until("return document.querySelector('.table-box').dataset.state === 'ready'")
        for part in ("figure", ".view"):
            browser.run(f"document.querySelector('{part}').scrollIntoView()")
            browser.until(f"return document.querySelector('{part}').classList.contains('is-live')")
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
        # Text stands out from what is behind it, as WCAG AA asks.
        assert browser.run(CONTRAST) >= 4.5
        parts = "h1, h2, h3, th, figure, select, .stage input"
        found.append(
            browser.run(
                f"return [...document.querySelectorAll('{parts}')]"
                ".map(e => e.tagName + e.textContent.slice(0, 40))"
            )
        )
        assert browser.errors() == []
    assert found[0] == found[1]


# The lowest contrast of any text with what is behind it.
CONTRAST = r"""
const channel = (c) => (c / 255 <= 0.03928 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4);
const luminance = (text) => {
  const [r, g, b] = text.match(/[\d.]+/g).map(Number).map(channel);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (node) => {
  for (; node; node = node.parentElement) {
    const colour = getComputedStyle(node).backgroundColor;
    if (!/, 0\)|transparent/.test(colour)) return colour;
  }
  return "rgb(255, 255, 255)";
};
const unseen = ".live, .scores thead, :disabled, summary, .hidden, figure h3";
const texts = [...document.querySelectorAll("main *:not(svg *):not(script):not(option)")].filter(
  (node) =>
    [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim()) &&
    node.offsetParent && !node.closest(unseen));
return Math.min(...texts.map((node) => {
  const found = [luminance(getComputedStyle(node).color), luminance(behind(node))];
  return (Math.max(...found) + 0.05) / (Math.min(...found) + 0.05);
}));
"""


@pytest.mark.slow
def test_of_very_many_rows_as_many_travel_as_stay_quick(tmp_path: Path, browser: Browser) -> None:
    run = make_run(tmp_path / "run")
    rng = np.random.default_rng(0)
    n = 500_000
    frame = pd.DataFrame({"value": rng.normal(size=n), "site": rng.choice(["a", "b"], n)})
    frame.to_parquet(run / "scores.parquet")
    page = write_page([run])
    assert page.stat().st_size < 5_000_000
    browser.open(page)
    open_table(browser)
    assert "500,000 rows of scores.parquet; the first" in browser.one("main").text
    browser.all(".scores th button")[0].click()
    # No more than a page of rows stands in the document, whatever there is.
    assert len(rows_shown(browser)) == 50
    numbers = [float(row[0]) for row in rows_shown(browser)]
    assert numbers == sorted(numbers, reverse=True)
