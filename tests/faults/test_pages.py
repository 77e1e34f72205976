"""Whatever stands in a run, its page shows it as text, runs nothing of it and loads nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
from hypothesis import given, settings, strategies as st

import lensclust as lc
from lensclust.report.page import write_page
from tests.lensclust.report.test_report import HOSTILE, Page, make_run


def check_page(html: str) -> Page:
    page = Page(html)
    assert not [name for _, attributes in page.tags for name in attributes if name[:2] == "on"]
    assert {tag for tag, _ in page.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "a", "header", "p", "h1", "h2", "h3"),
        *("main", "section", "ul", "li", "span", "table", "caption", "thead", "tbody", "tr", "th"),
        *("td", "small", "code", "strong", "aside", "figure", "div", "img", "script"),
        *("figcaption", "details", "summary", "svg", "circle", "line", "noscript"),
    }
    # What a script finds there as text becomes markup: a still, and nothing after it.
    for held in re.findall(r"<noscript>(.*?)</noscript", html, re.DOTALL | re.IGNORECASE):
        assert [(tag, a["class"]) for tag, a in Page(held).tags] == [("img", "still")]
    loads = [a[name] or "" for _, a in page.tags for name in ("src", "href") if name in a]
    assert all(url.startswith(("data:", "#")) for url in loads)
    return page


def test_nothing_in_a_run_becomes_markup(tmp_path: Path) -> None:
    run = make_run(tmp_path / f"run {HOSTILE.replace('/', '')}", study=HOSTILE)
    (run / "notes.json").write_text(json.dumps([HOSTILE]))
    (run / "provenance.json").write_text(json.dumps({HOSTILE: {HOSTILE: HOSTILE}, "date": HOSTILE}))
    claims = json.loads((run / "claims.json").read_text())
    for claim in claims:
        claim |= {"id": HOSTILE, "source": HOSTILE, "rule": HOSTILE, "origin": HOSTILE}
        claim |= {"estimate": HOSTILE, "n_seeds": HOSTILE, "ci95": [HOSTILE, HOSTILE]}
    (run / "claims.json").write_text(json.dumps(claims))
    pd.DataFrame({HOSTILE: [HOSTILE]}).to_parquet(run / "scores.parquet")
    html = write_page([run]).read_text(encoding="utf-8")
    page = check_page(html)
    assert page.text.count(HOSTILE) >= 10
    assert [image["class"] for image in page.all("img")] == ["still"]


def test_a_figure_brings_no_options_for_the_page(tmp_path: Path) -> None:
    """Vega-Embed would take styles for the whole page from a figure's own metadata."""
    run = make_run(tmp_path / "run")
    file = run / "figures" / "clusters.vl.json"
    spec = json.loads(file.read_text())
    spec["usermeta"]["embedOptions"] = {"defaultStyle": ".verdict {display: none}", "patch": "x"}
    file.write_text(json.dumps(spec))
    page = check_page(write_page([run]).read_text(encoding="utf-8"))
    (text,) = [t for attributes, t in page.scripts if "json" in (attributes.get("type") or "")]
    assert "embedOptions" not in text
    assert json.loads(text)["usermeta"]["title"] == spec["usermeta"]["title"]


def test_any_text_stays_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for path in (run / "figures").iterdir():
        path.unlink()

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.lists(st.text(min_size=1), min_size=4, max_size=4))
    def check(texts: list[str]) -> None:
        (run / "config.json").write_text(json.dumps({"study": texts[0], texts[1]: texts[2]}))
        (run / "notes.json").write_text(json.dumps(texts))
        (run / "provenance.json").write_text(json.dumps({texts[1]: texts[2], "x": {texts[3]: 1}}))
        check_page(write_page([run]).read_text(encoding="utf-8"))

    check()


def test_prompts_show_their_texts_as_texts() -> None:
    prompts = lc.Prompts.from_token_lists([[1]], pd.DataFrame({"task": [HOSTILE]}))
    assert "<img" not in prompts._repr_html_()
