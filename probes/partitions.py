"""Agreement of the partitions of one matrix with a labelling, beside its null.

Agreement is computed from contingency tables, so that a whole null (the same partition against
permuted labels) is one vectorised call. Nothing here imports torch: worker processes start fast.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from scipy.special import xlogy
from sklearn.metrics.cluster import expected_mutual_information
from threadpoolctl import ThreadpoolController

from probes.groups import Group
from probes.kmeans import partition

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


def silhouette(
    distance: Float[np.ndarray, "row row"], codes: Int[np.ndarray, "labelling row"]
) -> Scores:
    """Mean silhouette of each labelling (Rousseeuw 1987), lone labels counting 0.

    Large when rows of one label are nearer to each other than to the nearest other label; it
    scores the labels themselves, not a partition found by k-means.
    """
    labels = int(codes.max()) + 1
    scores = np.empty(len(codes))
    for part in _pieces(len(codes), len(distance) * labels):
        # (label, row, labelling): one product a label, and the smallest over labels is a fold
        # of whole planes.
        belongs = np.arange(labels)[:, None, None] == codes[part].T
        size = belongs.sum(1, dtype=distance.dtype)
        summed = distance @ belongs.astype(distance.dtype)
        own = codes[part].T[None]
        own_size = np.take_along_axis(size[:, None], own, 0)[0]
        inside = np.take_along_axis(summed, own, 0)[0] / np.maximum(own_size - 1, 1)
        summed /= np.maximum(size, 1)[:, None]
        summed[belongs | (size == 0)[:, None]] = np.inf
        nearest = summed.min(0)
        counts = (own_size > 1) & np.isfinite(nearest)
        nearest = np.where(counts, nearest, 0)
        gain = np.where(counts, nearest - inside, 0)
        spread = np.maximum(inside, nearest)
        scores[part] = np.mean(gain / np.where(spread > 0, spread, 1), axis=0, dtype=np.float64)
    return scores


def distances(x: Float[np.ndarray, "row d"]) -> Float[np.ndarray, "row row"]:
    """Euclidean distances between all pairs of rows.

    >>> distances(np.array([[0.0, 0], [3, 4]])).tolist()
    [[0.0, 5.0], [5.0, 0.0]]
    """
    # Around one of the rows and in double precision, so that rows that coincide stay at 0.
    around = x.astype(np.float64) - x[:1]
    squared = np.einsum("ij,ij->i", around, around)
    apart = squared[:, None] + squared - 2 * (around @ around.T)
    np.fill_diagonal(apart, 0)
    return np.sqrt(np.maximum(apart, 0)).astype(np.float32)


def score_groups(
    x: Float[np.ndarray, "row d"],
    groups: Sequence[Group],
    *,
    scale: str,
    n_init: int,
    seed: int,
    metrics: Collection[str] = METRICS,
    partitions: Sequence[Int[np.ndarray, " _row"] | None] | None = None,
) -> tuple[dict[tuple[str, str], Float[np.ndarray, "group labelling"]], Int[np.ndarray, " row"]]:
    """Cluster each group of rows and score it against each labelling.

    Args:
        partitions: of each group, where they were found elsewhere.

    Returns:
        ``(labelling, metric) -> scores (group, labelling)``, where column 0 belongs to the true
        labels and the others to permuted ones, and the cluster of every row (-1: in no group,
        or in one that could not be clustered, whose scores are 0).
    """
    collected: dict[tuple[str, str], list[np.ndarray]] = {}
    clusters = np.full(len(x), -1)
    # Matrices are small: a second thread costs more than it saves.
    with _threads().limit(limits=1):
        for index, group in enumerate(groups):
            points = SCALES[scale](x[group.rows].astype(np.float32))
            if partitions is None:
                found = partition(points, group.k, n_init=n_init, seed=seed)
            else:
                found = partitions[index]
            if found is not None:
                clusters[group.rows] = found
            for key, value in _score(points, found, group, metrics).items():
                collected.setdefault(key, []).append(value)
    return {key: np.stack(values) for key, values in collected.items()}, clusters


def label_silhouettes(
    points: Float[np.ndarray, "row d"], group: Group
) -> dict[str, Float[np.ndarray, " labelling"]]:
    """Silhouette of each labelling of a group, from an even subset of ``SILHOUETTE_ROWS``."""
    subset = np.arange(len(points))
    if len(points) > SILHOUETTE_ROWS:
        subset = np.linspace(0, len(points) - 1, SILHOUETTE_ROWS).astype(int)
    apart = distances(points[subset])
    return {name: silhouette(apart, codes[:, subset]) for name, codes in group.codes.items()}


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
    points: np.ndarray, found: np.ndarray | None, group: Group, metrics: Collection[str]
) -> dict[tuple[str, str], np.ndarray]:
    """The chosen metrics of every labelling of a group: one row of scores each."""
    if found is None:
        n = len(next(iter(group.codes.values())))
        return {(name, metric): np.zeros(n) for name in group.codes for metric in metrics}
    apart = label_silhouettes(points, group) if "silhouette" in metrics else {}
    scores = {}
    for name, codes in group.codes.items():
        table = contingency(found, codes, group.k)
        for metric in metrics:
            scores[name, metric] = (
                apart[name] if metric not in AGREEMENT else AGREEMENT[metric](table)
            )
    return scores


@lru_cache(maxsize=1)
def _threads() -> ThreadpoolController:
    """This process's threads: finding its libraries takes longer than clustering a small group."""
    return ThreadpoolController()


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
