"""Trade-offs: gain against cost of each method."""

from __future__ import annotations

import altair as alt
import numpy as np
import pandas as pd

from lensclust.errors import InputError
from lensclust.figures.data import inline, is_number, require_columns
from lensclust.figures.encodings import panel_names, panels, series, tip
from lensclust.figures.style import Picture, finish

FRONT = "best trade-offs"


def trade_off(
    frame: pd.DataFrame,
    *,
    cost: str,
    gain: str,
    color: str = "method",
    label: str | None = None,
    facet: str | None = None,
    title: str,
    caption: str,
    cost_title: str | None = None,
    gain_title: str | None = None,
) -> Picture:
    """Gain over cost, one point per row; a line joins the points on the Pareto front.

    Args:
        cost: numeric column, less is better.
        gain: numeric column, more is better.
        color: one colour and shape per value.
        label: column written beside the points, such as a number of examples.
        facet: one panel per value, each with a separate front.

    Raises:
        InputError: if a column is missing or no row is left.

    >>> frame = pd.DataFrame({"method": ["a", "b", "c"], "loss": [0.0, 0.2, 0.3],
    ...                       "success": [0.5, 0.9, 0.8]})
    >>> chart = trade_off(frame, cost="loss", gain="success", title="t", caption="c")
    >>> [row["front"] for row in next(iter(chart.to_dict()["datasets"].values()))]
    [True, True, False]
    """
    require_columns("trade_off", frame, [cost, gain, color, label, facet])
    kept = frame.dropna(subset=[cost, gain])
    if kept.empty:
        raise InputError(f"trade_off: no row with {cost!r} and {gain!r}, of {len(frame)} rows")
    data = pd.DataFrame({"x": kept[cost], "y": kept[gain]})
    data["line"] = kept[color] if is_number(kept[color]) else kept[color].astype(str)
    if label:
        data["label"] = kept[label].astype(str)
    if facet:
        data["panel"] = panel_names(kept[facet])
    parts = data.groupby("panel", sort=False) if facet else [("", data)]
    data["front"] = pd.concat([unbeaten(part["x"], part["y"]) for _, part in parts])
    data["part"] = np.where(data["front"], FRONT, "")
    names = cost_title or cost, gain_title or gain
    across = alt.X(
        field="x",
        type="quantitative",
        axis=alt.Axis(title=names[0], tickCount=6),
        scale=alt.Scale(nice=False, zero=False, padding=14),
    )
    up = alt.Y(
        field="y",
        type="quantitative",
        axis=alt.Axis(title=names[1], tickCount=6),
        scale=alt.Scale(nice=False, zero=False, padding=14),
    )
    pick = alt.selection_point(name="pick", fields=["line"], bind="legend")
    tooltip = [tip("line", color), *([tip("label", label)] if label else [])]
    tooltip += [tip("x", names[0], ".3f"), tip("y", names[1], ".3f")]
    front = alt.Chart().transform_filter("datum.front")
    # A step function, since nothing is measured between two points.
    line = front.mark_line(
        color="#999999", strokeDash=[4, 3], interpolate="step-after", aria=False
    ).encode(x=across, y=up, order=alt.Order(field="x", type="quantitative"))
    point = (
        alt.Chart()
        .mark_point(filled=True, size=70, aria=False)
        .encode(
            x=across,
            y=up,
            tooltip=tooltip,
            opacity=alt.condition(pick, alt.value(0.9), alt.value(0.1)),
            **series(data["line"], color),
        )
        .add_params(pick)
    )
    layers: list[alt.Chart] = [line, point]
    if label:
        text = alt.Text(field="label", type="nominal")
        layers.append(
            alt.Chart()
            .mark_text(align="left", dx=7, fontSize=10, aria=False)
            .encode(x=across, y=up, text=text)
        )
    chart = alt.LayerChart(data=inline(data), layer=layers)
    best = data[data["front"]].sort_values("x")
    listing = ", ".join(dict.fromkeys(best["line"].astype(str)))
    summary = f"{names[1]} over {names[0]} of {len(data)} points; {FRONT}: {listing}"
    chart = panels(chart, data, size=(460, 320))
    reading = "Dashed: what no other point beats in both"
    return finish(chart, title, caption, summary=summary, reading=reading)


def unbeaten(cost: pd.Series, gain: pd.Series) -> pd.Series:
    """The Pareto front: points that no other point dominates in cost and gain."""
    x, y = cost.to_numpy(), gain.to_numpy()
    as_good = (x[:, None] <= x) & (y[:, None] >= y)
    better = as_good & ((x[:, None] < x) | (y[:, None] > y))
    return pd.Series(np.logical_not(better.any(axis=0)).tolist(), index=cost.index)
