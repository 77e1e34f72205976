"""Which examples a prompt shows: divided from what is asked, drawn anew, dealt wrongly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

Value = TypeVar("Value")


def in_random_order(values: Iterable[Any], seed: int) -> list[Any]:
    """The distinct values in an order that depends on the values and the seed alone.

    >>> in_random_order("cab", 0) == in_random_order("bcaa", 0)
    True
    """
    ordered = sorted(set(values))
    order = np.random.default_rng([seed, 0]).permutation(len(ordered))
    return [ordered[index] for index in order.tolist()]


def drawn(
    pool: Sequence[Value], shots: int, *, seed: int, query: int, draw: int = 0
) -> list[Value]:
    """``shots`` of the pool without replacement, drawn anew for every query and draw.

    The places that are drawn depend on the number of the query, and not on what the pool holds.

    >>> drawn("abcd", 2, seed=0, query=5) == drawn("abcd", 2, seed=0, query=5)
    True
    """
    generator = np.random.default_rng([seed, 1, query, draw])
    return [pool[place] for place in generator.choice(len(pool), shots, replace=False).tolist()]


def dealt_wrongly(values: Sequence[str], *, seed: int, query: int, draw: int = 0) -> list[str]:
    """The same values in another order, in which as few places as possible keep their own.

    >>> dealt_wrongly(["a", "b"], seed=0, query=0)
    ['b', 'a']
    """
    generator = np.random.default_rng([seed, 2, query, draw])
    order: list[int] = generator.permutation(len(values)).tolist()
    groups: dict[str, list[int]] = {}
    for place in order:
        groups.setdefault(values[place], []).append(place)
    # With equal values side by side, a turn by the longest run takes each to another run; only
    # a value that holds more than half of the places has nowhere else to go.
    places = [place for group in groups.values() for place in group]
    turn = max(map(len, groups.values()))
    dealt = list(values)
    for index, place in enumerate(places):
        dealt[place] = values[places[(index + turn) % len(places)]]
    return dealt
