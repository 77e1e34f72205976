"""Attacks on the project's doors, each a module that is run and a function that a test calls."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed as seeded, settings, strategies as st


def give_many(
    drawn: st.SearchStrategy[Any], one: Callable[[Any], None], *, tries: int, seed: int
) -> None:
    """Give so many drawn values to a function, the same for the same seed."""

    @seeded(seed)
    @settings(
        max_examples=tries,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list[Any](HealthCheck),
    )
    @given(drawn)
    def give(value: Any) -> None:
        one(value)

    give()


def tries_and_seed(
    description: str | None, *, tries: int = 500, kinds: Sequence[str] = ()
) -> dict[str, Any]:
    """The options of an attack's own command; ``kinds`` are those that ``--kind`` chooses from."""
    parser = argparse.ArgumentParser(description=description)
    if kinds:
        parser.add_argument("--kind", choices=kinds)
    parser.add_argument("--tries", type=int, default=tries)
    parser.add_argument("--seed", type=int, default=0)
    return vars(parser.parse_args())
