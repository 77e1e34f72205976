"""Row selection by number, mask or slice, as in pandas' ``iloc``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int

from lensclust.errors import InputError


def row_numbers(what: str, given: Any, n: int) -> Int[np.ndarray, " row"]:
    """The row numbers, from 0, that an index selects.

    Args:
        what: name of the indexed object, used in error messages.
        given: numbers (negative ones count from the end), one truth value for each row, or a
            slice; in a list, array, tensor, Series, range or any iterable.
        n: number of rows.

    Raises:
        InputError: if a number is not whole or out of range, or a mask does not have one value
            per row, or is a Series in another order.

    >>> [row_numbers("rows", given, 3).tolist() for given in ([True, False, True], [2, -3])]
    [[0, 2], [2, 0]]
    """
    if isinstance(given, slice):
        try:
            return np.arange(n)[given].copy()
        except TypeError:
            raise InputError(f"{what}: {given} is not a slice of whole numbers") from None
    if isinstance(given, pd.Series) and given.dtype.kind == "b" and _is_reordered(given.index, n):
        raise InputError(
            f"{what}: the mask's index numbers the rows in another order; expected the order of "
            "the rows (Series.to_numpy() ignores the index, Series.sort_index() sorts by it)"
        )
    if isinstance(given, (str, bytes)):
        raise InputError(f"{what}: given {given!r}, expected row numbers or a mask")
    if isinstance(given, Iterable) and not hasattr(given, "__array__"):
        given = list(given)
    try:
        index = np.atleast_1d(np.asarray(given))
    except (TypeError, ValueError, RuntimeError):
        index = np.empty(0, dtype=object)
        given = [given]
    if index.size == 0 and index.dtype.kind in "fiub" and index.ndim == 1:
        return np.empty(0, dtype=np.int64)
    if index.dtype.kind == "O":  # whole numbers or truth values with missing ones
        kinds = {type(value) for value in index.ravel().tolist()}
        if kinds == {int}:
            index = np.array([min(max(value, -n - 1), n) for value in index.tolist()])
        if kinds == {bool}:
            index = index.astype(bool)
    if index.ndim != 1 or index.dtype.kind not in "iub":
        first = index.ravel()[0] if index.size else given
        raise InputError(
            f"{what}: given {_kind(index)} such as {first!s}, expected whole row numbers or one "
            "truth value for each row"
        )
    if index.dtype.kind == "b":
        if len(index) != n:
            raise InputError(f"{what}: a mask of {len(index)} values for {n} rows")
        return np.flatnonzero(index)
    outside = (index >= n) | (index < -n if index.dtype.kind == "i" else False)
    if outside.any():
        raise InputError(f"{what}: no row {index[outside][0]}, there are {n} (0 to {n - 1})")
    index = index.astype(np.int64)
    return np.where(index < 0, index + n, index)


def _is_reordered(index: pd.Index, n: int) -> bool:
    """Whether an index numbers all rows from 0, but not in that order."""
    numbers = pd.RangeIndex(n)
    return not index.equals(numbers) and index.sort_values().equals(numbers)


def _kind(index: np.ndarray) -> str:
    if index.ndim > 1:
        return f"a table of shape {index.shape}"
    return {"f": "fractions", "U": "texts"}.get(index.dtype.kind, "values")
