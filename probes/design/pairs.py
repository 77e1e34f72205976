"""Targets, target answers and donor prompts of interchange interventions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from lensclust.errors import InputError
from lensclust.prompts import MISSING, Prompts, label_texts


def first_answers(prompts: Prompts) -> Int[np.ndarray, " prompt"]:
    """First token of each prompt's own answer.

    Raises:
        InputError: if the prompts have no answers, or one is empty.
    """
    if prompts.answers is None or not all(prompts.answers):
        raise InputError("interchange: expected prompts with an answer each, given some without")
    return np.array([answer[0] for answer in prompts.answers])


def prompt_strings(prompts: Prompts, name: str) -> np.ndarray:
    """A label of the prompts' rows as strings.

    Raises:
        InputError: if there is no such label.
    """
    if name not in prompts.rows:
        raise InputError(f"interchange: no label {name!r}: rows have {list(prompts.rows)}")
    found = label_texts(prompts.rows[name].array).astype(object)
    missing = np.flatnonzero(found == MISSING)
    if missing.size:
        raise InputError(
            f"interchange: label {name!r} of {missing.size} prompts is missing, the first is "
            f"prompt {missing[0]}; leave them out: prompts.take(prompts.rows[{name!r}].notna())"
        )
    return found


def answer_table(
    prompts: Prompts, donors: Prompts | None, by: str, given: str
) -> dict[tuple[str, str], int]:
    """First token of each label's answer within each condition, from the prompts."""
    table: dict[tuple[str, str], int] = {}
    for part in (prompts, donors):
        if part is not None:
            labels = zip(prompt_strings(part, by), prompt_strings(part, given), strict=True)
            table |= dict(zip(labels, first_answers(part).tolist(), strict=True))
    return table


def draw_targets(
    label: np.ndarray,
    condition: np.ndarray,
    own: np.ndarray,
    known: Mapping[tuple[str, str], int],
    rounds: int | None,
    seed: int,
) -> np.ndarray:
    """Target label of each prompt ``(round, prompt)``, empty where none is left."""
    if rounds is not None and rounds < 1:
        raise InputError(f"interchange: rounds={rounds}, expected at least 1, or None for all")
    rng = np.random.default_rng(seed)
    labels = sorted({name for name, _ in known})
    possible = [
        [b for b in labels if b != a and known.get((b, x), token) != token]
        for a, x, token in zip(label, condition, own, strict=True)
    ]
    most = max(map(len, possible))
    if most == 0:
        raise InputError("interchange: no prompt has another label that answers it differently")
    targets = np.full((most if rounds is None else min(rounds, most), len(label)), "", dtype=object)
    for row, names in enumerate(possible):
        drawn = rng.permutation(names)[: len(targets)]
        targets[: len(drawn), row] = drawn
    return targets


def draw_members(
    targets: np.ndarray, condition: np.ndarray, donors: Prompts, by: str, given: str, seed: int
) -> Int[np.ndarray, "round prompt"]:
    """A random donor of each prompt's target, of the prompt's condition if possible."""
    rng = np.random.default_rng([seed, 1])
    labels, conditions = prompt_strings(donors, by), prompt_strings(donors, given)
    found = np.zeros(targets.shape, dtype=np.int64)
    for place in zip(*np.nonzero(targets != ""), strict=True):
        of_target = labels == targets[place]
        both = of_target & (conditions == condition[place[1]])
        candidates = np.flatnonzero(both if both.any() else of_target)
        if len(candidates) == 0:
            raise InputError(f"interchange: no donor has {by} {targets[place]!r}")
        found[place] = rng.choice(candidates)
    return found
