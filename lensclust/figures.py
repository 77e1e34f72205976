"""Tidy frame -> Altair chart -> files, with neither a browser nor a network.

Every chart carries a title, a caption and a description (its alternative text), spells its data
inside itself in rounded numbers, and draws the null or the baseline beside the measurement.
Colours are told apart by colour-blind readers and never stand alone: shape repeats them.
Pictures stay small: repeated seeds become one line with its range, and what has more points
than pixels is averaged (lines) or thinned (scatter, which then says so).
"""

from __future__ import annotations

import json
import math
import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import altair as alt
import numpy as np
import pandas as pd
import vl_convert
from pandas.api.types import is_bool_dtype, is_numeric_dtype

Picture = alt.Chart | alt.LayerChart | alt.FacetChart

# Okabe & Ito (2008) without black and yellow, which one of the two backgrounds swallows.
# Eight colours and five shapes are coprime: forty labels before a pair comes back.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#A05A2C")
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross")
NULL_LABEL = "permuted labels ± 2 sd"

_MAX_X = 400  # positions on a line: about one a pixel
_MAX_POINTS = 3000  # points of a scatter, over all its panels
_CONFIG: dict[str, Any] = {
    # vl-convert measures text in Liberation Sans, which is as wide as Arial.
    "font": "Arial, 'Liberation Sans', Helvetica, sans-serif",
    "title": {"anchor": "start", "fontSize": 14, "fontWeight": 600, "offset": 12},
    "axis": {
        "gridColor": "#e6e6e6",
        "domainColor": "#888888",
        "tickColor": "#888888",
        "labelColor": "#333333",
        "titleColor": "#333333",
        "titleFontWeight": "normal",
        "labelFontSize": 11,
        "titleFontSize": 12,
        "labelOverlap": True,
    },
    "legend": {
        "labelColor": "#333333",
        "titleColor": "#333333",
        "titleFontWeight": "normal",
        "labelFontSize": 11,
        "titleFontSize": 12,
        "labelLimit": 220,
        "symbolLimit": 60,
    },
    "header": {"labelFontSize": 12, "labelColor": "#333333", "labelLimit": 240},
    "view": {"stroke": "#dddddd"},
    "text": {"color": "#333333"},
    "rule": {"color": "#333333"},
    # The last step is the one to see, so it is the dark end (the page turns this for dark mode).
    "range": {"ordinal": {"scheme": "viridis", "extent": [0.9, 0.05]}},
}


def curves(
    frame: pd.DataFrame,
    *,
    x: str = "layer",
    y: str = "value",
    color: str | None = None,
    band: tuple[str, str] | None = ("null_mean", "null_std"),
    facet: str | None = None,
    title: str,
    caption: str,
    y_title: str | None = None,
) -> Picture:
    """A metric by layer or by training step, over the band of its permuted-label null.

    Rows that differ only in ``seed`` become one line, the mean, in a ribbon from the lowest to
    the highest seed. The grey band is null mean ± 2 sd (averaged over seeds); where several
    lines share a panel it reaches around all their nulls.

    Args:
        x: numeric or text column along the axis; ``step`` gets a logarithmic axis that holds 0.
        color: one line a value. Numbers (steps, layers) get an ordered colour ramp, anything
            else a nominal palette with a shape each.
        band: columns with the mean and standard deviation of the null, None without one.
        facet: one panel a value.

    Raises:
        ValueError: if a column is missing, no row is left, or rows differ in something that is
            neither ``x``, ``color``, ``facet`` nor ``seed`` (a mean over it would hide it).

    >>> frame = pd.DataFrame({"layer": [0, 1], "value": [0.0, 0.8],
    ...                       "null_mean": [0.0, 0.0], "null_std": [0.01, 0.02]})
    >>> chart = curves(frame, title="ARI by layer", caption="Tiny model.")
    >>> chart.to_dict()["title"]["text"]
    ['ARI by layer']
    """
    _require("curves", frame, [x, y, color, facet, *(band or ())])
    keys = _distinct([facet, color, x])
    means = _over_seeds("curves", frame, keys, [y, *(band or ())], y)
    numeric_x = _is_number(means[x])
    data = pd.DataFrame({"part": "line", "x": means[x], "y": means[y]})
    data["low"], data["high"], data["seeds"] = means["low"], means["high"], means["seeds"]
    if color:
        data["line"] = means[color] if _is_number(means[color]) else means[color].astype(str)
    if facet:
        data["panel"] = _panel_names(means[facet])
    if band:
        data["null_low"] = means[band[0]] - 2 * means[band[1]]
        data["null_high"] = means[band[0]] + 2 * means[band[1]]
    groups = [name for name in ("panel", "line") if name in data]
    if numeric_x:
        data = _thin_lines(data, groups, logarithmic=x == "step").drop(
            columns="bin", errors="ignore"
        )
    parts = [data]
    if band:
        null = data.groupby(_distinct(["panel" if facet else None, "x"]), sort=False)
        edges = null.agg(low=("null_low", "min"), high=("null_high", "max")).reset_index()
        parts.append(edges.assign(part=NULL_LABEL))
    lines = _inline(pd.concat(parts, ignore_index=True))

    horizontal = _x_axis(data["x"], x, narrow=bool(facet))
    vertical_title = y_title or y
    y_axis = alt.Axis(title=vertical_title, tickCount=6)
    vertical = alt.Y(field="y", type="quantitative", axis=y_axis)
    low = alt.Y(field="low", type="quantitative", axis=y_axis)
    high = alt.Y2(field="high")
    tooltip = [
        *([_tip("line", color or "")] if color else []),
        _tip("x", x),
        _tip("y", vertical_title, ".3f"),
        *_seed_tips(data["seeds"]),
        *([_tip("null_low", "null -2 sd", ".3f")] if band else []),
        *([_tip("null_high", "null +2 sd", ".3f")] if band else []),
    ]
    measured = alt.Chart().transform_filter("datum.part === 'line'")
    line = measured.mark_line(strokeWidth=2, aria=False).encode(x=horizontal, y=vertical)
    ribbon = measured.mark_area(opacity=0.18, aria=False).encode(x=horizontal, y=low, y2=high)
    # A point wide enough to be hit by a pointer, also where the line is too dense for marks.
    shown = 0.9 if data["x"].nunique() <= 60 else 0.0
    point = measured.mark_point(filled=True, size=36, aria=False).encode(
        x=horizontal, y=vertical, tooltip=tooltip, opacity=alt.value(shown)
    )
    if color:
        pick = alt.selection_point(name="pick", fields=["line"], bind="legend")
        encoding = _series(data["line"], color)
        fade = {"opacity": alt.condition(pick, alt.value(1.0), alt.value(0.12))}
        line = line.encode(color=encoding["color"], **fade).add_params(pick)
        ribbon = ribbon.encode(color=encoding["color"])
        ribbon = ribbon.encode(opacity=alt.condition(pick, alt.value(0.18), alt.value(0.03)))
        point = point.encode(**encoding)
        if shown:
            point = point.encode(**fade)
    else:
        line, ribbon, point = (
            layer.encode(color=alt.value(PALETTE[0])) for layer in (line, ribbon, point)
        )
    layers: list[alt.Chart] = [line, point]
    if data["seeds"].max() > 1:
        layers.insert(0, ribbon)
    if band:
        layers.insert(0, _null_band(horizontal, low, high))
    chart = alt.LayerChart(data=lines, layer=layers)
    extent = f"{x} from {data['x'].iloc[0]} to {data['x'].iloc[-1]}"
    summary = f"Lines of {vertical_title} by {extent}" + (f", one per {color}" if color else "")
    chart = _panels(chart, data, size=(460, 280))
    reading = _reading("Ribbon", data["seeds"], band)
    return _finish(chart, title, caption, summary=summary, reading=reading)


def head_map(
    frame: pd.DataFrame,
    *,
    value: str = "value",
    facet: str | None = None,
    title: str,
    caption: str,
    value_title: str | None = None,
) -> Picture:
    """A heat map of every head: block (or layer) down, head across; means over seeds.

    Raises:
        ValueError: if a column is missing, no row is left, or a head has several rows of a seed.

    >>> frame = pd.DataFrame({"block": [0, 0, 1, 1], "head": [0, 1, 0, 1],
    ...                       "value": [0.0, 0.1, 0.7, 0.2]})
    >>> head_map(frame, title="Heads", caption="Tiny model.").to_dict()["layer"][0]["mark"]["type"]
    'rect'
    """
    block = "layer" if "layer" in frame and "block" not in frame else "block"
    _require("head_map", frame, [block, "head", value, facet])
    means = _over_seeds("head_map", frame, _distinct([facet, block, "head"]), [value], value)
    data = pd.DataFrame({"block": means[block], "head": means["head"], "value": means[value]})
    data["low"], data["high"] = means["low"], means["high"]
    label = value_title or value
    if facet:
        data["panel"] = _panel_names(means[facet])
    low, high = min(0.0, float(data["value"].min())), float(data["value"].max())
    domain = [low, high if high > low else low + 1.0]
    widest = max(data["head"].nunique(), data["block"].nunique())
    cell = int(np.clip((260 if facet else 420) / widest, 10, 34))
    base = alt.Chart().encode(
        x=alt.X(field="head", type="ordinal", axis=alt.Axis(title="head", labelAngle=0)),
        y=alt.Y(field="block", type="ordinal", axis=alt.Axis(title=block)),
    )
    tooltip = [_tip("block", block), _tip("head", "head"), _tip("value", label, ".3f")]
    tooltip += _seed_tips(means["seeds"])
    cells = base.mark_rect(aria=False).encode(
        color=alt.Color(
            field="value",
            type="quantitative",
            scale=alt.Scale(scheme="viridis", domain=domain),
            legend=alt.Legend(title=label, gradientLength=160),
        ),
        tooltip=tooltip,
    )
    layers = [cells]
    if cell >= 28:
        middle = domain[0] + 0.6 * (domain[1] - domain[0])
        ink = alt.condition(f"datum.value > {middle!r}", alt.value("#111111"), alt.value("#ffffff"))
        text = alt.Text(field="value", type="quantitative", format=".2f")
        layers.append(base.mark_text(fontSize=10, aria=False).encode(text=text, color=ink))
    chart = alt.LayerChart(data=_inline(data), layer=layers).properties(width=alt.Step(cell))
    best = data.iloc[int(data["value"].argmax())]
    summary = (
        f"Heat map of {label} by {block} and head; the highest is {best['value']:.3f} "
        f"at {block} {best['block']}, head {best['head']}."
    )
    chart = _panels(chart.properties(height=alt.Step(cell)), data, size=None)
    reading = _reading("", means["seeds"], None)
    return _finish(chart, title, caption, summary=summary, reading=reading)


def scatter(
    frame: pd.DataFrame,
    *,
    color: str = "task",
    shape: str | None = None,
    facet: str | None = "layer",
    x: str = "x",
    y: str = "y",
    tooltip: Sequence[str] = (),
    title: str,
    caption: str,
) -> Picture:
    """The clusters in two dimensions, one panel a layer, each panel on its own scales.

    Without ``shape`` the shape repeats the colour, so forty labels stay apart. Axes have no
    numbers: a projection has no units.

    Args:
        tooltip: further columns to show under the pointer.

    Raises:
        ValueError: if a column is missing or no row is left.

    >>> frame = pd.DataFrame({"x": [0.0, 1.0], "y": [1.0, 0.0], "task": ["plural", "past"],
    ...                       "layer": [3, 3]})
    >>> chart = scatter(frame, title="Tasks", caption="Two points.")
    >>> [row["color"] for row in next(iter(chart.to_dict()["datasets"].values()))]
    ['plural', 'past']
    """
    _require("scatter", frame, [color, shape, facet, x, y, *tooltip])
    kept = frame.dropna(subset=[x, y])
    if kept.empty:
        raise ValueError(f"scatter: no row with a value in {x!r} and {y!r}, of {len(frame)} rows")
    shown, note = _thin_points(kept, facet)
    tooltip = [column for column in tooltip if column not in (color, shape)]
    numbers = _is_number(shown[color])
    data = pd.DataFrame({"x": shown[x], "y": shown[y]})
    data["color"] = shown[color] if numbers else shown[color].astype(str)
    if shape:
        data["shape"] = shown[shape].astype(str)
    if facet:
        data["panel"] = _panel_names(shown[facet])
    for index, name in enumerate(tooltip):
        data[f"tip{index}"] = shown[name]
    if facet:
        data = data.loc[_panel_order(shown[facet])]

    # Colours follow the order of the frame, not of what thinning left of it.
    encoding = _series(kept[color], color, field="color")
    if shape:
        if kept[color].nunique() > len(PALETTE) and not numbers:
            # Colour stands alone here, so no colour may come twice.
            domain = list(dict.fromkeys(kept[color].astype(str)))
            encoding["color"].scale = alt.Scale(domain=domain, scheme="tableau20")
        encoding["shape"] = alt.Shape(
            field="shape",
            type="nominal",
            scale=_cycled(kept[shape], SHAPES),
            legend=alt.Legend(title=shape),
        )
    pick = alt.selection_point(name="pick", fields=["color"], bind="legend")
    bare = alt.Axis(title=None, labels=False, ticks=False, domain=False, grid=False)
    scale = alt.Scale(zero=False, nice=False, padding=12)
    points_per_panel = len(data) / (data["panel"].nunique() if facet else 1)
    tips = [_tip("color", color), *([_tip("shape", shape)] if shape else [])]
    tips += [_tip(f"tip{index}", name) for index, name in enumerate(tooltip)]
    chart = (
        alt.Chart(_inline(data))
        .mark_point(filled=True, size=45 if points_per_panel < 400 else 22, aria=False)
        .encode(
            x=alt.X(field="x", type="quantitative", axis=bare, scale=scale),
            y=alt.Y(field="y", type="quantitative", axis=bare, scale=scale),
            tooltip=tips,
            opacity=alt.condition(pick, alt.value(0.8), alt.value(0.06)),
            **encoding,
        )
        .add_params(pick)
    )
    chart = _panels(chart, data, size=(420, 360))
    if facet:
        chart = chart.resolve_scale(x="independent", y="independent")
    labels = f"{data['color'].nunique()} values of {color}"
    summary = f"Scatter of {len(data)} points, coloured by {labels}"
    return _finish(chart, title, caption, summary=summary, reading=note)


def bars(
    frame: pd.DataFrame,
    *,
    name: str = "condition",
    value: str = "value",
    band: tuple[str, str] | None = None,
    facet: str | None = None,
    title: str,
    caption: str,
    value_title: str | None = None,
) -> Picture:
    """A measurement against its baselines: one bar a condition, its value written beside it.

    The first condition of the frame is the measurement and is coloured; the others are grey.
    A line spans the lowest to the highest seed.

    Args:
        name: column of conditions, kept in the order of the frame.
        band: columns with the mean and standard deviation of the null, drawn as a grey strip
            at each bar.

    Raises:
        ValueError: if a column is missing, no row is left, or a condition has several rows of
            a seed.

    >>> frame = pd.DataFrame({"condition": ["best layer", "bag of tokens"], "value": [0.7, 0.68]})
    >>> chart = bars(frame, title="ARI", caption="The baseline is high.")
    >>> [row["name"] for row in next(iter(chart.to_dict()["datasets"].values()))]
    ['best layer', 'bag of tokens']
    """
    _require("bars", frame, [name, value, facet, *(band or ())])
    means = _over_seeds("bars", frame, _distinct([facet, name]), [value, *(band or ())], value)
    order = list(dict.fromkeys(frame[name].astype(str)))
    data = pd.DataFrame({"name": means[name].astype(str), "value": means[value]})
    data["low"], data["high"], data["seeds"] = means["low"], means["high"], means["seeds"]
    # The number stands outside bar and range, on the side the bar points to.
    data["end"] = np.maximum(data["high"], 0.0)
    if facet:
        data["panel"] = _panel_names(means[facet])
    if band:
        data["null_low"] = means[band[0]] - 2 * means[band[1]]
        data["null_high"] = means[band[0]] + 2 * means[band[1]]
        data["end"] = np.maximum(data["end"], data["null_high"])
        data["null"] = NULL_LABEL
    label = value_title or value
    axis = alt.Axis(title=label, tickCount=5)
    data = data.iloc[np.argsort([order.index(condition) for condition in data["name"]])]
    base = alt.Chart().encode(
        y=alt.Y(field="name", type="nominal", sort=order, axis=alt.Axis(title=None, labelLimit=260))
    )
    tooltip = [_tip("name", name), _tip("value", label, ".3f")]
    tooltip += _seed_tips(means["seeds"])

    def across(field: str) -> alt.X:
        return alt.X(field=field, type="quantitative", axis=axis)

    ranges = [PALETTE[0], *["#9a9a9a"] * (len(order) - 1)]
    bar = base.mark_bar(height={"band": 0.62}, aria=False).encode(
        x=across("value"),
        color=alt.Color(
            field="name",
            type="nominal",
            scale=alt.Scale(domain=order, range=ranges),
            legend=None,
        ),
        tooltip=tooltip,
    )
    layers = [bar]
    if band:
        strip = base.mark_bar(height={"band": 0.92}, opacity=0.35, aria=False).encode(
            x=across("null_low"), x2=alt.X2(field="null_high"), fill=_null_fill("null")
        )
        layers.append(strip)
    if data["seeds"].max() > 1:
        span = base.mark_rule(strokeWidth=2, aria=False)
        layers.append(span.encode(x=across("low"), x2=alt.X2(field="high")))
    text = alt.Text(field="value", type="quantitative", format=".2f")
    layers.append(base.mark_text(align="left", dx=5, aria=False).encode(x=across("end"), text=text))
    chart = alt.LayerChart(data=_inline(data), layer=layers)
    size = (400, max(60, 34 * len(order)))
    listing = ", ".join(
        f"{condition} {mean:.2f}"
        for condition, mean in zip(data["name"], data["value"], strict=True)
    )
    summary = f"Bars of {label}: {listing}"
    chart = _panels(chart, data, size=size)
    reading = _reading("Line", data["seeds"], band)
    return _finish(chart, title, caption, summary=summary, reading=reading)


def save(chart: Picture, folder: str | Path, name: str) -> Path:
    """Write ``name.vl.json`` (interactive) and ``name.svg`` (still); return the SVG's path.

    Both are written whole or not at all, and the same data give the same bytes.

    Raises:
        ValueError: if ``name`` is not a plain file name.

    >>> import tempfile
    >>> frame = pd.DataFrame({"condition": ["best layer"], "value": [0.7]})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(bars(frame, title="ARI", caption=""), folder, "baselines")
    ...     print(path.name, sorted(p.name for p in path.parent.iterdir()))
    baselines.svg ['baselines.svg', 'baselines.vl.json']
    """
    if not re.fullmatch(r"[\w][\w.-]*", name):
        raise ValueError(f"save: figure name {name!r} is not a plain file name")
    spec = specification(chart)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(spec, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_whole(folder / f"{name}.vl.json", content + "\n")
    return write_whole(folder / f"{name}.svg", render_svg(spec))


def specification(chart: Picture) -> dict[str, Any]:
    """The Vega-Lite JSON of a chart, the same for the same chart in every process.

    >>> frame = pd.DataFrame({"condition": ["a", "b"], "value": [0.7, 0.1]})
    >>> one, two = (bars(frame, title="t", caption="c") for _ in range(2))
    >>> specification(one) == specification(two)
    True
    """
    with alt.data_transformers.enable("default", max_rows=None):
        spec = chart.to_dict()
    # Altair numbers the views in the order in which the process made them.
    names = dict.fromkeys(re.findall(r'"(view_\w+)"', json.dumps(spec)))
    stable = {name: f"view_{index}" for index, name in enumerate(names)}
    return _renamed(spec, stable)


def render_svg(spec: dict[str, Any]) -> str:
    """A Vega-Lite specification as SVG text, with stable ids and without any network.

    >>> frame = pd.DataFrame({"condition": ["a"], "value": [0.7]})
    >>> render_svg(specification(bars(frame, title="t", caption="c")))[:4]
    '<svg'
    """
    svg = vl_convert.vegalite_to_svg(spec, allowed_base_urls=[])
    # Vega counts clip paths and gradients over the life of the process.
    seen: dict[str, str] = {}

    def renumber(match: re.Match[str]) -> str:
        new = seen.setdefault(match[2], f"{match[2].rstrip('0123456789')}{len(seen)}")
        return match[1] + new

    svg = re.sub(r"""(\bid="|url\(#)((?:clip|gradient_)\d+)""", renumber, svg)
    # Vega gives the description to the element around the picture, which a file has not.
    description = str(spec.get("description", ""))
    return svg.replace("<svg", f'<svg role="img" aria-label={quoteattr(description)}', 1)


def write_whole(path: Path, text: str) -> Path:
    """Write a text file that is either complete or absent, also when killed half way.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_whole(Path(folder) / "note.txt", "done").read_text()
    'done'
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


# -- from the frame to what is drawn ----------------------------------------------------------


def _require(call: str, frame: pd.DataFrame, columns: Sequence[str | None]) -> None:
    for column in columns:
        if column is not None and column not in frame:
            raise ValueError(f"{call}: no column {column!r}: the frame has {list(frame)}")


def _distinct(names: Sequence[str | None]) -> list[str]:
    return list(dict.fromkeys(name for name in names if name is not None))


def _is_number(column: pd.Series) -> bool:
    return is_numeric_dtype(column) and not is_bool_dtype(column)


def _over_seeds(
    call: str, frame: pd.DataFrame, keys: list[str], columns: list[str], value: str
) -> pd.DataFrame:
    """Means over seeds of ``columns``, with the range of ``value`` and the number of seeds.

    Numeric keys come out sorted, others in the order of the frame.
    """
    kept = frame.dropna(subset=[value, *keys])
    if kept.empty:
        raise ValueError(f"{call}: no row with a value in {value!r}, of {len(frame)} rows")
    unit = [*keys, "seed"] if "seed" in kept and "seed" not in keys else keys
    repeated = kept.duplicated(unit, keep=False)
    if repeated.any():
        first = kept.loc[repeated, unit].iloc[0].to_dict()
        where = ", ".join(f"{key}={item}" for key, item in first.items())
        raise ValueError(
            f"{call}: several rows at {where}: select rows first, or tell them apart by one of "
            f"{[name for name in frame if name not in unit]}"
        )
    ordered = kept.sort_values(
        keys, key=lambda c: c if _is_number(c) else pd.Series(pd.factorize(c)[0], index=c.index)
    )
    groups = ordered.groupby(keys, sort=False)
    means = groups[columns].mean()
    spread = groups[value].agg(low="min", high="max", seeds="size")
    return means.join(spread).reset_index()


def _thin_lines(data: pd.DataFrame, groups: list[str], *, logarithmic: bool) -> pd.DataFrame:
    """Average what falls on the same pixel, where there are more positions than pixels."""
    x = data["x"].astype(float)
    if x.nunique() <= _MAX_X:
        return data
    unit = float(x[x > 0].min()) if logarithmic else 1.0
    along = np.arcsinh(x / unit) if logarithmic else x
    edges = np.linspace(along.min(), along.max(), _MAX_X + 1)
    bins = np.digitize(along, edges[1:-1])
    keys = ["part", *groups, "bin"]
    return data.assign(x=x, bin=bins).groupby(keys, sort=False).mean().reset_index()


def _thin_points(frame: pd.DataFrame, facet: str | None) -> tuple[pd.DataFrame, str]:
    """At most ``_MAX_POINTS`` rows, equally many a panel, and a sentence if rows were left out."""
    panels = frame[facet].nunique() if facet else 1
    limit = max(1, _MAX_POINTS // max(1, panels))
    shuffled = frame.iloc[np.random.default_rng(0).permutation(len(frame))]
    rank = shuffled.groupby(facet).cumcount() if facet else np.arange(len(frame))
    shown = shuffled[np.asarray(rank) < limit]
    # Rows keep the order of the frame, which is the order of colours and panels.
    positions = np.sort(frame.index.get_indexer_for(shown.index)) if frame.index.is_unique else None
    shown = frame.iloc[positions] if positions is not None else shown
    note = "" if len(shown) == len(frame) else f"{len(shown):,} of {len(frame):,} points drawn."
    return shown.reset_index(drop=True), note


def _panel_names(column: pd.Series) -> pd.Series:
    """Text for the head of a panel: a bare number needs the name of its column."""
    return (
        column.map(lambda item: f"{column.name} {item:g}")
        if _is_number(column)
        else (column.astype(str))
    )


def _panel_order(column: pd.Series) -> pd.Index:
    """Row order in which panels come sorted if they are numbers, as given otherwise."""
    return column.sort_values(kind="stable").index if _is_number(column) else column.index


def _inline(data: pd.DataFrame) -> alt.InlineData:
    """Data inside the chart: six significant digits, and no limit on the number of rows."""
    columns = [[_plain(item) for item in data[name].tolist()] for name in data]
    names = [str(name) for name in data]
    rows = [
        {name: item for name, item in zip(names, row, strict=True) if item is not None}
        for row in zip(*columns, strict=True)
    ]
    return alt.InlineData(values=rows)


def _plain(item: Any) -> Any:
    if item is None or item is pd.NA or item is pd.NaT:
        return None
    if isinstance(item, (bool, int, str)):
        return item
    if isinstance(item, float):
        return float(f"{item:.6g}") if math.isfinite(item) else None
    return str(item)


def _renamed(node: Any, names: dict[str, str]) -> Any:
    """``node`` with view names replaced where a specification keeps them."""
    if isinstance(node, list):
        return [_renamed(item, names) for item in node]
    if not isinstance(node, dict):
        return node
    renamed = {key: _renamed(item, names) for key, item in node.items() if key != "datasets"}
    if "datasets" in node:
        renamed["datasets"] = node["datasets"]
    if isinstance(node.get("name"), str):
        renamed["name"] = names.get(node["name"], node["name"])
    if isinstance(node.get("views"), list):
        renamed["views"] = [names.get(view, view) for view in node["views"]]
    return renamed


# -- scales, legends, panels ------------------------------------------------------------------


def _tip(field: str, title: str, number_format: str | None = None) -> alt.Tooltip:
    if number_format is None:
        return alt.Tooltip(field=field, type="nominal", title=title)
    return alt.Tooltip(field=field, type="quantitative", title=title, format=number_format)


def _seed_tips(seeds: pd.Series) -> list[alt.Tooltip]:
    if seeds.max() <= 1:
        return []
    return [_tip("low", "lowest seed", ".3f"), _tip("high", "highest seed", ".3f")]


def _x_axis(values: pd.Series, name: str, *, narrow: bool) -> alt.X:
    if not _is_number(values):
        order = list(dict.fromkeys(values))
        axis = alt.Axis(title=name, labelAngle=-30)
        return alt.X(field="x", type="ordinal", sort=order, axis=axis)
    if name == "step":
        # A plain logarithm has no place for step 0; the linear part ends at the first real step.
        positive = values[values > 0]
        unit = float(positive.min()) if len(positive) else 1.0
        ticks = _log_ticks(float(values.min()), unit, float(values.max()))
        axis = alt.Axis(
            title="training step", values=ticks, grid=False, labelExpr="format(datum.value, '~s')"
        )
        scale = alt.Scale(type="symlog", constant=unit, nice=False, padding=6)
        return alt.X(field="x", type="quantitative", axis=axis, scale=scale)
    axis = alt.Axis(title=name, tickCount=6 if narrow else 12, grid=False)
    if bool((values == values.round()).all()):
        axis = alt.Axis(title=name, tickCount=6 if narrow else 12, grid=False, tickMinStep=1)
    scale = alt.Scale(nice=False, zero=False, padding=6)
    return alt.X(field="x", type="quantitative", axis=axis, scale=scale)


def _log_ticks(lowest: float, unit: float, highest: float) -> list[float]:
    """0 if the axis reaches it, and powers of ten, or 1-2-5 where those are too few."""
    exponents = range(math.floor(math.log10(unit)), math.ceil(math.log10(max(highest, unit))) + 1)
    tens = [10.0**e for e in exponents if unit <= 10.0**e <= highest]
    finer = [m * 10.0**e for e in exponents for m in (1, 2, 5) if unit <= m * 10.0**e <= highest]
    return ([0.0] if lowest <= 0 else []) + (tens if len(tens) >= 3 else finer)


def _series(values: pd.Series, name: str, *, field: str = "line") -> dict[str, Any]:
    """Colour (and shape) encodings of the values of a column."""
    if _is_number(values):
        steps = sorted(values.unique().tolist())
        spaced = np.linspace(0, len(steps) - 1, min(8, len(steps))).round().astype(int)
        legend = alt.Legend(
            title=name, values=[steps[i] for i in spaced], symbolOpacity=1, symbolSize=60
        )
        color = alt.Color(field=field, type="ordinal", sort="ascending", legend=legend)
        return {"color": color}
    legend = alt.Legend(title=name, symbolOpacity=1, symbolSize=60)
    colors, shapes = _cycled(values, PALETTE), _cycled(values, SHAPES)
    return {
        "color": alt.Color(field=field, type="nominal", scale=colors, legend=legend),
        "shape": alt.Shape(field=field, type="nominal", scale=shapes, legend=legend),
    }


def _cycled(values: pd.Series, choices: Sequence[str]) -> alt.Scale:
    domain = list(dict.fromkeys(values.astype(str)))
    return alt.Scale(domain=domain, range=[choices[i % len(choices)] for i in range(len(domain))])


def _null_fill(field: str) -> alt.Fill:
    """Grey, with a legend entry of its own; ``field`` holds ``NULL_LABEL`` in the rows drawn."""
    scale = alt.Scale(domain=[NULL_LABEL], range=["#888888"])
    legend = alt.Legend(title=None, symbolType="square", symbolOpacity=0.6, symbolStrokeWidth=0)
    return alt.Fill(field=field, type="nominal", scale=scale, legend=legend)


def _null_band(x: alt.X, low: alt.Y, high: alt.Y2) -> alt.Chart:
    band = alt.Chart().transform_filter(f"datum.part === '{NULL_LABEL}'")
    fill = _null_fill("part")
    return band.mark_area(opacity=0.3, aria=False).encode(x=x, y=low, y2=high, fill=fill)


def _panels(
    chart: alt.Chart | alt.LayerChart, data: pd.DataFrame, *, size: tuple[int, int] | None
) -> Picture:
    """One panel a value of ``panel``, if the data have that column."""
    names = list(dict.fromkeys(data["panel"])) if "panel" in data else []
    if not names:
        return chart.properties(width=size[0], height=size[1]) if size else chart
    columns = len(names) if len(names) <= 3 else 2 if len(names) == 4 else 3
    if size:
        ratio = 0.72 if columns == 2 else 0.55
        chart = chart.properties(width=int(size[0] * ratio), height=int(size[1] * ratio))
    header = alt.Header(title=None)
    panel = alt.Facet(field="panel", type="nominal", sort=names, header=header)
    # The data stand at the top of a facet, and only there.
    inline = chart.data
    chart.data = alt.Undefined
    return chart.facet(facet=panel, columns=columns, data=inline)


def _reading(mark: str, seeds: pd.Series, band: tuple[str, str] | None) -> str:
    """What mean, range and grey stand for: a picture alone does not say."""
    most = int(seeds.max())
    sentences = []
    if most > 1:
        spread = f"; {mark.lower()}: lowest to highest seed" if mark else ""
        sentences.append(f"Mean of {most} seeds{spread}.")
    if band:
        sentences.append("Grey: the same score with permuted labels, mean ± 2 sd.")
    return " ".join(sentences)


def _finish(
    chart: Picture, title: str, caption: str, *, summary: str, reading: str = ""
) -> Picture:
    """Title, alternative text and the look; the caption travels with the chart for the page.

    ``reading`` says how to read the marks (and which are not drawn), ``summary`` what a reader
    who cannot see them would want to know first.
    """
    heading = alt.TitleParams(text=textwrap.wrap(title, 70) or [""])
    sentences = [text.rstrip(". ") + "." for text in (title, caption, reading, summary) if text]
    if reading:
        caption = " ".join(text.rstrip(". ") + "." for text in (caption, reading) if text)
    return chart.properties(
        title=heading,
        description=" ".join(sentences),
        background="white",
        # Room at the sides for a reader whose font is wider than the one measured.
        padding={"left": 14, "right": 28, "top": 8, "bottom": 8},
        usermeta={"caption": caption, "title": title},
    ).configure(**_CONFIG)
