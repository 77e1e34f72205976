"""Scatter plots: states in two dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import pandas as pd

from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.figures.data import inline, is_number, require_columns, thin_points
from lensclust.figures.encodings import cycled, panel_names, panel_order, panels, series, tip
from lensclust.figures.style import PALETTE, SHAPES, Picture, finish


@checked_arguments
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
    """Clusters in two dimensions, one panel per layer, each panel with separate scales.

    Without ``shape`` the shape repeats the colour, so forty labels are distinguishable. Axes have
    no numbers: a projection has no units.

    Args:
        tooltip: further columns to show under the pointer.

    Raises:
        InputError: if a column is missing or no row is left.

    >>> frame = pd.DataFrame({"x": [0.0, 1.0], "y": [1.0, 0.0], "task": ["plural", "past"],
    ...                       "layer": [3, 3]})
    >>> chart = scatter(frame, title="Tasks", caption="Two points.")
    >>> [row["color"] for row in next(iter(chart.to_dict()["datasets"].values()))]
    ['plural', 'past']
    """
    require_columns("scatter", frame, [color, shape, facet, x, y, *tooltip])
    kept = frame.dropna(subset=[x, y])
    if kept.empty:
        raise InputError(f"scatter: no row with a value in {x!r} and {y!r}, of {len(frame)} rows")
    shown, note = thin_points(kept, facet)
    tooltip = [column for column in tooltip if column not in (color, shape)]
    numbers = is_number(shown[color])
    data = pd.DataFrame({"x": shown[x], "y": shown[y]})
    data["color"] = shown[color] if numbers else shown[color].astype(str)
    if shape:
        data["shape"] = shown[shape].astype(str)
    if facet:
        data["panel"] = panel_names(shown[facet])
    for index, name in enumerate(tooltip):
        data[f"tip{index}"] = shown[name]
    if facet:
        data = data.loc[panel_order(shown[facet])]

    # Colours follow the order of the full frame, not of the thinned one.
    encoding = series(kept[color], color, field="color")
    if shape:
        if kept[color].nunique() > len(PALETTE) and not numbers:
            # Colour is not repeated by shape here, so no colour may occur twice.
            domain = list(dict.fromkeys(kept[color].astype(str)))
            encoding["color"].scale = alt.Scale(domain=domain, scheme="tableau20")
        encoding["shape"] = alt.Shape(
            field="shape",
            type="nominal",
            scale=cycled(kept[shape], SHAPES),
            legend=alt.Legend(title=shape),
        )
    pick = alt.selection_point(name="pick", fields=["color"], bind="legend")
    bare = alt.Axis(title=None, labels=False, ticks=False, domain=False, grid=False)
    scale = alt.Scale(zero=False, nice=False, padding=12)
    points_per_panel = len(data) / (data["panel"].nunique() if facet else 1)
    tips = [tip("color", color), *([tip("shape", shape)] if shape else [])]
    tips += [tip(f"tip{index}", name) for index, name in enumerate(tooltip)]
    chart = (
        alt.Chart(inline(data))
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
    chart = panels(chart, data, size=(420, 360))
    if facet:
        chart = chart.resolve_scale(x="independent", y="independent")
    labels = f"{data['color'].nunique()} values of {color}"
    summary = f"Scatter of {len(data)} points, coloured by {labels}"
    return finish(chart, title, caption, summary=summary, reading=note)
