"""Safe reading of parquet files from elsewhere: a few bytes cannot claim much memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow
from pyarrow import compute, parquet

from lensclust.errors import InputError

# A hundred times those of the largest run: cells, and bytes of all texts.
_MAX_CELLS, _MAX_TEXT = 100_000_000, 500_000_000


def read_frame(path: Path, *, what: str = "") -> pd.DataFrame:
    """Read a frame written by pandas, of limited size.

    Raises:
        InputError: if it cannot be read, or claims more cells or texts than any run writes.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.parquet"
    >>> pd.DataFrame({"site": ["resid 1"], "head": pd.array([None], "Int64")}).to_parquet(path)
    >>> read_frame(path).dtypes.astype(str).tolist()
    ['str', 'Int64']
    """
    try:
        held = parquet.read_metadata(path)
        if held.num_rows * held.num_columns > _MAX_CELLS:
            raise InputError(
                f"{what}{path} says {held.num_rows:,} rows and {held.num_columns:,} columns, "
                f"expected at most {_MAX_CELLS:,} cells"
            )
        schema = parquet.read_schema(path)
        nested = [field.name for field in schema if pyarrow.types.is_nested(field.type)]
        if nested:
            raise InputError(f"{what}{path}: column {nested[0]!r} holds lists, expected values")
        # Each text once, however often it occurs in the file.
        texts = [field.name for field in schema if _is_text(field.type)]
        table = parquet.read_table(path, read_dictionary=texts)
        size = sum(_text_bytes(table.column(n)) for n in texts if texts.count(n) == 1)
        if size > _MAX_TEXT:
            raise InputError(f"{what}{path}: its texts are {size:,} bytes, more than {_MAX_TEXT:,}")
        return _framed(table.cast(schema))
    except InputError:
        raise
    except Exception as error:  # pyarrow and pandas may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{what}{path} is not a readable parquet file: {reason}") from error


def _framed(table: pyarrow.Table) -> pd.DataFrame:
    """Convert as `pandas.read_parquet` does."""
    about = table.schema.pandas_metadata or {}
    for index in about.get("index_columns", []):
        if not isinstance(index, dict):
            continue
        named = range(*(int(index[key]) for key in ("start", "stop", "step")))
        if index.get("kind") != "range" or len(named) != table.num_rows:
            raise ValueError(f"its rows are numbered {index}")
    return table.to_pandas()


def _is_text(kind: Any) -> bool:
    types = pyarrow.types
    tests = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    return any(test(kind) for test in tests)


def _text_bytes(column: pyarrow.ChunkedArray) -> int:
    """Bytes of all texts in a column, repetitions included."""
    total, kernels = 0, vars(compute)  # made at run time
    for chunk in column.chunks:
        if isinstance(chunk, pyarrow.DictionaryArray):
            lengths = kernels["binary_length"](chunk.dictionary)
            total += kernels["sum"](lengths.take(chunk.indices)).as_py() or 0
        else:
            total += chunk.nbytes
    return total
