"""Lines: a metric by layer or by training step."""

from __future__ import annotations

import altair as alt
import pandas as pd

from lensclust.arguments import checked_arguments
from lensclust.figures.data import (
    distinct,
    inline,
    is_number,
    over_seeds,
    require_columns,
    thin_lines,
)
from lensclust.figures.encodings import (
    null_band,
    panel_names,
    panels,
    seed_tips,
    series,
    tip,
    x_axis,
)
from lensclust.figures.style import NULL_LABEL, PALETTE, Picture, finish, how_to_read


@checked_arguments
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
    """A metric by layer or by training step, with the band of its permuted-label null.

    Rows that differ only in ``seed`` become one line, the mean, with a ribbon from the lowest to
    the highest seed. The grey band is null mean ± 2 sd (averaged over seeds); if several lines
    share a panel, it covers all their nulls.

    Args:
        x: numeric or text column along the axis; ``step`` gets a logarithmic axis with 0.
        color: one line per value. Numbers (steps, layers) get an ordered colour ramp, anything
            else a nominal palette with a shape each.
        band: columns with the mean and standard deviation of the null, None without one.
        facet: one panel per value.

    Raises:
        InputError: if a column is missing, no row is left, or rows differ in something that is
            neither ``x``, ``color``, ``facet`` nor ``seed`` (a mean over it would hide it).

    >>> frame = pd.DataFrame({"layer": [0, 1], "value": [0.0, 0.8],
    ...                       "null_mean": [0.0, 0.0], "null_std": [0.01, 0.02]})
    >>> chart = curves(frame, title="ARI by layer", caption="Tiny model.")
    >>> chart.to_dict()["title"]["text"]
    ['ARI by layer']
    """
    require_columns("curves", frame, [x, y, color, facet, *(band or ())])
    keys = distinct([facet, color, x])
    means = over_seeds("curves", frame, keys, [y, *(band or ())], y)
    numeric_x = is_number(means[x])
    data = pd.DataFrame({"part": "line", "x": means[x], "y": means[y]})
    data["low"], data["high"], data["seeds"] = means["low"], means["high"], means["seeds"]
    if color:
        data["line"] = means[color] if is_number(means[color]) else means[color].astype(str)
    if facet:
        data["panel"] = panel_names(means[facet])
    if band:
        data["null_low"] = means[band[0]] - 2 * means[band[1]]
        data["null_high"] = means[band[0]] + 2 * means[band[1]]
    groups = [name for name in ("panel", "line") if name in data]
    if numeric_x:
        data = thin_lines(data, groups, logarithmic=x == "step").drop(
            columns="bin", errors="ignore"
        )
    parts = [data]
    if band:
        null = data.groupby(distinct(["panel" if facet else None, "x"]), sort=False)
        edges = null.agg(low=("null_low", "min"), high=("null_high", "max")).reset_index()
        parts.append(edges.assign(part=NULL_LABEL))
    lines = inline(pd.concat(parts, ignore_index=True))

    horizontal = x_axis(data["x"], x, narrow=bool(facet))
    vertical_title = y_title or y
    y_axis = alt.Axis(title=vertical_title, tickCount=6)
    vertical = alt.Y(field="y", type="quantitative", axis=y_axis)
    low = alt.Y(field="low", type="quantitative", axis=y_axis)
    high = alt.Y2(field="high")
    tooltip = [
        *([tip("line", color or "")] if color else []),
        tip("x", x),
        tip("y", vertical_title, ".3f"),
        *seed_tips(data["seeds"]),
        *([tip("null_low", "null -2 sd", ".3f")] if band else []),
        *([tip("null_high", "null +2 sd", ".3f")] if band else []),
    ]
    measured = alt.Chart().transform_filter("datum.part === 'line'")
    line = measured.mark_line(strokeWidth=2, aria=False).encode(x=horizontal, y=vertical)
    ribbon = measured.mark_area(opacity=0.18, aria=False).encode(x=horizontal, y=low, y2=high)
    # A point wide enough for a pointer, also where the line is too dense for marks.
    shown = 0.9 if data["x"].nunique() <= 60 else 0.0
    point = measured.mark_point(filled=True, size=36, aria=False).encode(
        x=horizontal, y=vertical, tooltip=tooltip, opacity=alt.value(shown)
    )
    if color:
        pick = alt.selection_point(name="pick", fields=["line"], bind="legend")
        encoding = series(data["line"], color)
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
        layers.insert(0, null_band(horizontal, low, high))
    chart = alt.LayerChart(data=lines, layer=layers)
    extent = f"{x} from {data['x'].iloc[0]} to {data['x'].iloc[-1]}"
    summary = f"Lines of {vertical_title} by {extent}" + (f", one per {color}" if color else "")
    chart = panels(chart, data, size=(460, 280))
    reading = how_to_read("Ribbon", data["seeds"], band)
    return finish(chart, title, caption, summary=summary, reading=reading)
