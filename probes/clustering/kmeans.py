"""k-means of one matrix: scikit-learn's partition with faster seeding.

With a few hundred rows most of the time goes into checks around k-means++, so seeds are computed
here and passed to scikit-learn, which runs the iterations. Draws follow the same random stream, so
the partition equals scikit-learn's. This module does not import torch.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning


def partition(
    x: Float[np.ndarray, "row d"], k: int, *, n_init: int, seed: int
) -> Int[np.ndarray, " row"] | None:
    """k-means cluster of each row, or None where there are fewer distinct rows than clusters.

    >>> x = np.array([[0.0], [0.1], [5.0], [5.1]])
    >>> found = partition(x, 2, n_init=2, seed=0)
    >>> bool(found[0] == found[1]), bool(found[1] == found[2])
    (True, False)
    """
    if not distinct(x, k):
        return None
    with warnings.catch_warnings():
        # Rows that are equal in single precision still give fewer clusters.
        warnings.simplefilter("ignore", ConvergenceWarning)
        options: dict[str, Any] = {"init": plus_plus, "n_init": n_init, "random_state": seed}
        found = KMeans(k, **options).fit(x)
    return np.asarray(found.labels_)


def plus_plus(
    x: Float[np.ndarray, "row d"], k: int, random_state: np.random.RandomState
) -> Float[np.ndarray, "k d"]:
    """Greedy k-means++ seeds: the best of ``2 + log k`` rows drawn by squared distance.

    Source: Arthur & Vassilvitskii (2007), in the greedy variant of scikit-learn, whose random
    draws and precision are matched.
    """
    exact = x.astype(np.float64)
    norms = np.einsum("ij,ij->i", exact, exact)
    ones = np.ones((len(x), 1), x.dtype)

    def squared_distances(rows: Int[np.ndarray, " trial"]) -> np.ndarray:
        apart = norms[rows, None] + norms - 2 * (exact[rows] @ exact.T)
        return np.maximum(apart.astype(x.dtype), 0)

    chosen = np.empty(k, dtype=np.int64)
    chosen[0] = random_state.choice(len(x), p=np.full(len(x), 1 / len(x)))
    nearest = squared_distances(chosen[:1])[0]
    total = (nearest @ ones).item()
    trials = 2 + int(np.log(k))
    for index in range(1, k):
        drawn = np.searchsorted(nearest.cumsum(), random_state.uniform(size=trials) * total)
        drawn = np.minimum(drawn, len(x) - 1)
        candidates = np.minimum(squared_distances(drawn), nearest)
        totals = (candidates @ ones)[:, 0]
        best = int(totals.argmin())
        chosen[index], nearest, total = drawn[best], candidates[best], totals[best].item()
    return x[chosen]


def distinct(x: Float[np.ndarray, "row d"], k: int) -> bool:
    """Whether there are ``k`` distinct rows; usually decided by one column."""
    return len(np.unique(x[:, 0])) >= k or len(np.unique(x, axis=0)) >= k
