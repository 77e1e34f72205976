"""Random regular expressions, each with strings that match it and no other."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import rstr

from lensclust.errors import InputError

LETTERS = "abcdefghijklmnopqrstuvwxyz"

_ATTEMPTS = 200
# Strings per draw; an expression that yields fewer new ones than this is rejected.
_DRAWS = 96
_WORTHWHILE = 4


@dataclass(frozen=True)
class _Piece:
    """Part of an expression; ``size`` is an upper bound of the number of strings it matches."""

    pattern: str
    shortest: int
    longest: int
    size: int


@dataclass(frozen=True)
class Language:
    """A regular expression with strings that match it and no other expression."""

    pattern: str
    train: tuple[str, ...]
    test: tuple[str, ...]


def _literal(letters: str, rng: random.Random) -> _Piece:
    return _Piece(rng.choice(letters), 1, 1, 1)


def _class(letters: str, rng: random.Random) -> _Piece:
    members = rng.sample(letters, min(rng.randint(2, 4), len(letters)))
    return _Piece(f"[{''.join(sorted(members))}]", 1, 1, len(members))


def _optional(letters: str, rng: random.Random) -> _Piece:
    inner = rng.choice((_literal, _class))(letters, rng)
    return _Piece(f"{inner.pattern}?", 0, 1, 1 + inner.size)


def _repetition(letters: str, rng: random.Random) -> _Piece:
    inner = rng.choice((_literal, _class, _class))(letters, rng)
    least = rng.randint(1, 2)
    most = least + rng.randint(1, 2)
    size = sum(inner.size**n for n in range(least, most + 1))
    return _Piece(f"{inner.pattern}{{{least},{most}}}", least, most, size)


def _alternation(letters: str, rng: random.Random) -> _Piece:
    a, b = (
        _sequence([rng.choice((_literal, _class))(letters, rng) for _ in range(rng.randint(1, 3))])
        for _ in range(2)
    )
    return _Piece(
        f"(?:{a.pattern}|{b.pattern})",
        min(a.shortest, b.shortest),
        max(a.longest, b.longest),
        a.size + b.size,
    )


def _sequence(pieces: list[_Piece]) -> _Piece:
    return _Piece(
        "".join(piece.pattern for piece in pieces),
        sum(piece.shortest for piece in pieces),
        sum(piece.longest for piece in pieces),
        math.prod(piece.size for piece in pieces),
    )


_GRAMMAR: tuple[Callable[[str, random.Random], _Piece], ...] = (
    _literal,
    _class,
    _optional,
    _repetition,
    _alternation,
)


def _draw_expression(letters: str, longest: int, rng: random.Random) -> _Piece:
    pieces: list[_Piece] = []
    while sum(piece.longest for piece in pieces) < longest:
        pieces.append(rng.choice(_GRAMMAR)(letters, rng))
    return _sequence(pieces)


@lru_cache(maxsize=8)
def draw_languages(
    n_train: tuple[int, ...],
    *,
    n_test: int,
    letters: str,
    lengths: range,
    seed: str,
    caller: str = "sif",
) -> tuple[Language, ...]:
    """A language for each number of training strings; no string of one matches another.

    Takes about a second for 60 of them, so the last few results are cached.
    """
    rng = random.Random(seed)
    languages: list[Language] = []
    for n in n_train:
        candidates = (
            _draw_language(n, n_test, letters, lengths, languages, rng) for _ in range(_ATTEMPTS)
        )
        language = next((found for found in candidates if found is not None), None)
        if language is None:
            raise InputError(
                f"{caller}: only {len(languages)} of {len(n_train)} regular expressions found with "
                f"{n + n_test} strings of lengths {lengths[0]}..{lengths[-1]} over "
                f"{len(letters)} letters that match no other: expected fewer tasks, "
                f"expressions or strings, or longer strings or more letters"
            )
        languages.append(language)
    return tuple(languages)


def _draw_language(
    n_train: int,
    n_test: int,
    letters: str,
    lengths: range,
    others: list[Language],
    rng: random.Random,
) -> Language | None:
    """One random expression with its strings, or None if it is rejected."""
    expression = _draw_expression(letters, lengths[-1], rng)
    if expression.shortest > lengths[0] or expression.size < n_train + n_test:
        return None
    if _claims_strings_of(expression.pattern, others):
        return None
    train = {n: -(-(n_train - i) // len(lengths)) for i, n in enumerate(lengths)}
    test = {n: -(-(n_test - i) // len(lengths)) for i, n in enumerate(lengths)}
    pools = _sample_strings(
        expression.pattern,
        {n: train[n] + test[n] for n in lengths},
        [re.compile(other.pattern) for other in others],
        rng,
    )
    if pools is None:
        return None
    return Language(
        expression.pattern,
        train=_interleave([pools[n][: train[n]] for n in lengths]),
        test=_interleave([pools[n][train[n] :] for n in lengths]),
    )


def _claims_strings_of(pattern: str, others: list[Language]) -> bool:
    compiled = re.compile(pattern)
    return any(compiled.fullmatch(s) for other in others for s in (*other.train, *other.test))


def _sample_strings(
    pattern: str, wanted: dict[int, int], taken: list[re.Pattern[str]], rng: random.Random
) -> dict[int, list[str]] | None:
    """Distinct strings of a pattern, ``n`` of each length, none matched by an existing language."""
    # rstr draws from the language as `re` parses it. Its choice from a negated class depends on
    # set order, which differs between processes: the grammar has none. Strings are drawn many at
    # a time, because rstr parses the pattern again at every call.
    sampler = rstr.Rstr(rng)
    pools: dict[int, set[str]] = {n: set() for n in wanted}
    missing = sum(wanted.values())
    while missing:
        for string in sampler.xeger(f"(?:{pattern} ){{{_DRAWS},{_DRAWS}}}").split():
            pool = pools.get(len(string))
            if pool is None or len(pool) == wanted[len(string)] or string in pool:
                continue
            if not any(other.fullmatch(string) for other in taken):
                pool.add(string)
        before, missing = missing, sum(wanted.values()) - sum(map(len, pools.values()))
        if before - missing < min(_WORTHWHILE, before):
            return None
    # Likely strings come first: shuffled, so that training and test have one distribution.
    return {n: rng.sample(sorted(pool), len(pool)) for n, pool in pools.items()}


def _interleave(pools: list[list[str]]) -> tuple[str, ...]:
    """One string of each length in turn, so that any prefix is balanced over lengths."""
    longest = max(map(len, pools))
    return tuple(pool[i] for i in range(longest) for pool in pools if i < len(pool))
