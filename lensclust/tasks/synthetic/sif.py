"""Simplified instruction following: regular expressions as instructions, tables as tasks.

A task is a finite table input -> output. Its instruction is a string drawn from one of the task's
regular expressions, so the task is never named: a model has to recognise the language of the
string. Inputs are shared between tasks, so the input alone does not determine the answer. This is
our reconstruction of the task of Wu & Varshney, arXiv 2402.12151, which gives the idea but no
sizes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pandas as pd

from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.prompts import Prompts
from lensclust.tasks.synthetic.regular_languages import LETTERS, Language, draw_languages

BOS, SEP, PAD = "<bos>", "<sep>", "<pad>"
SPLITS = ("train", "new_string", "new_pair", "both", "new_regex")

_ATTEMPTS = 200

Table = dict[int, int]


@checked_arguments
def sif(
    *,
    n_tasks: int = 10,
    n_inputs: int = 10,
    mappings_per_task: int = 5,
    n_outputs: int | None = None,
    regexes_per_task: int = 3,
    held_out_regexes: int = 3,
    strings_per_regex: int = 128,
    held_out_inputs: int = 1,
    rows_per_mapping: int = 8,
    lengths: tuple[int, int] = (5, 8),
    fixed_length: bool = False,
    n_letters: int = 20,
    seed: int = 0,
) -> Prompts:
    """Prompts ``BOS instruction SEP input`` of the synthetic task, answered by one token.

    The instruction is a string of one of the task's regular expressions, one token per letter.
    No string matches any other expression of any task (``re.fullmatch``), and every
    expression contributes the same number of strings of each length, so neither the length
    of a prompt nor the position of its last token distinguishes the tasks.

    Splits, in ``rows["split"]``: ``train``; ``new_string`` (a new string of a trained
    expression, with an input that expression was trained with); ``new_pair`` (a training
    string with an input that its task has only with another expression); ``both``;
    ``new_regex`` (the negative control: an expression of no training row, answered by its
    task's table, where only chance, ``1 / rows.groupby("input").output.nunique()``, is
    expected). Inputs that are in no training row of a task cannot be answered and are not used.

    Args:
        n_tasks: tasks, named 0, 1, ...
        n_inputs: input tokens, shared by the tasks.
        mappings_per_task: inputs in the table of each task.
        n_outputs: output tokens; default as many as inputs. Tasks have different outputs for one
            input as long as there are enough.
        regexes_per_task: trained expressions of a task; row label ``template`` is "3.1" for
            expression 1 of task 3.
        held_out_regexes: further expressions of a task, numbered after the trained ones.
        strings_per_regex: training strings of a trained expression.
        held_out_inputs: inputs of the table that are held out from each trained expression.
        rows_per_mapping: rows of each task and input of its table, in each split except
            ``train`` (fewer if strings run out; none if nothing is held out).
        lengths: shortest and longest instruction, in letters.
        fixed_length: all instructions are as long as the longest: prompts that share an input
            then have identical embeddings at the last token.
        n_letters: letters the expressions are made of, at most 26.
        seed: the only source of randomness.

    Returns:
        Prompts with rows ``task, instruction, template, pattern, input, output, split``, spans
        ``instruction`` and ``input``, and texts. `vocabulary` names the token ids.

    Raises:
        InputError: if the sizes contradict each other, or no suitable expressions can be found.

    Source: Wu & Varshney, arXiv 2402.12151; sizes, grammar and splits are our reconstruction.

    >>> import re
    >>> prompts = sif(n_tasks=3, n_inputs=4, mappings_per_task=3, seed=1)
    >>> prompts
    Prompts(2592 prompts, 3 tasks, up to 11 tokens)
    >>> row = prompts.rows.iloc[0]
    >>> bool(re.fullmatch(row.pattern, row.instruction))
    True
    >>> prompts.text(0) == f"{BOS}{row.instruction}{SEP}{row.input}"
    True
    """
    n_outputs = n_inputs if n_outputs is None else n_outputs
    shortest, longest = (lengths[1], lengths[1]) if fixed_length else lengths
    check_sizes(
        "sif",
        at_least={
            "n_tasks": (n_tasks, 1),
            "n_inputs": (n_inputs, 1),
            "mappings_per_task": (mappings_per_task, 1),
            "n_outputs": (n_outputs, 1),
            "regexes_per_task": (regexes_per_task, 1),
            "strings_per_regex": (strings_per_regex, 1),
            "rows_per_mapping": (rows_per_mapping, 1),
            "lengths[0]": (shortest, 1),
            "n_letters": (n_letters, 1),
            "held_out_regexes": (held_out_regexes, 0),
            "held_out_inputs": (held_out_inputs, 0),
        },
        at_most={
            "mappings_per_task": (mappings_per_task, "n_inputs", n_inputs),
            "lengths[0]": (shortest, "lengths[1]", longest),
            "n_letters": (n_letters, "letters of the alphabet", len(LETTERS)),
            # Beyond this some input of a table would be in no training row.
            "held_out_inputs * regexes_per_task": (
                held_out_inputs * regexes_per_task,
                "(regexes_per_task - 1) * mappings_per_task",
                (regexes_per_task - 1) * mappings_per_task,
            ),
        },
    )
    # Separate streams, so that options of the strings do not change the tables.
    tables = _draw_tables(
        n_tasks, n_inputs, mappings_per_task, n_outputs, random.Random(f"sif-tables-{seed}")
    )
    languages = draw_languages(
        # Held-out expressions come last and have no training strings.
        (*[strings_per_regex] * (n_tasks * regexes_per_task), *[0] * (n_tasks * held_out_regexes)),
        n_test=rows_per_mapping,
        letters=LETTERS[:n_letters],
        lengths=range(shortest, longest + 1),
        seed=f"sif-strings-{seed}",
    )
    pairing = random.Random(f"sif-pairs-{seed}")
    rows = pd.DataFrame(
        [
            row
            for task, table in enumerate(tables)
            for row in _task_rows(
                task,
                table,
                languages[task::n_tasks],
                regexes_per_task,
                held_out_inputs,
                rows_per_mapping,
                pairing,
            )
        ]
    )
    order = rows["split"].map(SPLITS.index).argsort(kind="stable")
    return _to_prompts(rows.iloc[order].reset_index(drop=True), n_inputs, n_outputs, n_letters)


def vocabulary(
    *, n_inputs: int = 10, n_outputs: int | None = None, n_letters: int = 20
) -> tuple[str, ...]:
    """Symbol of every token id that `sif` uses with these sizes; padding is 0.

    The separator, which is in every prompt, is last: the largest id of the prompts plus one is
    the size of the vocabulary.

    >>> vocabulary(n_inputs=2, n_letters=3)
    ('<pad>', 'y0', 'y1', 'x0', 'x1', 'a', 'b', 'c', '<bos>', '<sep>')
    """
    outputs = [f"y{i}" for i in range(n_inputs if n_outputs is None else n_outputs)]
    inputs = [f"x{i}" for i in range(n_inputs)]
    return (PAD, *outputs, *inputs, *LETTERS[:n_letters], BOS, SEP)


# -- tables -------------------------------------------------------------------------------


def _draw_tables(
    n_tasks: int, n_inputs: int, mappings: int, n_outputs: int, rng: random.Random
) -> list[Table]:
    """One table per task; any two disagree on more than half of their shared inputs."""
    for _ in range(_ATTEMPTS):
        tables = _propose_tables(n_tasks, n_inputs, mappings, n_outputs, rng)
        if all(_disagree(a, b) for i, a in enumerate(tables) for b in tables[:i]):
            return tables
    raise InputError(
        f"sif: {n_tasks} tables of {mappings} inputs that disagree on most shared inputs were "
        f"not found with n_outputs={n_outputs}: expected more outputs or fewer tasks"
    )


def _propose_tables(
    n_tasks: int, n_inputs: int, mappings: int, n_outputs: int, rng: random.Random
) -> list[Table]:
    uses = [0] * n_inputs
    known: list[list[int]] = []
    for _ in range(n_tasks):
        # The least used inputs first, so that each input is in equally many tables.
        ranked = sorted(range(n_inputs), key=lambda i: (uses[i], rng.random()))
        known.append(ranked[:mappings])
        for i in ranked[:mappings]:
            uses[i] += 1
    tables: list[Table] = [{} for _ in range(n_tasks)]
    for i in range(n_inputs):
        outputs = rng.sample(range(n_outputs), n_outputs)
        knowing = [task for task in range(n_tasks) if i in known[task]]
        for rank, task in enumerate(rng.sample(knowing, len(knowing))):
            tables[task][i] = outputs[rank % n_outputs]
    return tables


def _disagree(a: Table, b: Table) -> bool:
    shared = a.keys() & b.keys()
    return not shared or 2 * sum(a[i] != b[i] for i in shared) > len(shared)


# -- rows ---------------------------------------------------------------------------------


def _task_rows(
    task: int,
    table: Table,
    languages: Sequence[Language],
    n_trained: int,
    held_out_inputs: int,
    rows_per_mapping: int,
    rng: random.Random,
) -> Iterator[dict[str, str | int]]:
    inputs = rng.sample(sorted(table), len(table))
    # Expression r holds out the next inputs in cyclic order: evenly, and each is shown somewhere.
    hidden = [
        {inputs[(r * held_out_inputs + i) % len(inputs)] for i in range(held_out_inputs)}
        for r in range(n_trained)
    ]

    def row(split: str, regex: int, string: str, x: int) -> dict[str, str | int]:
        return {
            "task": task,
            "instruction": string,
            "template": f"{task}.{regex}",
            "pattern": languages[regex].pattern,
            "input": f"x{x}",
            "output": f"y{table[x]}",
            "split": split,
        }

    for regex in range(n_trained):
        for string in languages[regex].train:
            yield from (row("train", regex, string, x) for x in table if x not in hidden[regex])
    for x in sorted(table):
        seen = [r for r in range(n_trained) if x not in hidden[r]]
        unseen = [r for r in range(n_trained) if x in hidden[r]]
        asked = {
            "new_string": [(r, string) for r in seen for string in languages[r].test],
            "new_pair": [(r, string) for r in unseen for string in languages[r].train],
            "both": [(r, string) for r in unseen for string in languages[r].test],
            "new_regex": [
                (r, string)
                for r in range(n_trained, len(languages))
                for string in languages[r].test
            ],
        }
        for split, questions in asked.items():
            for regex, string in rng.sample(questions, min(rows_per_mapping, len(questions))):
                yield row(split, regex, string, x)


def _to_prompts(rows: pd.DataFrame, n_inputs: int, n_outputs: int, n_letters: int) -> Prompts:
    symbols = vocabulary(n_inputs=n_inputs, n_outputs=n_outputs, n_letters=n_letters)
    ids = {symbol: i for i, symbol in enumerate(symbols)}
    asked = list(zip(rows["instruction"], rows["input"], strict=True))
    tokens = [
        [ids[BOS], *(ids[letter] for letter in string), ids[SEP], ids[x]] for string, x in asked
    ]
    return Prompts.from_token_lists(
        tokens,
        rows,
        answers=[[ids[y]] for y in rows["output"]],
        spans={
            "instruction": [(1, len(row) - 2) for row in tokens],
            "input": [(len(row) - 1, len(row)) for row in tokens],
        },
        texts=[f"{BOS}{string}{SEP}{x}" for string, x in asked],
        pad_id=ids[PAD],
    )


def check_sizes(
    caller: str, *, at_least: dict[str, tuple[int, int]], at_most: dict[str, tuple[int, str, int]]
) -> None:
    """Refuse a size out of bounds: name -> (size, bound), and (size, name of the bound, bound).

    Raises:
        InputError: names the size and its bound.
    """
    for name, (value, bound) in at_least.items():
        if value < bound:
            raise InputError(f"{caller}: {name}={value}, expected at least {bound}")
    for name, (value, limit_name, limit) in at_most.items():
        if value > limit:
            raise InputError(f"{caller}: {name}={value}, expected at most {limit_name}={limit}")
