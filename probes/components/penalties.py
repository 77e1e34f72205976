"""Choosing a penalty by held-out labelled examples, the same way for every method.

Methods that learn from the same labels are compared fairly if their penalties are chosen alike:
on the same folds, by the cross-entropy of held-out examples, of equal ones the largest penalty.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from lensclust.errors import InputError
from probes.design import deal


def require_folds(call: str, folds: int, prompts: int) -> None:
    """Refuse fewer than two folds, and more than there are prompts."""
    if folds < 2:
        raise InputError(f"{call}: folds={folds}, expected at least 2")
    if folds > prompts:
        raise InputError(f"{call}: folds={folds}, expected at most {prompts}, one a prompt")


def example_folds(
    targets: Int[np.ndarray, " example"], folds: int, *, seed: int
) -> Int[np.ndarray, " example"]:
    """The fold of each example; those of one label are spread over folds evenly.

    >>> example_folds(np.array([0, 0, 1, 1]), 2, seed=0).reshape(2, 2).sum(1)
    array([1, 1])
    """
    return deal(targets, min(folds, len(targets)), np.random.default_rng(seed))


def penalty_frame(
    penalties: Sequence[float],
    losses: Float[np.ndarray, " penalty"],
    accuracy: Float[np.ndarray, " penalty"],
) -> pd.DataFrame:
    """A row a rising penalty: ``penalty, cross_entropy, accuracy, chosen``.

    >>> frame = penalty_frame((0.1, 1.0), np.array([0.5, 0.5]), np.array([0.9, 0.8]))
    >>> frame["chosen"].tolist()
    [False, True]
    """
    best = len(losses) - 1 - int(np.argmin(losses[::-1]))
    frame = pd.DataFrame({"penalty": penalties, "cross_entropy": losses, "accuracy": accuracy})
    return frame.assign(chosen=np.arange(len(losses)) == best)


def chosen_penalty(frame: pd.DataFrame) -> float:
    """The penalty that a frame chose."""
    return float(frame.loc[frame["chosen"], "penalty"].iloc[0])
