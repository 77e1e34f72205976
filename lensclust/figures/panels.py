"""One panel a value of a column: its heading, its place, its size."""

from __future__ import annotations

import altair as alt
import pandas as pd

from lensclust.figures.frames import is_number
from lensclust.figures.style import Picture


def panel_names(column: pd.Series) -> pd.Series:
    """Text for the head of a panel: a bare number needs the name of its column."""
    return (
        column.map(lambda item: f"{column.name} {item:g}")
        if is_number(column)
        else (column.astype(str))
    )


def panel_order(column: pd.Series) -> pd.Index:
    """Row order in which panels come sorted if they are numbers, as given otherwise."""
    return column.sort_values(kind="stable").index if is_number(column) else column.index


def panels(
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
