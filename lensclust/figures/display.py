"""Display of results in a notebook: a sentence, a small table and a static figure.

The figure is rendered here, so that it appears without a network and is saved in the notebook.
"""

from __future__ import annotations

from html import escape
from typing import Any

import pandas as pd

_MOST_ROWS, _MOST_COLUMNS = 10, 12


def as_html(said: str, *tables: pd.DataFrame, picture: Any = None) -> str:
    """HTML of a sentence, the first rows of tables, and an Altair chart as a static figure.

    >>> html = as_html("<b>", pd.DataFrame({"site": ["<i>"], "value": [0.25]}))
    >>> "&lt;b&gt;" in html, "<td>&lt;i&gt;</td>" in html
    (True, True)
    """
    from lensclust.figures.files import render_svg, specification

    parts = [f"<p>{escape(said)}</p>"]
    for table in tables:
        plain = isinstance(table.index, pd.RangeIndex) or table.index.name is None
        parts.append(
            table.iloc[:_MOST_ROWS, :_MOST_COLUMNS].to_html(
                index=not plain, border=0, float_format=lambda value: f"{value:.3g}"
            )
        )
        if len(table) > _MOST_ROWS:
            parts.append(f"<p><small>{_MOST_ROWS} of {len(table):,} rows</small></p>")
    if picture is not None:
        parts.append(render_svg(specification(picture)))
    return "".join(parts)


class Shown:
    """Base class of results: a notebook shows their ``repr``, the highest rows and the plot."""

    def _repr_html_(self) -> str:
        plot = getattr(self, "plot", None)
        return as_html(repr(self), *self._tables(), picture=plot() if plot else None)

    def _tables(self) -> tuple[pd.DataFrame, ...]:
        """The tables to show; by default the rows of ``frame`` with the highest value."""
        frame: pd.DataFrame = getattr(self, "frame")  # noqa: B009  (a result may have none)
        given = frame.dropna(axis=1, how="all").drop(columns=["kind"], errors="ignore")
        return (given.sort_values("value", ascending=False) if "value" in given else given,)
