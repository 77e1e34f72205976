"""The error for invalid user input, escaping of text, and checks of counts."""

from numbers import Integral
from typing import Any


def shown(text: object) -> str:
    r"""A text on one line of a terminal, with unprintable characters escaped.

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
    """Refuse counts that are not whole numbers or too small; None stands for a default.

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
