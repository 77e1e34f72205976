"""Choose a penalty on held-out labelled examples, alike for every method.

For a fair comparison of methods that learn from the same labels, penalties are chosen alike: on the
same folds, by the cross-entropy of held-out examples; ties go to the largest penalty.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from lensclust.errors import InputError
from probes.design import deal


def require_folds(call: str, folds: int, prompts: int) -> None:
    """Raise InputError for fewer than two folds or more folds than prompts."""
    if folds < 2:
        raise InputError(f"{call}: folds={folds}, expected at least 2")
    if folds > prompts:
        raise InputError(f"{call}: folds={folds}, expected at most {prompts}, one per prompt")


def example_folds(
    targets: Int[np.ndarray, " example"], folds: int, *, seed: int
) -> Int[np.ndarray, " example"]:
    """Fold of each example; examples of a label are spread evenly over folds.

    >>> example_folds(np.array([0, 0, 1, 1]), 2, seed=0).reshape(2, 2).sum(1)
    array([1, 1])
    """
    return deal(targets, min(folds, len(targets)), np.random.default_rng(seed))


def penalty_frame(
    penalties: Sequence[float],
    losses: Float[np.ndarray, " penalty"],
    accuracy: Float[np.ndarray, " penalty"],
) -> pd.DataFrame:
    """One row per penalty, increasing: ``penalty, cross_entropy, accuracy, chosen``.

    >>> frame = penalty_frame((0.1, 1.0), np.array([0.5, 0.5]), np.array([0.9, 0.8]))
    >>> frame["chosen"].tolist()
    [False, True]
    """
    best = len(losses) - 1 - int(np.argmin(losses[::-1]))
    frame = pd.DataFrame({"penalty": penalties, "cross_entropy": losses, "accuracy": accuracy})
    return frame.assign(chosen=np.arange(len(losses)) == best)


def chosen_penalty(frame: pd.DataFrame) -> float:
    """The chosen penalty of a frame."""
    return float(frame.loc[frame["chosen"], "penalty"].iloc[0])
