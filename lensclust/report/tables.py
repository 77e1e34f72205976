"""The scores of a run in the page: compressed columns, as many rows as fit.

A million numbers as text would be ten times the page. Columns of words are coded by a list of the
words, numbers keep six digits, and all is compressed; the browser unpacks it when the table is
opened. Rows that do not fit are only in ``scores.parquet``, and the page says so.
"""

from __future__ import annotations

import base64
import gzip
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from lensclust.report.wording import number

# Maximum size of a run's table in the page, and of cells that a browser sorts.
_MAX_BYTES = 2_000_000
_MAX_CELLS = 3_000_000
# Rows shown without scripts, and until the table is opened.
_STILL_ROWS = 20
_MAX_COLUMNS = 200
# Maximum characters of a cell: enough for a prompt, not for a book.
_MAX_LETTERS = 2_000


@dataclass(frozen=True)
class ScoreTable:
    """A table of scores, ready for the page.

    Attributes:
        columns: name of each shown column, and whether it holds numbers.
        still: the first rows as text.
        packed: all rows that fit, as base64 of gzip of JSON.
        n_packed, n_rows: number of rows that fit, and of all.
        n_columns: number of all columns.
    """

    columns: tuple[tuple[str, bool], ...]
    still: tuple[tuple[str, ...], ...]
    packed: str
    n_packed: int
    n_rows: int
    n_columns: int


def score_table(scores: pd.DataFrame) -> ScoreTable:
    """Pack a frame of scores.

    >>> table = score_table(pd.DataFrame({"site": ["resid 1", "resid 2"], "value": [0.5, None]}))
    >>> table.columns, table.still
    ((('site', False), ('value', True)), (('resid 1', '0.500'), ('resid 2', '–')))
    >>> json.loads(gzip.decompress(base64.b64decode(table.packed)))["columns"][0]
    {'codes': [0, 1], 'name': 'site', 'words': ['resid 1', 'resid 2']}
    """
    # By position: two columns of a file may have the same name.
    columns = [scores.iloc[:, place] for place in range(min(scores.shape[1], _MAX_COLUMNS))]
    named = tuple((str(column.name), _is_number(column)) for column in columns)
    still = zip(*(column.head(_STILL_ROWS).tolist() for column in columns), strict=True)
    rows = min(len(scores), _MAX_CELLS // max(1, len(columns)))
    packed = _pack(columns, rows)
    while len(packed) > _MAX_BYTES and rows > 1:
        rows = max(1, int(rows * 0.9 * _MAX_BYTES / len(packed)))
        packed = _pack(columns, rows)
    return ScoreTable(
        columns=named,
        still=tuple(tuple(_text(item) for item in row) for row in still),
        packed=packed,
        n_packed=rows if columns else 0,
        n_rows=len(scores),
        n_columns=scores.shape[1],
    )


def _text(value: Any) -> str:
    text = number(value)
    return text if len(text) <= _MAX_LETTERS else f"{text[:_MAX_LETTERS]}…"


def _is_number(column: pd.Series) -> bool:
    return bool(is_numeric_dtype(column)) and not is_bool_dtype(column)


def _pack(columns: list[pd.Series], rows: int) -> str:
    content = {"columns": [_column(column.head(rows)) for column in columns], "rows": rows}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    # Level 9 takes five times as long and saves 2 %.
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=7, mtime=0)).decode()


def _column(column: pd.Series) -> dict[str, Any]:
    if not _is_number(column):
        words = column.map(_text)
        codes, known = pd.factorize(words)
        return {"name": str(column.name), "codes": codes.tolist(), "words": known.tolist()}
    values = column.astype("Float64").to_numpy(dtype=float, na_value=np.nan)
    # As null: JSON cannot represent them.
    odd = {
        str(place): "∞" if values[place] > 0 else "−∞"
        for place in np.flatnonzero(np.isinf(values)).tolist()
    }
    whole = bool(np.all(np.isfinite(values) & (values == np.round(values)) & (abs(values) < 2**53)))
    plain = [
        None if not np.isfinite(item) else int(item) if whole else float(f"{item:.6g}")
        for item in values.tolist()
    ]
    return {"name": str(column.name), "values": plain} | ({"infinite": odd} if odd else {})
