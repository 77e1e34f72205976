"""Whether two ways to one result agree, and what a model was found to do, remembered with it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from operator import ge, le
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

# Two exact ways to one result may differ by so many rounding errors, and by this share at most.
ROUNDING, SHARE = 500, 0.1

_Found = TypeVar("_Found")
_MEMO: WeakKeyDictionary[Any, dict[Hashable, Any]] = WeakKeyDictionary()

Size = tuple[int, ...]


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
    # Networks take norms and softmax in float32 even where their weights are float64.
    epsilon = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
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


@dataclass(eq=False)
class SizedCheck:
    """What a self-check found, for a property that may fail beyond some size only.

    Windows, chunks and frequencies that depend on the length go wrong in long sequences. So a
    check that passed holds for every size that is no larger, one that failed for every size that
    is no smaller, and sizes between the two are checked when they come.

    >>> check, tried = SizedCheck(), []
    >>> def why_not(size):
    ...     tried.append(size)
    ...     return "too long" if size[0] > 100 else None
    >>> [check.reason((n,), larger=(2 * n,), find=why_not) for n in (20, 40, 30, 80, 101, 300)]
    [None, None, None, None, 'too long', 'too long']
    >>> tried
    [(40,), (160,), (80,), (101,)]
    """

    passed: list[Size] = field(default_factory=list)
    failed: list[tuple[Size, str]] = field(default_factory=list)

    def reason(self, size: Size, *, larger: Size, find: Callable[[Size], str | None]) -> str | None:
        """Why the check fails at a size; None if it passes.

        Args:
            larger: what is checked first, so that sizes that grow little by little are not
                checked one by one.
            find: runs the check at a size.
        """
        for some in (larger, size):
            if (why_not := self._known_failure(size)) is not None:
                return why_not
            if any(all(map(ge, known, size)) for known in self.passed):
                return None
            if self._known_failure(some) is None:
                if (why_not := find(some)) is None:
                    self.passed.append(some)
                else:
                    self.failed.append((some, why_not))
        return self._known_failure(size)

    def _known_failure(self, size: Size) -> str | None:
        found = (why_not for known, why_not in self.failed if all(map(le, known, size)))
        return next(found, None)


def power_of_two(number: int) -> int:
    """The least power of two that is no smaller.

    >>> power_of_two(64), power_of_two(65)
    (64, 128)
    """
    return 1 << max(0, number - 1).bit_length()
