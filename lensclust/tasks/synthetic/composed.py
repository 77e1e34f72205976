"""Tasks of known composition: permutations and maps of short sequences.

A *move* permutes the symbols of the input; a *map* replaces each symbol by another; a composite
task is a move followed by a map. As in `sif`, the instruction of a task is a string of one of its
regular expressions, so a composite task has separate instructions, which are unrelated to its
parts. No two moves and no two maps agree on half of their values.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from operator import eq
from typing import Any

import pandas as pd

from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.prompts import Prompts
from lensclust.tasks.synthetic.regular_languages import LETTERS, Language, draw_languages
from lensclust.tasks.synthetic.sif import BOS, PAD, SEP, check_sizes

_ATTEMPTS = 200
# One input in this many is in no training prompt.
_HELD_OUT = 4

Function = tuple[int, ...]


@checked_arguments
def composed(
    *,
    n_moves: int = 3,
    n_maps: int = 3,
    pairs: Sequence[tuple[int, int]] = ((0, 0), (1, 1)),
    width: int = 4,
    n_symbols: int = 10,
    regexes_per_task: int = 2,
    strings_per_regex: int = 64,
    test_strings: int = 8,
    inputs_per_string: int = 4,
    lengths: tuple[int, int] = (5, 8),
    n_letters: int = 20,
    seed: int = 0,
) -> Prompts:
    """Prompts ``BOS instruction SEP symbols``, answered by the same number of symbols.

    Task ``move 2`` permutes the input's symbols, ``map 1`` replaces each by another, and
    ``map 1 after move 2`` is their composition: ``output[i] = map[input[move[i]]]``. All tasks
    share their inputs, whose symbols are distinct. Splits, in ``rows["split"]``: ``train``, and
    ``test``: strings and inputs that are in no training prompt of any task.

    Args:
        n_moves: number of permutations, named 0, 1, ...
        n_maps: number of maps of symbols, named 0, 1, ...
        pairs: composite tasks: the move and the map of each.
        width: number of symbols of an input.
        n_symbols: number of different symbols.
        regexes_per_task: expressions of each task; row label ``template`` is "map 1/0" for the
            first of ``map 1``.
        strings_per_regex: training strings of an expression.
        test_strings: further strings of an expression.
        inputs_per_string: prompts of each string, each with another input.
        lengths: shortest and longest instruction, in letters.
        n_letters: letters the expressions are made of, at most 26.
        seed: the only source of randomness.

    Returns:
        Prompts with rows ``task, kind`` (``move``, ``map`` or ``composite``), ``move, map``
        (names of the parts, "" where there is none), ``instruction, template, pattern, input,
        output, split``, spans ``instruction`` and ``input``, and texts.

    Raises:
        InputError: if the sizes contradict each other, a pair names no move or map, or no
            suitable functions or expressions can be found.

    >>> prompts = composed(seed=1)
    >>> prompts
    Prompts(4608 prompts, 8 tasks, up to 14 tokens)
    >>> one = prompts.where(task="map 0 after move 0", split="test")
    >>> print(one.text(0), one.rows["output"][0])
    <bos>hftso<sep>s3 s8 s5 s7 s2 s3 s0 s9
    """
    check_sizes(
        "composed",
        at_least={
            "n_moves": (n_moves, 0),
            "n_maps": (n_maps, 0),
            "width": (width, 2),
            "regexes_per_task": (regexes_per_task, 1),
            "strings_per_regex": (strings_per_regex, 1),
            "test_strings": (test_strings, 1),
            "inputs_per_string": (inputs_per_string, 1),
            "lengths[0]": (lengths[0], 1),
            "n_letters": (n_letters, 1),
            "n_moves + n_maps": (n_moves + n_maps, 1),
        },
        at_most={
            "width": (width, "n_symbols", n_symbols),
            "lengths[0]": (lengths[0], "lengths[1]", lengths[1]),
            "n_letters": (n_letters, "letters of the alphabet", len(LETTERS)),
        },
    )
    odd = [pair for pair in pairs if not (0 <= pair[0] < n_moves and 0 <= pair[1] < n_maps)]
    if odd:
        raise InputError(
            f"composed: pair {tuple(odd[0])}, expected a move below n_moves={n_moves} and a map "
            f"below n_maps={n_maps}"
        )
    # Separate streams, so that options of the strings do not change the functions.
    moves = _draw_functions("moves", n_moves, width, random.Random(f"composed-moves-{seed}"))
    maps = _draw_functions("maps", n_maps, n_symbols, random.Random(f"composed-maps-{seed}"))
    same, identity = tuple(range(width)), tuple(range(n_symbols))
    tasks = [
        *((f"move {i}", "move", f"move {i}", "", move, identity) for i, move in enumerate(moves)),
        *((f"map {i}", "map", "", f"map {i}", same, table) for i, table in enumerate(maps)),
        *(
            (f"map {b} after move {a}", "composite", f"move {a}", f"map {b}", moves[a], maps[b])
            for a, b in dict.fromkeys((int(a), int(b)) for a, b in pairs)
        ),
    ]
    languages = draw_languages(
        (strings_per_regex,) * (len(tasks) * regexes_per_task),
        n_test=test_strings,
        letters=LETTERS[:n_letters],
        lengths=range(lengths[0], lengths[1] + 1),
        seed=f"composed-strings-{seed}",
        caller="composed",
    )
    pairing = random.Random(f"composed-pairs-{seed}")
    rows: list[dict[str, str]] = []
    for place, (task, kind, move_name, map_name, move, table) in enumerate(tasks):
        labels = {"task": task, "kind": kind, "move": move_name, "map": map_name}
        own = languages[place * regexes_per_task : (place + 1) * regexes_per_task]
        for pair in _pairs(task, own, width, n_symbols, inputs_per_string, pairing):
            given = pair.pop("given")
            output = [table[given[i]] for i in move]
            rows.append({**labels, **pair, "input": _spelled(given), "output": _spelled(output)})
    frame = pd.DataFrame(rows)
    order = (frame["split"] == "test").argsort(kind="stable")
    return _to_prompts(frame.iloc[order].reset_index(drop=True), n_symbols, n_letters)


def _pairs(
    task: str,
    languages: Sequence[Language],
    width: int,
    n_symbols: int,
    per_string: int,
    rng: random.Random,
) -> Iterator[dict[str, Any]]:
    """Instruction and input of every prompt of a task."""
    for regex, language in enumerate(languages):
        for split, strings in (("train", language.train), ("test", language.test)):
            for string in strings:
                taken: set[Function] = set()
                tried = 0
                while len(taken) < per_string:
                    tried += 1
                    if tried > 1000 + 100 * len(taken):
                        raise InputError(
                            f"composed: inputs_per_string={per_string}, but of width={width} and "
                            f"n_symbols={n_symbols} there are about {len(taken)} for {split}"
                        )
                    given = tuple(rng.sample(range(n_symbols), width))
                    if given in taken or _is_held_out(given) != (split == "test"):
                        continue
                    taken.add(given)
                    yield {
                        "instruction": string,
                        "template": f"{task}/{regex}",
                        "pattern": language.pattern,
                        "split": split,
                        "given": given,
                    }


def _is_held_out(given: Function) -> bool:
    """Whether an input is in the test split: a fixed share, whatever the seed and the task."""
    return zlib.crc32(bytes(given)) % _HELD_OUT == 0


def _draw_functions(what: str, n: int, size: int, rng: random.Random) -> list[Function]:
    """Permutations; any two of them, and each and the identity, agree on less than half."""
    for _ in range(_ATTEMPTS):
        found: list[Function] = []
        for _ in range(_ATTEMPTS):
            if len(found) == n:
                return found
            proposed = tuple(rng.sample(range(size), size))
            if all(
                2 * sum(map(eq, proposed, other)) < size for other in (tuple(range(size)), *found)
            ):
                found.append(proposed)
    raise InputError(
        f"composed: {n} {what} of {size} symbols that agree on less than half were not found: "
        f"expected fewer, or more symbols"
    )


def _spelled(symbols: Sequence[int]) -> str:
    return " ".join(f"s{i}" for i in symbols)


def _to_prompts(rows: pd.DataFrame, n_symbols: int, n_letters: int) -> Prompts:
    # As in `sif`, the separator is the last id and gives the size of the vocabulary.
    names = (PAD, *(f"s{i}" for i in range(n_symbols)), *LETTERS[:n_letters], BOS, SEP)
    ids = {name: i for i, name in enumerate(names)}
    pairs = list(zip(rows["instruction"], rows["input"], strict=True))
    tokens = [
        [ids[BOS], *(ids[c] for c in string), ids[SEP], *(ids[s] for s in given.split())]
        for string, given in pairs
    ]
    return Prompts.from_token_lists(
        tokens,
        rows,
        answers=[[ids[s] for s in output.split()] for output in rows["output"]],
        spans={
            "instruction": [(1, 1 + len(string)) for string, _ in pairs],
            "input": [
                (2 + len(string), len(row)) for (string, _), row in zip(pairs, tokens, strict=True)
            ],
        },
        texts=[f"{BOS}{string}{SEP}{given}" for string, given in pairs],
        pad_id=ids[PAD],
    )
