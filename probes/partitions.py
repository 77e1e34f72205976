"""k-means partitions of one matrix and their agreement with a labelling, beside its null.

Agreement is computed from contingency tables, so that a whole null (the same partition against
permuted labels) is one vectorised call. Nothing here imports torch: worker processes start fast.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.special import xlogy
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics.cluster import expected_mutual_information
from threadpoolctl import threadpool_limits

Table = Int[np.ndarray, "labelling cluster label"]
Scores = Float[np.ndarray, " labelling"]

# A silhouette needs all pairs of rows; beyond this many an even subset is scored.
SILHOUETTE_ROWS = 1000


def adjusted_rand(table: Table) -> Scores:
    """Adjusted Rand index (Hubert & Arabie 1985)."""
    together, in_cluster, in_label, pairs = _pair_counts(table)
    expected = in_cluster * in_label / np.maximum(pairs, 1)
    return _ratio(together - expected, (in_cluster + in_label) / 2 - expected)


def pair_f1(table: Table) -> Scores:
    """F1 of "these two rows belong together" over all pairs of rows."""
    together, in_cluster, in_label, _ = _pair_counts(table)
    return _ratio(2 * together, in_cluster + in_label)


def matched_f1(table: Table) -> Scores:
    """Macro-F1 over labels, clusters matched one to one to labels by the Hungarian method."""
    n = table.astype(float)
    f1 = 2 * n / np.maximum(n.sum(2, keepdims=True) + n.sum(1, keepdims=True), 1)
    scores = np.empty(len(f1))
    for index, matrix in enumerate(f1):
        scores[index] = matrix[linear_sum_assignment(matrix, maximize=True)].sum()
    return scores / table.shape[2]


def adjusted_mutual_information(table: Table) -> Scores:
    """Adjusted mutual information, arithmetic normaliser (Vinh et al. 2010)."""
    n = table.astype(float)
    total = n[0].sum()
    # Permuting labels keeps both margins, so entropies and the expectation are shared.
    clusters, labels = n[0].sum(1), n[0].sum(0)
    entropy = [-xlogy(m / total, m / total).sum() for m in (clusters, labels)]
    outer = np.maximum(clusters[:, None] * labels[None], 1)
    information = (xlogy(n, n * total / outer) / total).sum((1, 2))
    expected = expected_mutual_information(
        table[0][clusters > 0][:, labels > 0].astype(np.int64), int(total)
    )
    return _ratio(information - expected, np.full(len(n), np.mean(entropy) - expected))


AGREEMENT: dict[str, Callable[[Table], Scores]] = {
    "ari": adjusted_rand,
    "ami": adjusted_mutual_information,
    "pair_f1": pair_f1,
    "matched_f1": matched_f1,
}
METRICS = (*AGREEMENT, "silhouette")

SCALES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda x: x,
    "unit": lambda x: x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12),
    "standard": lambda x: (x - x.mean(0)) / np.maximum(x.std(0), 1e-12),
}


@dataclass(frozen=True)
class Group:
    """Rows clustered together, and the labellings their partition is scored against.

    Attributes:
        name: what the rows share.
        rows: indices into the matrix.
        k: number of clusters.
        codes: labelling -> one row of label codes for the true labels, then the permuted ones.
    """

    name: str
    rows: Int[np.ndarray, " row"]
    k: int
    codes: Mapping[str, Int[np.ndarray, "labelling row"]]


def silhouette(
    distance: Float[np.ndarray, "row row"], codes: Int[np.ndarray, "labelling row"]
) -> Scores:
    """Mean silhouette of each labelling (Rousseeuw 1987), lone labels counting 0.

    Large when rows of one label are nearer to each other than to the nearest other label; it
    scores the labels themselves, not a partition found by k-means.
    """
    labels = int(codes.max()) + 1
    rows = np.arange(len(distance))
    scores = np.empty(len(codes))
    for part in _pieces(len(codes), len(rows) * labels):
        # One product gives every row's summed distance to every label of every labelling.
        belongs = codes[part].T[:, :, None] == np.arange(labels)
        size = belongs.sum(0)
        summed = distance @ belongs.reshape(len(rows), -1).astype(distance.dtype)
        summed = summed.reshape(belongs.shape)
        inside = summed[belongs].reshape(len(rows), -1)
        own_size = np.take_along_axis(size, codes[part], 1).T
        inside = inside / np.maximum(own_size - 1, 1)
        elsewhere = np.where(belongs | (size == 0), np.inf, summed / np.maximum(size, 1))
        nearest = elsewhere.min(2)
        counts = (own_size > 1) & np.isfinite(nearest)
        gain = np.where(counts, nearest, inside) - inside
        spread = np.maximum(inside, np.where(counts, nearest, 0))
        scores[part] = np.mean(gain / np.where(spread > 0, spread, 1), axis=0)
    return scores


def distances(x: Float[np.ndarray, "row d"]) -> Float[np.ndarray, "row row"]:
    """Euclidean distances between all pairs of rows."""
    return cdist(x, x).astype(np.float32)


def partition(
    x: Float[np.ndarray, "row d"], k: int, *, n_init: int, seed: int
) -> Int[np.ndarray, " row"] | None:
    """k-means cluster of each row, or None where there are fewer distinct rows than clusters."""
    if len(np.unique(x, axis=0)) < k:
        return None
    with warnings.catch_warnings():
        # Distinct rows that coincide in single precision still end in fewer clusters.
        warnings.simplefilter("ignore", ConvergenceWarning)
        options: dict[str, Any] = {"n_init": n_init, "random_state": seed}
        found = KMeans(k, **options).fit(x)
    return np.asarray(found.labels_)


def score_groups(
    x: Float[np.ndarray, "row d"],
    groups: Sequence[Group],
    *,
    scale: str,
    n_init: int,
    seed: int,
) -> tuple[dict[tuple[str, str], Float[np.ndarray, "group labelling"]], Int[np.ndarray, " row"]]:
    """Cluster each group of rows and score it against each labelling.

    Returns:
        ``(labelling, metric) -> scores (group, labelling)``, where column 0 belongs to the true
        labels and the others to permuted ones, and the cluster of every row (-1: in no group,
        or in one that could not be clustered, whose scores are 0).
    """
    collected: dict[tuple[str, str], list[np.ndarray]] = {}
    clusters = np.full(len(x), -1)
    # Matrices are small: a second thread costs more than it saves.
    with threadpool_limits(1):
        for group in groups:
            points = SCALES[scale](x[group.rows].astype(np.float32))
            found = partition(points, group.k, n_init=n_init, seed=seed)
            if found is not None:
                clusters[group.rows] = found
            for key, value in _score(points, found, group).items():
                collected.setdefault(key, []).append(value)
    return {key: np.stack(values) for key, values in collected.items()}, clusters


def contingency(
    clusters: Int[np.ndarray, " row"], codes: Int[np.ndarray, "labelling row"], k: int
) -> Table:
    """Rows counted by cluster and label, one table for each labelling.

    >>> contingency(np.array([0, 0, 1]), np.array([[1, 1, 0]]), 2).tolist()
    [[[0, 2], [1, 0]]]
    """
    labels = int(codes.max()) + 1
    cell = (np.arange(len(codes))[:, None] * k + clusters) * labels + codes
    counts = np.bincount(cell.ravel(), minlength=len(codes) * k * labels)
    return counts.reshape(len(codes), k, labels)


def _score(
    points: np.ndarray, found: np.ndarray | None, group: Group
) -> dict[tuple[str, str], np.ndarray]:
    """Every metric of every labelling of a group: one row of scores each."""
    n = len(next(iter(group.codes.values())))
    if found is None:
        return {(name, metric): np.zeros(n) for name in group.codes for metric in METRICS}
    subset = np.arange(len(points))
    if len(points) > SILHOUETTE_ROWS:
        subset = np.linspace(0, len(points) - 1, SILHOUETTE_ROWS).astype(int)
    apart = distances(points[subset])
    scores = {}
    for name, codes in group.codes.items():
        table = contingency(found, codes, group.k)
        scores |= {(name, metric): function(table) for metric, function in AGREEMENT.items()}
        scores[name, "silhouette"] = silhouette(apart, codes[:, subset])
    return scores


def _pieces(total: int, width: int) -> list[slice]:
    """Slices of a range so narrow that ``width`` numbers each stay within some 100 MB."""
    step = max(1, 10_000_000 // max(width, 1))
    return [slice(start, start + step) for start in range(0, total, step)]


def _pair_counts(table: Table) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Pairs of rows together in both, in the cluster, in the label, and overall."""
    n = table.astype(float)
    total = n[0].sum()
    return (
        _pairs(n).sum((1, 2)),
        _pairs(n.sum(2)).sum(1),
        _pairs(n.sum(1)).sum(1),
        float(_pairs(total)),
    )


def _pairs(n: np.ndarray | float) -> np.ndarray:
    return np.asarray(n * (np.asarray(n) - 1) / 2)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """0 where nothing could have been gained (a single cluster or label)."""
    safe = np.where(np.abs(denominator) > 1e-12, denominator, 1)
    return np.where(np.abs(denominator) > 1e-12, numerator / safe, 0.0)
