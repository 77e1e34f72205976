"""Encodings of columns: axes, colours, shapes, tooltips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from lensclust.figures.data import is_number
from lensclust.figures.style import NULL_LABEL, PALETTE, SHAPES, Picture


def tip(field: str, title: str, number_format: str | None = None) -> alt.Tooltip:
    """A tooltip for a column: text, or a number in a format."""
    if number_format is None:
        return alt.Tooltip(field=field, type="nominal", title=title)
    return alt.Tooltip(field=field, type="quantitative", title=title, format=number_format)


def seed_tips(seeds: pd.Series) -> list[alt.Tooltip]:
    """Tooltips for the range over seeds, if there are several."""
    if seeds.max() <= 1:
        return []
    return [tip("low", "lowest seed", ".3f"), tip("high", "highest seed", ".3f")]


def x_axis(values: pd.Series, name: str, *, narrow: bool) -> alt.X:
    """The x axis: ordinal for names, logarithmic for steps, linear otherwise."""
    if not is_number(values):
        order = list(dict.fromkeys(values))
        axis = alt.Axis(title=name, labelAngle=-30)
        return alt.X(field="x", type="ordinal", sort=order, axis=axis)
    if name == "step":
        # A logarithm excludes step 0; the linear part of the axis ends at the first positive step.
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


def series(values: pd.Series, name: str, *, field: str = "line") -> dict[str, Any]:
    """Colour (and shape) encodings of the values of a column."""
    if is_number(values):
        steps = sorted(values.unique().tolist())
        spaced = np.linspace(0, len(steps) - 1, min(8, len(steps))).round().astype(int)
        legend = alt.Legend(
            title=name, values=[steps[i] for i in spaced], symbolOpacity=1, symbolSize=60
        )
        color = alt.Color(field=field, type="ordinal", sort="ascending", legend=legend)
        return {"color": color}
    legend = alt.Legend(title=name, symbolOpacity=1, symbolSize=60)
    colors, shapes = cycled(values, PALETTE), cycled(values, SHAPES)
    return {
        "color": alt.Color(field=field, type="nominal", scale=colors, legend=legend),
        "shape": alt.Shape(field=field, type="nominal", scale=shapes, legend=legend),
    }


def cycled(values: pd.Series, choices: Sequence[str]) -> alt.Scale:
    """A scale that repeats its choices when there are more values than choices."""
    domain = list(dict.fromkeys(values.astype(str)))
    return alt.Scale(domain=domain, range=[choices[i % len(choices)] for i in range(len(domain))])


def null_fill(field: str) -> alt.Fill:
    """Grey, with a separate legend entry; ``field`` holds ``NULL_LABEL`` in the drawn rows."""
    scale = alt.Scale(domain=[NULL_LABEL], range=["#888888"])
    legend = alt.Legend(title=None, symbolType="square", symbolOpacity=0.6, symbolStrokeWidth=0)
    return alt.Fill(field=field, type="nominal", scale=scale, legend=legend)


def null_band(x: alt.X, low: alt.Y, high: alt.Y2) -> alt.Chart:
    """The band of the null distribution behind a chart."""
    band = alt.Chart().transform_filter(f"datum.part === '{NULL_LABEL}'")
    fill = null_fill("part")
    return band.mark_area(opacity=0.3, aria=False).encode(x=x, y=low, y2=high, fill=fill)


def panel_names(column: pd.Series) -> pd.Series:
    """Titles of panels; numbers are prefixed with the name of their column."""
    return (
        column.map(lambda item: f"{column.name} {item:g}")
        if is_number(column)
        else (column.astype(str))
    )


def panel_order(column: pd.Series) -> pd.Index:
    """Row order that sorts numeric panels and keeps the order of others."""
    return column.sort_values(kind="stable").index if is_number(column) else column.index


def panels(
    chart: alt.Chart | alt.LayerChart, data: pd.DataFrame, *, size: tuple[int, int] | None
) -> Picture:
    """One panel per value of ``panel``, if the data have that column."""
    names = list(dict.fromkeys(data["panel"])) if "panel" in data else []
    if not names:
        return chart.properties(width=size[0], height=size[1]) if size else chart
    columns = len(names) if len(names) <= 3 else 2 if len(names) == 4 else 3
    if size:
        ratio = 0.72 if columns == 2 else 0.55
        chart = chart.properties(width=int(size[0] * ratio), height=int(size[1] * ratio))
    header = alt.Header(title=None)
    panel = alt.Facet(field="panel", type="nominal", sort=names, header=header)
    # A facet holds its data at the top level only.
    inline = chart.data
    chart.data = alt.Undefined
    return chart.facet(facet=panel, columns=columns, data=inline)
