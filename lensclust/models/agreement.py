"""Comparison up to rounding, and results of self-checks cached per model."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from operator import ge, le
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lensclust.models.marks import sampled

# Two exact computations may differ by this many rounding errors, and by this share at most.
ROUNDING, SHARE = 500, 0.1
# The share by which a weight may grow or shrink before checks are repeated.
OTHER_SIZE = 0.25
# A weight below this, relative to the size of a typical matrix, counts as zero.
NOTHING = 1e-4

_Found = TypeVar("_Found")
_MEMO: WeakKeyDictionary[Any, _Memory] = WeakKeyDictionary()

Size = tuple[int, ...]


def agrees(found: Tensor, expected: Tensor, *, dtype: torch.dtype | None = None) -> bool:
    """Whether two tensors differ by rounding only, in every vector along the last axis.

    Args:
        dtype: the coarsest precision used in computing either; default the coarser of the two.

    >>> expected = torch.tensor([[1.0, 0.0], [100.0, 0.0]])
    >>> agrees(expected + 1e-6, expected), agrees(expected + 1e-2, expected)
    (True, False)
    """
    kinds = {found.dtype, expected.dtype} if dtype is None else {dtype}
    return relative_error(found, expected) <= max(map(rounding_tolerance, kinds))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest ``|found - expected| / |expected|`` over vectors along the last axis.

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
    """The relative difference that rounding explains between two exact computations.

    >>> round(rounding_tolerance(torch.float32), 6), rounding_tolerance(torch.bfloat16)
    (6e-05, 0.1)
    """
    # Networks take norms and softmax in float32 even where their weights are float64.
    epsilon = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    if torch.get_float32_matmul_precision() != "highest":
        epsilon = max(epsilon, 2**-10)
    return min(ROUNDING * epsilon, SHARE)


def remembered(
    model: Any, what: Hashable, find: Callable[[], _Found], *, lasting: bool = False
) -> _Found:
    """The result of ``find`` for a model, cached until its weights change in size.

    For self-checks of a model's code: whether prefixes can be shared, whether an edit takes
    effect. Some weights (zeros, at initialisation) make any check pass, so results are dropped
    when `forget_outdated` sees that weights have grown or shrunk. A check that raises is not
    cached.

    Args:
        model: the object that the result belongs to; dropped together with it.
        what: name of the check, with whatever else determines the result.
        lasting: keep the result whatever the weights are.

    >>> model = torch.nn.Linear(1, 1)
    >>> remembered(model, "name", lambda: "first"), remembered(model, "name", lambda: "second")
    ('first', 'first')
    """
    memory = _MEMO.get(model)
    if memory is None:
        memory = _MEMO[model] = _Memory(_sizes(model))
    known = memory.lasting if lasting else memory.found
    if what not in known:
        known[what] = find()
    return known[what]


def forget_outdated(model: Any) -> None:
    """Drop cached results if a weight was 0 or differed in size by a quarter when they were found.

    A check is valid for weights of similar size; with smaller ones, an error may have been lost
    in rounding. Vectors are also compared with the size of a typical matrix, since biases stay
    near 0 for long. Only a few values of each weight are read, so a call is cheap, and a training
    that is probed at every step repeats the checks at few of them.

    >>> model = torch.nn.Linear(1, 1, bias=False).requires_grad_(False)
    >>> remembered(model, "name", lambda: "first")
    'first'
    >>> _ = model.weight.mul_(-1.1)
    >>> forget_outdated(model), remembered(model, "name", lambda: "second")
    (None, 'first')
    >>> _ = model.weight.mul_(2)
    >>> forget_outdated(model), remembered(model, "name", lambda: "third")
    (None, 'third')
    """
    if (memory := _MEMO.get(model)) is None:
        return
    now, then = _sizes(model), memory.sizes
    if len(now) != len(then) or _differ(now, then, _are_matrices(model)):
        memory.sizes = now
        memory.found.clear()


def _differ(now: Tensor, then: Tensor, matrices: Tensor) -> bool:
    typical = then[matrices].median() if matrices.any() else then.new_zeros(())
    allowed = OTHER_SIZE * torch.where(matrices, then, then + typical)
    nothing = NOTHING * typical
    return bool(((now - then).abs() > torch.where(then > nothing, allowed, nothing)).any())


def _sizes(model: Any) -> Tensor:
    return sampled(model.parameters() if isinstance(model, nn.Module) else ()).norm(dim=1)


def _are_matrices(model: Any) -> Tensor:
    return torch.tensor([weight.ndim > 1 for weight in model.parameters()], dtype=torch.bool)


@dataclass(eq=False)
class _Memory:
    """Cached results for a model, and the sizes of its weights at the first of them."""

    sizes: Tensor
    found: dict[Hashable, Any] = field(default_factory=dict)
    lasting: dict[Hashable, Any] = field(default_factory=dict)


@dataclass(eq=False)
class SizedCheck:
    """Results of a self-check of a property that may fail only beyond some size.

    Windows, chunks and frequencies that depend on the length fail in long sequences. So a pass
    holds for every size that is no larger, a failure for every size that is no smaller, and sizes
    in between are checked when they occur.

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
            larger: a size that is checked first, so that slowly growing sizes are not checked
                one by one.
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
    """The least power of two that is at least ``number``.

    >>> power_of_two(64), power_of_two(65)
    (64, 128)
    """
    return 1 << max(0, number - 1).bit_length()
