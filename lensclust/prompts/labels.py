"""Canonical text of labels, used in every comparison of labels.

Task 0 is ``0``, ``"0"``, ``np.int64(0)`` and ``0.0`` (a column of integers becomes floats as soon
as a row is missing). True is ``"True"``, not 1. None, NaN, NA, NaT and the empty string
are a missing label, as in a CSV file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from lensclust.errors import InputError

MISSING = ""


def label_text(value: Any) -> str:
    """A label's text; missing ones give the empty string.

    >>> [label_text(value) for value in (0, "0", 0.0, np.int8(0), 0.5, True, None, float("nan"))]
    ['0', '0', '0', '0', '0.5', 'True', '', '']
    >>> label_text(np.timedelta64(1, "h")) == label_text(pd.Timedelta(hours=1))
    True
    """
    if isinstance(value, str):
        return str(value)
    if getattr(value, "ndim", None) == 0 and not isinstance(value, np.generic):
        return label_text(value.item())  # a tensor or array without axes
    single: Any = value
    if pd.api.types.is_scalar(value) and pd.isna(single):
        return MISSING
    if isinstance(value, np.datetime64):
        return str(pd.Timestamp(value))
    if isinstance(value, np.timedelta64):
        return str(pd.Timedelta(value))
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))
    return str(value)


def label_texts(values: Any) -> np.ndarray:
    """The texts of a column of labels, as an array of strings.

    >>> label_texts(np.array([1.0, np.nan, 2.5])).tolist()
    ['1', '', '2.5']
    """
    array = np.asarray(values)
    kind: Any = getattr(values, "dtype", array.dtype)
    if array.dtype.kind == "f" and pd.api.types.is_integer_dtype(kind):
        array = values.to_numpy(dtype=object)  # as floats, large whole numbers would be equal
    if array.dtype.kind in "iubU":
        return array.astype(str)
    if array.dtype.kind == "f":  # each distinct number is spelt once
        numbers, place = np.unique(array, return_inverse=True)
        return np.array([label_text(number) for number in numbers], dtype=str)[place]
    texts = [value if type(value) is str else label_text(value) for value in array]
    return np.array(texts, dtype=str)


def in_type_of(values: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Convert label texts to numbers if the column that they come from holds numbers.

    >>> in_type_of(np.array([3, 4]), np.array(["4", "3"]))
    array([4, 3])
    """
    kind = values.dtype.kind
    if kind not in "iufb":
        return texts
    try:
        numbers = texts == "True" if kind == "b" else texts.astype(values.dtype)
    except ValueError:
        return texts
    return numbers if (label_texts(numbers) == texts).all() else texts


def wanted_texts(name: str, wanted: Any) -> set[str]:
    """The label texts that a selection names: one value, or several in any collection.

    Raises:
        InputError: if they are nested or in a table.

    >>> sorted(wanted_texts("task", range(2))), sorted(wanted_texts("task", pd.Series(["a"])))
    (['0', '1'], ['a'])
    """
    if callable(wanted):
        raise InputError(
            f"{name}: a function given, expected one label or a list of them; "
            f"take(prompts.rows[{name!r}].map(function)) chooses by one"
        )
    single = isinstance(wanted, (str, bytes)) or not isinstance(wanted, Iterable)
    if single or getattr(wanted, "ndim", None) == 0:
        return {label_text(wanted)}
    if getattr(wanted, "ndim", 1) != 1:
        raise InputError(f"{name}: given a table of labels, expected one label or a list of them")
    values = list(wanted)
    nested = [value for value in values if isinstance(value, (list, tuple, set, dict, np.ndarray))]
    if nested:
        raise InputError(f"{name}: {nested[0]!r} is no label, expected one label or a list of them")
    return {label_text(value) for value in values}


def require_same_prompts(caller: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Refuse label columns of two sides that are of other prompts or in another order.

    Raises:
        InputError: names the first prompt that differs in a label that both sides have, or the
            numbers of prompts.

    >>> require_same_prompts("cka", {"task": ["a", "b"]}, {"task": ["b", "a"]})
    Traceback (most recent call last):
    ...
    lensclust.errors.InputError: cka: prompt 0 has task='a' on one side and 'b' on the other, ...
    """
    for name in (name for name in one if name in other):
        mine, theirs = label_texts(one[name]), label_texts(other[name])
        if len(mine) != len(theirs):
            raise InputError(
                f"{caller}: {len(mine)} prompts on one side and {len(theirs)} on the other, "
                "expected the same prompts"
            )
        differ = np.flatnonzero(mine != theirs)
        if differ.size:
            row = differ[0]
            raise InputError(
                f"{caller}: prompt {row} has {name}={str(mine[row])!r} on one side and "
                f"{str(theirs[row])!r} on the other, expected the same prompts in the same order"
            )
