"""Preparation of a tidy frame for a figure: checks, means over seeds, thinning, inlining.

Only its dtype decides whether a column holds numbers or names: "0" to "9" are names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from lensclust.errors import InputError

_MAX_POSITIONS = 400  # positions on a line: about one per pixel
_MAX_POINTS = 3000  # points of a scatter, over all its panels


def require_columns(call: str, frame: pd.DataFrame, columns: Sequence[str | None]) -> None:
    """Raise InputError if a column that a chart needs is missing."""
    for column in columns:
        if column is not None and column not in frame:
            raise InputError(f"{call}: no column {column!r}: the frame has {list(frame)}")


def distinct(names: Sequence[str | None]) -> list[str]:
    """The names that are given, each once, in order."""
    return list(dict.fromkeys(name for name in names if name is not None))


def is_number(column: pd.Series) -> bool:
    """Whether a column holds numbers; truth values do not count."""
    return is_numeric_dtype(column) and not is_bool_dtype(column)


def over_seeds(
    call: str, frame: pd.DataFrame, keys: list[str], columns: list[str], value: str
) -> pd.DataFrame:
    """Means over seeds of ``columns``, with the range of ``value`` and the number of seeds.

    Numeric keys are sorted, others in the order of the frame.
    """
    kept = frame.dropna(subset=[value, *keys])
    if kept.empty:
        raise InputError(f"{call}: no row with a value in {value!r}, of {len(frame)} rows")
    unit = [*keys, "seed"] if "seed" in kept and "seed" not in keys else keys
    repeated = kept.duplicated(unit, keep=False)
    if repeated.any():
        first = kept.loc[repeated, unit].iloc[0].to_dict()
        where = ", ".join(f"{key}={item}" for key, item in first.items())
        raise InputError(
            f"{call}: several rows at {where}: select rows first, or tell them apart by one of "
            f"{[name for name in frame if name not in unit]}"
        )
    ordered = kept.sort_values(
        keys, key=lambda c: c if is_number(c) else pd.Series(pd.factorize(c)[0], index=c.index)
    )
    groups = ordered.groupby(keys, sort=False)
    means = groups[columns].mean()
    spread = groups[value].agg(low="min", high="max", seeds="size")
    return means.join(spread).reset_index()


def thin_lines(data: pd.DataFrame, groups: list[str], *, logarithmic: bool) -> pd.DataFrame:
    """Average points on the same pixel, if there are more positions than pixels."""
    x = data["x"].astype(float)
    if x.nunique() <= _MAX_POSITIONS:
        return data
    unit = float(x[x > 0].min()) if logarithmic else 1.0
    along = np.arcsinh(x / unit) if logarithmic else x
    edges = np.linspace(along.min(), along.max(), _MAX_POSITIONS + 1)
    bins = np.digitize(along, edges[1:-1])
    keys = ["part", *groups, "bin"]
    return data.assign(x=x, bin=bins).groupby(keys, sort=False).mean().reset_index()


def thin_points(frame: pd.DataFrame, facet: str | None) -> tuple[pd.DataFrame, str]:
    """At most ``_MAX_POINTS`` rows, equally many per panel, and a note if rows were dropped."""
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


def inline(data: pd.DataFrame) -> alt.InlineData:
    """Data inside the chart: six significant digits, without a limit on the number of rows."""
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
