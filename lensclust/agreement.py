"""Whether two ways to one result agree, and what a model was found to do, remembered with it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

# Two exact ways to one result may differ by so many rounding errors, and by this share at most.
ROUNDING, SHARE = 500, 0.1

_Found = TypeVar("_Found")
_MEMO: WeakKeyDictionary[Any, dict[Hashable, Any]] = WeakKeyDictionary()


def agrees(found: Tensor, expected: Tensor, *, dtype: torch.dtype | None = None) -> bool:
    """Whether two tensors of one shape differ by rounding alone, in every vector of the last axis.

    Args:
        dtype: the coarsest precision on the way to either; default the coarser of the two.

    >>> expected = torch.tensor([[1.0, 0.0], [100.0, 0.0]])
    >>> agrees(expected + 1e-6, expected), agrees(expected + 1e-2, expected)
    (True, False)
    """
    kinds = {found.dtype, expected.dtype} if dtype is None else {dtype}
    return relative_error(found, expected) <= max(map(rounding_tolerance, kinds))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest ``|found - expected| / |expected|`` of a vector along the last axis.

    Infinite where the shapes differ or either holds a NaN.

    >>> relative_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 5.0]]))
    0.17...
    """
    if found.shape != expected.shape:
        return torch.inf
    kind = torch.promote_types(torch.promote_types(found.dtype, expected.dtype), torch.float32)
    found, expected = found.to(kind), expected.to(found.device, kind)
    if found.numel() == 0:
        return 0.0
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
    return float(error.nan_to_num(torch.inf).max())


def rounding_tolerance(dtype: torch.dtype) -> float:
    """The relative difference that rounding explains between two exact ways.

    >>> round(rounding_tolerance(torch.float32), 6), rounding_tolerance(torch.bfloat16)
    (6e-05, 0.1)
    """
    epsilon = torch.finfo(dtype).eps
    if torch.get_float32_matmul_precision() != "highest":
        epsilon = max(epsilon, 2**-10)
    return min(ROUNDING * epsilon, SHARE)


def remembered(model: Any, what: Hashable, find: Callable[[], _Found]) -> _Found:
    """What ``find`` returned for this model the first time; it is called once for each model.

    For self-checks whose verdict depends on a model's code, not on its weights: whether prefixes
    can be shared, whether an edit takes effect. A check that raises is not remembered.

    Args:
        model: the object that the verdict belongs to; forgotten together with it.
        what: name of the check, with whatever else decides the verdict.

    >>> model = torch.nn.Linear(1, 1)
    >>> remembered(model, "name", lambda: "first"), remembered(model, "name", lambda: "second")
    ('first', 'first')
    """
    known = _MEMO.setdefault(model, {})
    if what not in known:
        known[what] = find()
    return known[what]
