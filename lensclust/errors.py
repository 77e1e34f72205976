"""The one error a user's input can cause, how text is shown, and the bounds of counts."""

import functools
import inspect
import re
import sys
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

_Given = ParamSpec("_Given")
_Found = TypeVar("_Found")
_NUMBER: Any = Real
_LEAST = {"seed": 0, "shard": 1, "batch_tokens": 1}


def shown(text: object) -> str:
    r"""A text on one line of a terminal: what cannot be printed is escaped.

    >>> print(shown("a\x1b[31m\nb"))
    a\x1b[31m\nb
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


class InputError(ValueError):
    """Unusable input: says in one line what was given, what was expected and where.

    The command line prints it and exits with status 2; anything else that escapes is a bug
    or a failed run (status 1).
    """

    def __str__(self) -> str:
        return shown(super().__str__())


def check_counts(caller: str, *, least: int = 1, **counts: Any) -> None:
    """Refuse counts that are no whole numbers or too small; None stands for a default.

    Raises:
        InputError: names the count.

    >>> check_counts("train", steps=2.5)
    Traceback (most recent call last):
    ...
    lensclust.errors.InputError: train: steps=2.5, expected a whole number
    """
    for name, value in counts.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise InputError(f"{caller}: {name}={value!r}, expected a whole number")
        if int(value) < least:
            raise InputError(f"{caller}: {name}={value}, expected at least {least}")


def whole_numbers(function: Callable[_Given, _Found]) -> Callable[_Given, _Found]:
    """A function that refuses fractions, NaN and infinity where it says that it takes an ``int``.

    What every function bounds alike is bounded here: a ``seed`` is not negative and has 64 bits,
    a ``shard`` and a batch have something in them.

    >>> @whole_numbers
    ... def draw(*, draws: "int | None" = 1, share: "float | int" = 0.5, seed: "int" = 0):
    ...     return draws
    >>> draw(draws=3, share=0.1)
    3
    >>> draw(draws=2.5)
    Traceback (most recent call last):
    ...
    lensclust.errors.InputError: draw: draws=2.5, expected a whole number
    """
    signature = inspect.signature(function)
    kinds = {name: str(p.annotation) for name, p in signature.parameters.items()}
    whole = {
        name
        for name, kind in kinds.items()
        if re.search(r"\bint\b", kind) and not re.search(r"\b(float|bool)\b", kind)
    }
    names, caller = list(signature.parameters), function.__name__

    @functools.wraps(function)
    def checked(*given: _Given.args, **named: _Given.kwargs) -> _Found:
        arguments: dict[str, Any] = {**dict(zip(names, given, strict=False)), **named}
        for name, value in arguments.items():
            if name in whole and isinstance(value, _NUMBER):
                check_counts(caller, least=_LEAST.get(name, -(sys.maxsize**9)), **{name: value})
                if name == "seed" and value >= 2**63:
                    raise InputError(f"{caller}: seed={value}, expected less than 2**63")
        return function(*given, **named)

    return checked
