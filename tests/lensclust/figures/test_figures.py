"""Figures: what is drawn is what the frame says, and the files are whole and stable."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lensclust import figures

HOSTILE = '</script><img src=x onerror="alert(1)">'
WORDS: dict[str, Any] = {"title": "A title", "caption": "A caption."}


def scores(seeds: int = 3) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        {"layer": layer, "step": step, "seed": seed, "split": split, "value": rng.random()}
        for split in ("train", HOSTILE)
        for step in (0, 1, 10, 1000)
        for layer in range(3)
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows).assign(null_mean=0.01, null_std=0.02)


def heads() -> pd.DataFrame:
    rows = [(block, head, block * head / 6) for block in range(3) for head in range(4)]
    return pd.DataFrame(rows, columns=["block", "head", "value"])


def points(n: int = 40) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    tasks = [HOSTILE if i % 20 == 0 else f"task {i % 20}" for i in range(n)]
    frame = pd.DataFrame({"task": tasks, "layer": np.arange(n) * 2 // n * 8})
    return frame.assign(x=rng.normal(size=n), y=rng.normal(size=n), input="word")


def baselines() -> pd.DataFrame:
    frame = pd.DataFrame({"condition": ["best layer", "bag of tokens"] * 2, "seed": [0, 0, 1, 1]})
    return frame.assign(value=[0.7, 0.68, 0.72, 0.68], null_mean=0.0, null_std=0.01)


CHARTS: dict[str, Callable[[], figures.Picture]] = {
    "by layer": lambda: figures.curves(
        scores().query("split == 'train'"), color="step", facet=None, **WORDS
    ),
    "by step": lambda: figures.curves(
        scores(), x="step", color="layer", facet="split", y_title="ARI", **WORDS
    ),
    "heads": lambda: figures.head_map(heads(), **WORDS),
    "scatter": lambda: figures.scatter(points(), tooltip=("input",), **WORDS),
    "bars": lambda: figures.bars(baselines(), band=("null_mean", "null_std"), **WORDS),
}


def drawn(chart: figures.Picture) -> list[dict[str, Any]]:
    (rows,) = figures.specification(chart)["datasets"].values()
    return rows


@pytest.mark.parametrize("name", CHARTS)
def test_a_saved_chart_is_xml_with_its_title_and_alternative_text(
    name: str, tmp_path: Path
) -> None:
    path = figures.save(CHARTS[name](), tmp_path / "figures", "chart")
    assert sorted(p.name for p in path.parent.iterdir()) == ["chart.svg", "chart.vl.json"]
    root = ET.parse(path).getroot()
    assert root.tag.endswith("svg")
    assert "A title" in "".join(root.itertext())
    assert root.attrib["aria-label"].startswith("A title. A caption.")
    assert not [element for element in root.iter() if element.tag.endswith(("script", "img"))]
    spec = json.loads(path.with_name("chart.vl.json").read_text(encoding="utf-8"))
    assert spec["usermeta"]["caption"].startswith("A caption.")


def test_the_same_data_give_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    names = ["by step", "heads", "scatter"]
    for name in names:
        figures.save(CHARTS[name](), tmp_path, name.replace(" ", "_"))
        figures.save(CHARTS[name](), tmp_path, f"again_{name.replace(' ', '_')}")
    code = (
        "import sys; sys.path.insert(0, 'tests/lensclust/figures'); import test_figures as t; "
        "from lensclust import figures\n"
        f"for name in {names[::-1]}:\n"
        f"    figures.save(t.CHARTS[name](), {str(tmp_path / 'other')!r}, name.replace(' ', '_'))"
    )
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
    others = sorted((tmp_path / "other").iterdir())
    assert len(others) == 2 * len(names)
    for other in others:
        assert other.read_bytes() == (tmp_path / other.name).read_bytes(), other.name
        assert other.read_bytes() == (tmp_path / f"again_{other.name}").read_bytes(), other.name


def test_seeds_become_a_mean_with_its_range_over_the_null_band() -> None:
    frame = pd.DataFrame({"layer": [0, 0, 1, 1], "seed": [0, 1, 0, 1], "value": [0.2, 0.4, 0.6, 1]})
    frame = frame.assign(null_mean=[0.0, 0.1, 0.0, 0.1], null_std=0.01)
    rows = drawn(figures.curves(frame, **WORDS))
    lines = [row for row in rows if row["part"] == "line"]
    assert [(r["x"], r["y"], r["low"], r["high"]) for r in lines] == [
        (0, pytest.approx(0.3), 0.2, 0.4),
        (1, pytest.approx(0.8), 0.6, 1),
    ]
    band = [(row["low"], row["high"]) for row in rows if row["part"] == figures.NULL_LABEL]
    assert band == [(pytest.approx(0.03), pytest.approx(0.07))] * 2


def test_a_single_run_has_no_ribbon_and_a_frame_without_null_no_band() -> None:
    frame = scores(seeds=1).query("split == 'train' and step == 0")
    with_band = figures.curves(frame, **WORDS).to_dict()
    assert [layer["mark"]["type"] for layer in with_band["layer"]] == ["area", "line", "point"]
    without = figures.curves(frame.drop(columns=["null_mean"]), band=None, **WORDS).to_dict()
    assert [layer["mark"]["type"] for layer in without["layer"]] == ["line", "point"]


def test_the_step_axis_holds_zero_and_marks_powers_of_ten() -> None:
    frame = scores(seeds=1).query("split == 'train' and layer == 0")
    axis = figures.curves(frame, x="step", **WORDS).to_dict()["layer"][0]["encoding"]["x"]
    assert axis["scale"]["type"] == "symlog"
    assert axis["axis"]["values"] == [0, 1, 10, 100, 1000]


def test_more_rows_than_pixels_are_averaged_on_a_line_and_thinned_in_a_scatter() -> None:
    steps = np.arange(1, 20_001)
    loss = pd.DataFrame({"step": steps, "value": 1 / steps})
    rows = drawn(figures.curves(loss, x="step", band=None, **WORDS))
    assert len(rows) <= 400
    assert (rows[0]["x"], rows[0]["y"]) == (1, 1), "the early steps keep their own points"

    chart = figures.scatter(points(12_000), **WORDS)
    rows = drawn(chart)
    assert len(rows) == 3000
    assert {row["color"] for row in rows} == set(points()["task"])
    assert "3,000 of 12,000 points drawn" in chart.to_dict()["usermeta"]["caption"]


def test_twenty_tasks_get_twenty_pairs_of_colour_and_shape() -> None:
    encoding = figures.scatter(points(), **WORDS).to_dict()["spec"]["encoding"]
    colors, shapes = encoding["color"]["scale"], encoding["shape"]["scale"]
    assert colors["domain"] == shapes["domain"]
    pairs = set(zip(colors["range"], shapes["range"], strict=True))
    assert len(pairs) == len(colors["domain"]) == 20


def test_colour_stands_alone_where_shape_says_something_else() -> None:
    frame = points().assign(template="p0")
    chart = figures.scatter(frame, shape="template", tooltip=("template", "input"), **WORDS)
    encoding = chart.to_dict()["spec"]["encoding"]
    assert encoding["color"]["scale"]["scheme"] == "tableau20"
    assert len(encoding["color"]["scale"]["domain"]) == 20
    assert [tip["title"] for tip in encoding["tooltip"]] == ["task", "template", "input"]


@pytest.mark.parametrize("dtype", ["str", "string", "category", object])
def test_digits_that_are_text_are_names(dtype: Any) -> None:
    frame = points().assign(task=pd.Series([str(i % 10) for i in range(40)]).astype(dtype))
    color = figures.scatter(frame, **WORDS).to_dict()["spec"]["encoding"]["color"]
    assert color["type"] == "nominal"
    assert color["scale"]["range"][:8] == list(figures.PALETTE)
    numbers = frame.assign(task=frame["task"].astype(int))
    color = figures.scatter(numbers, **WORDS).to_dict()["spec"]["encoding"]["color"]
    assert color["type"] == "ordinal"


def test_a_stack_holds_its_charts_with_their_own_scales_and_selections(tmp_path: Path) -> None:
    parts = [make() for make in CHARTS.values()]
    stack = figures.stack(parts)
    spec = stack.to_dict()
    alone = [figures.specification(part) for part in parts]
    assert [p["title"] for p in spec["vconcat"]] == [p["title"] for p in alone]
    for held, part in zip(spec["vconcat"], alone, strict=True):
        assert spec["datasets"][held["data"]["name"]] == part["datasets"][part["data"]["name"]]
    assert set(spec["resolve"]["scale"].values()) == {"independent"}
    selections = [param["name"] for param in spec["params"]]
    assert len(set(selections)) == len(selections) == sum("params" in part for part in alone)
    used = {name for name in selections if f'"param": "{name}"' in json.dumps(spec["vconcat"])}
    assert used == set(selections)
    views = [view for param in spec["params"] for view in param["views"]]
    assert all(json.dumps(spec["vconcat"]).count(f'"name": "{view}"') == 1 for view in views)

    first, second = (figures.save(stack, tmp_path, name) for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    root = ET.parse(first).getroot()
    assert "".join(root.itertext()).count("A title") >= len(parts)
    assert root.attrib["aria-label"].count("Heat map of value") == 1
    assert figures.stack([stack, parts[0]]).to_dict()["vconcat"][0]["vconcat"]
    with pytest.raises(ValueError, match="stack: no chart given"):
        figures.stack([])


def test_missing_values_are_left_out_not_drawn_as_zero() -> None:
    frame = heads()
    frame.loc[3, "value"] = np.nan
    assert len(drawn(figures.head_map(frame, **WORDS))) == len(frame) - 1


@pytest.mark.parametrize(
    ("call", "frame", "options"),
    [
        (figures.curves, scores(), {"color": "step", "facet": "split"}),
        (figures.head_map, heads(), {}),
        (figures.scatter, points(), {}),
        (figures.bars, baselines(), {}),
    ],
)
def test_the_frame_is_left_as_it_was(
    call: Callable[..., figures.Picture], frame: pd.DataFrame, options: dict[str, Any]
) -> None:
    shuffled = frame.sample(frac=1, random_state=0)
    before = shuffled.copy(deep=True)
    call(shuffled, **options, **WORDS).to_dict()
    pd.testing.assert_frame_equal(shuffled, before)


@pytest.mark.parametrize(
    ("call", "frame", "missing"),
    [
        (figures.curves, heads(), "layer"),
        (figures.head_map, heads().drop(columns="head"), "head"),
        (figures.scatter, points().drop(columns="task"), "task"),
        (figures.bars, heads(), "condition"),
    ],
)
def test_a_missing_column_is_named_with_what_there_is(
    call: Callable[..., figures.Picture], frame: pd.DataFrame, missing: str
) -> None:
    with pytest.raises(ValueError, match=rf"^{call.__name__}: no column '{missing}': the frame"):
        call(frame, **WORDS)


def test_rows_that_a_mean_would_mix_up_are_refused() -> None:
    with pytest.raises(ValueError, match=r"curves: several rows at layer=0.*'step', 'split'"):
        figures.curves(scores(), **WORDS)
    with pytest.raises(ValueError, match="no row with a value in 'value'"):
        figures.head_map(heads().assign(value=np.nan), **WORDS)


def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a plain file name"):
        figures.save(CHARTS["heads"](), tmp_path, "../heads")
    assert not list(tmp_path.iterdir())
