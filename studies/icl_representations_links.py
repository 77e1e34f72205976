"""Does what changes in a model go along with what changes in its answers, prompt by prompt?

Prompts of one item (its wordings and conditions) are no independent evidence. So intervals
resample items, and the null permutes whole items. A partial rank correlation is the plain one
of what is left of both ranks when the covariates are taken out of them by least squares; under
the null, what is left of one of them is dealt to other items and the covariates are taken out
once more (Freedman & Lane 1983). Both p are two-sided and, over layers, of the largest.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import rankdata

from lensclust.stats import permutation_p

BOUNDS = (0.025, 0.975)
NEVER = 0.05


def link(
    change: Float[np.ndarray, "layer prompt"],
    behaviour: Float[np.ndarray, " prompt"],
    *,
    items: np.ndarray,
    covariates: pd.DataFrame,
    permutations: int,
    seed: int,
) -> pd.DataFrame:
    """Rank correlation of each layer's change with that of behaviour, covariates in and out.

    Args:
        change, behaviour: what changes, of every prompt; a layer with a missing value is NaN.
        items: every item has as many prompts, in the same order of wordings and conditions.
        covariates: numbers, and names (a column each).

    Returns:
        Two rows a layer (its index): ``metric`` (``link``), ``layer, controlled, value, low,
        high, p, p_corrected, vanished`` (there at 5 % with covariates left in, and not without).
    """
    order = np.argsort(items, kind="stable")
    blocks = order.reshape(len(np.unique(items)), -1)
    ranks = np.apply_along_axis(rankdata, 1, change, nan_policy="propagate")
    goal = rankdata(behaviour)
    constant = np.ones((len(goal), 1))
    dummies = pd.get_dummies(covariates, dtype=float).to_numpy()
    tables = []
    for controlled, design in ((False, constant), (True, np.hstack([constant, dummies]))):
        # An orthonormal basis: covariates may be constant or repeat each other.
        left, size, _ = np.linalg.svd(design, full_matrices=False)
        basis = left[:, size > size[0] * 1e-9]

        def rest(values: np.ndarray, basis: np.ndarray = basis) -> np.ndarray:
            return values - (values @ basis) @ basis.T

        x, y = rest(ranks), rest(goal)
        value = _correlation(x, y)
        rng = np.random.default_rng([seed, int(controlled)])
        dealt = np.empty((permutations, len(y)))
        for turn in range(permutations):
            dealt[turn, blocks.ravel()] = y[rng.permutation(blocks).ravel()]
        null = np.abs(np.stack([_correlation(x, each) for each in rest(dealt)], axis=1))
        drawn = rng.integers(len(blocks), size=(permutations, len(blocks)))
        resampled = np.stack(
            [_correlation(x[:, r], y[r]) for r in (blocks[d].ravel() for d in drawn)]
        )
        missing = np.isnan(value)
        low, high = np.full((2, len(value)), np.nan)
        low[~missing], high[~missing] = np.nanquantile(resampled[:, ~missing], BOUNDS, axis=0)
        largest = np.where(np.isnan(null), -np.inf, null).max(0)
        p = np.where(missing, np.nan, permutation_p(np.abs(value), null))
        corrected = permutation_p(np.abs(value), np.broadcast_to(largest, null.shape))
        tables.append(
            pd.DataFrame(
                {
                    "metric": "link",
                    "layer": np.arange(len(value)),
                    "controlled": controlled,
                    "value": value,
                    "low": low,
                    "high": high,
                    "p": p,
                    "p_corrected": np.where(missing, np.nan, corrected),
                }
            )
        )
    before, after = (table["p_corrected"].to_numpy() for table in tables)
    gone = (before <= NEVER) & ~(after <= NEVER)
    return pd.concat(
        [table.assign(vanished=gone.astype(float)) for table in tables], ignore_index=True
    )


def _correlation(
    x: Float[np.ndarray, "layer prompt"], y: Float[np.ndarray, " prompt"]
) -> Float[np.ndarray, " layer"]:
    """Pearson's, NaN where one of the two does not vary."""
    x, y = x - x.mean(1, keepdims=True), y - y.mean()
    length = np.linalg.norm(x, axis=1) * np.linalg.norm(y)
    # What is left of a column that the covariates explain is rounding.
    flat = length < 1e-9 * len(y) ** 2
    return np.where(flat, np.nan, x @ y / np.where(flat, 1, length))
