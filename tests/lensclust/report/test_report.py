"""The page: everything a run says stands in it, nothing is loaded, nothing hostile runs."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, strategies as st

from lensclust import figures
from lensclust.errors import InputError
from lensclust.report.page import write_page
from lensclust.report.tables import score_table
from lensclust.results.claims import decide

HOSTILE = "</script><img src=x onerror=alert(1)>"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements, texts by element, and whether every tag was closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        elif "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def make_run(folder: Path, *, n_rows: int = 4, study: str = "emergence") -> Path:
    folder.mkdir(parents=True)
    claims = [
        decide(
            id,
            statement,
            values,
            source="ours",
            origin="extension",
            control={f"permuted labels {HOSTILE}": 0.0004},
            at_least=0.5,
        ).to_json()
        for id, statement, values in (
            ("rises", f"ARI rises {HOSTILE}", [0.9, 0.91, 0.92]),
            ("falls", "ARI falls", [0.1, 0.11, 0.12]),
            ("once", "ARI once", [0.8]),
        )
    ]
    (folder / "claims.json").write_text(json.dumps(claims))
    config = {"study": study, "preset": "smoke", "seeds": 3, "lr": 0.001, "name": HOSTILE}
    (folder / "config.json").write_text(json.dumps(config))
    provenance = {"versions": {"torch": "2.13.0"}, "timing": {"started": "2026-01-02"}, "git": None}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    (folder / "notes.json").write_text(json.dumps(["The bag-of-tokens baseline is high: .68"]))
    frame = pd.DataFrame({"task": HOSTILE, "layer": range(n_rows), "value": 0.25})
    frame.to_parquet(folder / "scores.parquet")
    points = pd.DataFrame({"task": [HOSTILE, "plural"], "layer": 0, "x": [0.0, 1.0], "y": 0.0})
    chart = figures.scatter(points, title=f"Tasks {HOSTILE}", caption="Two <points>.")
    figures.save(chart, folder / "figures", "clusters")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    path = write_page([run])
    assert path == run / "report.html"
    assert not list(run.glob(".*partial"))
    return path.read_text(encoding="utf-8")


def test_claims_come_first_with_verdict_interval_control_and_rule(html: str) -> None:
    text = re.sub(r"\s+", " ", Page(html).text)
    order = ["Claims", "ARI rises", "baseline is high: .68", "Figure 1.", "Scores", "torch"]
    positions = [text.index(part) for part in order]
    assert positions == sorted(positions)
    for said in (
        "✓ supported",
        "✗ contradicted",
        "? inconclusive",
        "0.910 [0.885, 0.935]",
        "no interval",
        "permuted labels",
        "0.0004",
        "95% interval over seeds at least 0.5",
        "extension",
        "preset smoke · 3 seeds · 2026-01-02",
        "2.13.0",
    ):
        assert said in text, said


def test_hostile_labels_stay_text(html: str) -> None:
    page = Page(html)
    assert HOSTILE in page.text
    assert [image["class"] for image in page.all("img")] == ["still"]
    assert not [name for _, attributes in page.tags for name in attributes if name[:2] == "on"]
    (spec,) = [
        text for attributes, text in page.scripts if "json" in (attributes.get("type") or "")
    ]
    assert "</" not in spec
    assert HOSTILE in json.dumps(json.loads(spec))


def test_the_page_loads_nothing_and_runs_only_its_own_scripts(html: str) -> None:
    page = Page(html)
    loads = [a[name] or "" for _, a in page.tags for name in ("src", "href", "srcset") if name in a]
    assert loads
    assert all(url.startswith(("data:", "#")) for url in loads)
    assert not page.all("link")
    (policy,) = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    scripts = [text for attributes, text in page.scripts if "type" not in attributes]
    assert len(scripts) == 4
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_the_page_can_be_used_without_eyes_and_without_scripts(html: str) -> None:
    page = Page(html)
    assert page.all("html")[0]["lang"] == "en"
    assert [len(page.all(tag)) for tag in ("h1", "main", "header")] == [1, 1, 1]
    (image,) = page.all("img")
    assert (image["alt"] or "").startswith("Tasks")
    _, _, content = (image["src"] or "").partition("base64,")
    assert base64.b64decode(content).startswith(b"<svg")
    assert all("scope" in cell for cell in page.all("th"))
    anchors = [a["id"] for _, a in page.tags if "id" in a]
    assert len(anchors) == len(set(anchors))


def test_the_same_run_gives_the_same_bytes_wherever_it_is_written(
    run: Path, html: str, tmp_path: Path
) -> None:
    other = write_page([run], tmp_path / "deep" / "page.html")
    assert other.read_text(encoding="utf-8") == html
    assert len(html) < 2_000_000


def packed(page: Page) -> dict[str, Any]:
    (text,) = [
        text for attributes, text in page.scripts if (attributes.get("type") or "").endswith("gzip")
    ]
    return json.loads(gzip.decompress(base64.b64decode(text)))


def test_all_scores_travel_and_the_first_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", n_rows=1200)
    page = Page(write_page([run]).read_text(encoding="utf-8"))
    assert "1,200 rows" in page.text
    assert len(page.all("td")) < 200
    task, layer, value = packed(page)["columns"]
    assert task == {"name": "task", "words": [HOSTILE], "codes": [0] * 1200}
    assert layer["values"] == list(range(1200))
    assert value["values"] == [0.25] * 1200


def test_scores_too_large_for_the_page_are_left_in_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lensclust.report.tables._MAX_CELLS", 30)
    page = Page(write_page([make_run(tmp_path / "run", n_rows=12)]).read_text(encoding="utf-8"))
    assert packed(page)["rows"] == 10
    assert "12 rows of scores.parquet; the first 10 are in this page" in page.text


@given(
    st.lists(st.floats() | st.none(), min_size=1),
    st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1),
)
def test_any_scores_come_back_from_the_page(numbers: list[Any], words: list[str]) -> None:
    n = min(len(numbers), len(words))
    frame = pd.DataFrame({"x": pd.Series(numbers[:n], dtype=float), "word": words[:n]})
    table = score_table(frame)
    held = json.loads(gzip.decompress(base64.b64decode(table.packed)))["columns"]
    assert [held[1]["words"][code] for code in held[1]["codes"]] == words[:n]
    for place, (value, kept) in enumerate(zip(frame["x"], held[0]["values"], strict=True)):
        if math.isinf(value):
            assert held[0]["infinite"][str(place)] == ("∞" if value > 0 else "−∞")
        elif math.isnan(value):
            assert kept is None
        else:
            assert kept == pytest.approx(value, rel=1e-5)


def test_a_claim_leads_to_its_figures_and_back(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    claims = json.loads((run / "claims.json").read_text())
    claims[0]["figures"] = ["clusters", "of another study"]
    (run / "claims.json").write_text(json.dumps(claims))
    page = Page(write_page([run]).read_text(encoding="utf-8"))
    (link,) = [a for a in page.all("a") if a.get("class") == "picture"]
    (figure,) = page.all("figure")
    assert link["href"] == f"#{figure['id']}"
    assert "Shows rises." in re.sub(r"\s+", " ", page.text)


def test_several_runs_share_one_page_and_one_copy_of_vega(run: Path, tmp_path: Path) -> None:
    second = make_run(tmp_path / "second", study="realistic")
    page = Page(write_page([run, second], tmp_path / "both.html").read_text(encoding="utf-8"))
    assert page.text.index("emergence") < page.text.index("realistic")
    assert len([1 for attributes, _ in page.scripts if "type" not in attributes]) == 4
    assert len(page.all("figure")) == 2
    # What is in it stands at its head, with verdicts that lead to the claims.
    head = re.sub(r"\s+", " ", page.text).partition("Skip to the claims")[2].partition("Claims")[0]
    assert head.count("✓ 1 supported ✗ 1 contradicted ? 1 inconclusive") == 2
    linked = [a.get("href") for a in page.all("a")]
    assert {"#run0", "#run1", "#run0-claims", "#run1-claims"} <= set(linked)
    assert {str(link).removeprefix("#") for link in linked} <= {
        str(a["id"]) for _, a in page.tags if "id" in a
    }
    anchors = [a["id"] for _, a in page.tags if "id" in a]
    assert len(anchors) == len(set(anchors))
    with pytest.raises(InputError, match="2 runs need a file to write to"):
        write_page([run, second])


def test_a_run_without_figures_notes_and_claims_carries_no_vega(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for path in [*(run / "figures").iterdir(), run / "notes.json"]:
        path.unlink()
    (run / "claims.json").write_text("[]")
    html = write_page([run]).read_text(encoding="utf-8")
    page = Page(html)
    assert len(html) < 60_000
    assert "no claims" in page.text
    assert "no figures" in page.text


def test_a_figure_needs_only_one_of_its_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    svg, spec = run / "figures" / "clusters.svg", run / "figures" / "clusters.vl.json"
    whole = write_page([run]).read_bytes()
    still = svg.read_bytes()
    svg.unlink()
    assert write_page([run]).read_bytes() == whole, "the still is drawn again from the spec"
    svg.write_bytes(still)
    spec.unlink()
    page = Page(write_page([run]).read_text(encoding="utf-8"))
    assert [image["alt"] for image in page.all("img")] == ["clusters"]
    assert len([1 for attributes, _ in page.scripts if "type" not in attributes]) == 2


def claim_without(key: str) -> Callable[[Path], object]:
    def spoil(run: Path) -> object:
        claims = json.loads((run / "claims.json").read_text())
        del claims[1][key]
        return (run / "claims.json").write_text(json.dumps(claims))

    return spoil


def view_that_is(content: Any) -> Callable[[Path], object]:
    def spoil(run: Path) -> object:
        (run / "views").mkdir()
        return (run / "views" / "1_a.json").write_text(json.dumps(content))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: (run / "config.json").unlink(), "without config.json: expected a run"),
        (lambda run: (run / "claims.json").write_text("[{"), "claims.json is not readable JSON"),
        (lambda run: (run / "claims.json").write_text("{}"), "claims.json holds dict, expected a"),
        (claim_without("rule"), "claims.json: claim 1 has no 'rule'"),
        (lambda run: (run / "config.json").write_bytes(b"\xff"), "config.json is not readable"),
        (lambda run: (run / "notes.json").write_text('"a"'), "notes.json holds str, expected a"),
        (lambda run: (run / "scores.parquet").write_bytes(b"no"), "scores.parquet is not a read"),
        (lambda run: (run / "figures/clusters.svg").write_text("x"), "clusters.svg is not an SVG"),
        (lambda run: (run / "figures/clusters.vl.json").write_text("x"), "clusters.vl.json is not"),
        (view_that_is({"kind": "movie"}), "views/1_a.json: kind 'movie' is not known"),
        (view_that_is({"kind": ["clusters"]}), "views/1_a.json: kind ['clusters'] is not known"),
        (
            view_that_is({"kind": "clusters", "layers": [0]}),
            "views/1_a.json: 'steps' is missing or wrong",
        ),
    ],
)
def test_a_broken_run_is_one_line_naming_the_file(
    spoil: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    spoil(run)
    with pytest.raises(InputError) as caught:
        write_page([run])
    assert said in str(caught.value)
    assert str(run) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (run / "report.html").exists()


def test_no_run_and_no_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run directory given"):
        write_page([])
    with pytest.raises(InputError, match="is no directory: expected"):
        write_page([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="is a directory, expected a file"):
        write_page([make_run(tmp_path / "run")], tmp_path)
