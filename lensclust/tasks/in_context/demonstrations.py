"""Sampling and shuffling of demonstrations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

Value = TypeVar("Value")


def in_random_order(values: Iterable[Any], seed: int) -> list[Any]:
    """The distinct values in a random order that depends only on the values and the seed.

    >>> in_random_order("cab", 0) == in_random_order("bcaa", 0)
    True
    """
    ordered = sorted(set(values))
    order = np.random.default_rng([seed, 0]).permutation(len(ordered))
    return [ordered[index] for index in order.tolist()]


def drawn(
    pool: Sequence[Value], shots: int, *, seed: int, query: int, draw: int = 0
) -> list[Value]:
    """``shots`` items of the pool without replacement, a new sample for every query and draw.

    The sampled indices depend on the number of the query, not on the contents of the pool.

    >>> drawn("abcd", 2, seed=0, query=5) == drawn("abcd", 2, seed=0, query=5)
    True
    """
    generator = np.random.default_rng([seed, 1, query, draw])
    return [pool[place] for place in generator.choice(len(pool), shots, replace=False).tolist()]


def mismatched(values: Sequence[str], *, seed: int, query: int, draw: int = 0) -> list[str]:
    """Permute values such that as few positions as possible keep their value.

    >>> mismatched(["a", "b"], seed=0, query=0)
    ['b', 'a']
    """
    generator = np.random.default_rng([seed, 2, query, draw])
    order: list[int] = generator.permutation(len(values)).tolist()
    groups: dict[str, list[int]] = {}
    for place in order:
        groups.setdefault(values[place], []).append(place)
    # With equal values adjacent, a rotation by the longest run moves each to another run; only a
    # value in more than half of the positions keeps some of them.
    places = [place for group in groups.values() for place in group]
    turn = max(map(len, groups.values()))
    dealt = list(values)
    for index, place in enumerate(places):
        dealt[place] = values[places[(index + turn) % len(places)]]
    return dealt
