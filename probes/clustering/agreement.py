"""Agreement of partitions with a labelling, and its permutation null.

Agreement is computed from contingency tables, so that a whole null (one partition against all
relabellings) is one vectorised call; label sizes may differ between relabellings. This module does
not import torch, so that worker processes start fast.

Agreement *across wordings* uses only pairs of rows with different wordings, so that effects of a
shared wording cannot count. Of these pairs, let ``together`` be those in one cluster and of one
label, ``C`` those in one cluster, ``L`` those of one label, ``N`` all. Then

    cross_wording_ari = (together - E) / ((C + L) / 2 - E),   E = C L / N
    cross_wording_f1  = 2 together / (C + L)

The first is 1 where clusters and labels agree across wordings. Where states encode the wording and
not the label, ``E`` is the mean of ``together`` over the relabellings (each pair of
wordings is as likely as any other to share a label), so the score is 0 on average. F1 chance-
corrected, ``(F1 - 2E / (C + L)) / (1 - 2E / (C + L))``, is that same number; F1 itself is reported
uncorrected, with its floor in the null. Neither is defined where no two wordings share a label, or
all do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from scipy.special import gammaln, xlogy
from threadpoolctl import ThreadpoolController

from probes.clustering.kmeans import partition
from probes.design import Group

Table = Int[np.ndarray, "labelling cluster label"]
Scores = Float[np.ndarray, " labelling"]

# A silhouette needs all pairs of rows; beyond this many an even subset is scored.
SILHOUETTE_ROWS = 1000


def adjusted_rand(table: Table) -> Scores:
    """Adjusted Rand index (Hubert & Arabie 1985)."""
    return Pairs.of(table).adjusted()


def pair_f1(table: Table) -> Scores:
    """F1 of same-cluster against same-label over all pairs of rows."""
    return Pairs.of(table).f1()


def matched_f1(table: Table) -> Scores:
    """Macro-F1 over labels, with clusters matched one-to-one by the Hungarian method."""
    n = table.astype(float)
    f1 = 2 * n / np.maximum(n.sum(2, keepdims=True) + n.sum(1, keepdims=True), 1)
    scores = np.empty(len(f1))
    for index, matrix in enumerate(f1):
        scores[index] = matrix[linear_sum_assignment(matrix, maximize=True)].sum()
    # A relabelling may leave a label out of a group.
    return scores / (n.sum(1) > 0).sum(1)


def adjusted_mutual_information(table: Table) -> Scores:
    """Adjusted mutual information, arithmetic normaliser (Vinh et al. 2010)."""
    n = table.astype(float)
    total = n[0].sum()
    clusters, labels = n[0].sum(1), n.sum(1)
    entropy = (_entropy(clusters / total) + _entropy(labels / total)) / 2
    outer = np.maximum(clusters[:, None] * labels[:, None], 1)
    information = (xlogy(n, n * total / outer) / total).sum((1, 2))
    expected = _expected_information(clusters.astype(int), table.sum(1))
    return _ratio(information - expected, entropy - expected)


def _entropy(p: np.ndarray) -> np.ndarray:
    return np.asarray(-xlogy(p, p).sum(-1))


def _expected_information(
    clusters: Int[np.ndarray, " cluster"], labels: Int[np.ndarray, "labelling label"]
) -> Scores:
    """Expected mutual information of partitions of these sizes."""
    total = int(clusters.sum())
    a, times = np.unique(clusters, return_counts=True)
    b, place = np.unique(labels, return_inverse=True)
    n = np.arange(1, min(a.max(), b.max()) + 1)
    log_factorial = gammaln(np.arange(total + 1) + 1.0)
    one, other, both = a[:, None, None], b[:, None], np.broadcast_to(n, (len(a), len(b), len(n)))
    rest = total - one - other + both
    possible = (both <= one) & (both <= other) & (rest >= 0)
    one, other = (
        np.broadcast_to(one, both.shape)[possible],
        np.broadcast_to(other, both.shape)[possible],
    )
    both, rest = both[possible], rest[possible]
    log_p = log_factorial[one] + log_factorial[total - one] - log_factorial[total]
    log_p += log_factorial[other] + log_factorial[total - other] - log_factorial[both]
    log_p -= log_factorial[one - both] + log_factorial[other - both] + log_factorial[rest]
    term = np.zeros(possible.shape)
    term[possible] = both / total * np.log(total * both / (one * other)) * np.exp(log_p)
    return (times @ term.sum(2))[place].reshape(labels.shape).sum(1)


@dataclass(frozen=True)
class Pairs:
    """Counts of pairs of rows: together in both, in one cluster, of one label, all."""

    together: Scores
    in_cluster: Scores
    in_label: Scores
    total: float | Scores

    @classmethod
    def of(cls, table: Table) -> Pairs:
        """All pairs of rows."""
        n = table.astype(float)
        together, in_cluster, in_label = _pairs(n).sum((1, 2)), n.sum(2), n.sum(1)
        total = float(_pairs(n[0].sum()))
        return cls(together, _pairs(in_cluster).sum(1), _pairs(in_label).sum(1), total)

    def across(self, clusters: np.ndarray, cell: np.ndarray, wording: np.ndarray) -> Pairs:
        """Counts of pairs with different wordings.

        Rows of one wording and label (a cell) keep a common label under every relabelling,
        different from other cells of the wording: the subtracted counts are the same for all.
        """
        k = int(clusters.max()) + 1
        within, apart = (Pairs.of(contingency(clusters, c[None], k)) for c in (cell, wording))
        return Pairs(
            self.together - within.together,
            self.in_cluster - apart.together,
            self.in_label - within.in_label,
            self.total - float(apart.in_label[0]),
        )

    def adjusted(self) -> Scores:
        """Chance-corrected agreement, at most 1."""
        expected = self.in_cluster * self.in_label / np.maximum(self.total, 1)
        return _ratio(self.together - expected, (self.in_cluster + self.in_label) / 2 - expected)

    def f1(self) -> Scores:
        """F1 of same-cluster against same-label."""
        return _ratio(2 * self.together, self.in_cluster + self.in_label)


def counted_agreement(
    clusters: Int[np.ndarray, " row"],
    labels: Int[np.ndarray, " row"],
    wording: Int[np.ndarray, " row"],
    counts: Float[np.ndarray, "draw row"],
) -> Float[np.ndarray, " draw"]:
    """``cross_wording_ari`` of one partition with weighted rows, for the bootstrap.

    Resamples wordings without clustering again: copies of a wording count as one wording, so
    pairs of them do not count.

    Args:
        counts: multiplicity of each row, equal for the rows of one wording.

    >>> agreed = counted_agreement(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]), np.arange(4),
    ...                            np.array([[1.0, 1, 1, 1], [2, 1, 0, 1]]))
    >>> agreed.tolist()
    [1.0, 1.0]
    """

    def across(cells: np.ndarray) -> np.ndarray:
        within = cells * (int(wording.max()) + 1) + wording
        return (_squares(cells, counts) - _squares(within, counts)) / 2

    found = Pairs(
        together=across(clusters * (int(labels.max()) + 1) + labels),
        in_cluster=across(clusters),
        in_label=across(labels),
        total=across(np.zeros_like(clusters)),
    )
    return found.adjusted()


def _squares(cells: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sum over cells of their squared row counts, for each draw."""
    code = np.unique(cells, return_inverse=True)[1].ravel()
    belongs = np.zeros((len(code), int(code.max()) + 1))
    belongs[np.arange(len(code)), code] = 1
    return ((counts @ belongs) ** 2).sum(1)


AGREEMENT: dict[str, Callable[[Table], Scores]] = {
    "ari": adjusted_rand,
    "ami": adjusted_mutual_information,
    "pair_f1": pair_f1,
    "matched_f1": matched_f1,
}
CROSS_WORDING: dict[str, Callable[[Pairs], Scores]] = {
    "cross_wording_ari": Pairs.adjusted,
    "cross_wording_f1": Pairs.f1,
}
METRICS = (*AGREEMENT, "silhouette", *CROSS_WORDING)

SCALES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda x: x,
    "unit": lambda x: x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12),
    "standard": lambda x: (x - x.mean(0)) / np.maximum(x.std(0), 1e-12),
}


def silhouette(
    distance: Float[np.ndarray, "row row"], codes: Int[np.ndarray, "labelling row"]
) -> Scores:
    """Mean silhouette of each labelling (Rousseeuw 1987); labels with one row count 0.

    High if rows of one label are nearer to each other than to the nearest other label; it scores
    the labels themselves, not a k-means partition.
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
    # Relative to one of the rows and in double precision, so that equal rows have distance 0.
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
        partitions: of each group, if already computed.

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
    """Contingency tables of clusters and labels, one per labelling.

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
    apart = (
        label_silhouettes(points, group) if found is not None and "silhouette" in metrics else {}
    )
    scores = {}
    for name, codes in group.codes.items():
        known = [m for m in metrics if m not in CROSS_WORDING]
        across = [m for m in metrics if m in CROSS_WORDING and name in group.crossed]
        if found is None:
            scores |= {(name, metric): np.zeros(len(codes)) for metric in (*known, *across)}
            continue
        table = contingency(found, codes, group.k)
        for metric in known:
            scores[name, metric] = (
                apart[name] if metric not in AGREEMENT else AGREEMENT[metric](table)
            )
        if across:
            wording = group.wording[name]
            cell = np.unique(wording * (codes.max() + 1) + codes[0], return_inverse=True)[1]
            pairs = Pairs.of(table).across(found, cell, wording)
            scores |= {(name, metric): CROSS_WORDING[metric](pairs) for metric in across}
    return scores


@lru_cache(maxsize=1)
def _threads() -> ThreadpoolController:
    """Thread limits of this process, cached: the lookup is slower than a small k-means."""
    return ThreadpoolController()


def _pieces(total: int, width: int) -> list[slice]:
    """Slices of a range such that ``width`` numbers each stay within about 100 MB."""
    step = max(1, 10_000_000 // max(width, 1))
    return [slice(start, start + step) for start in range(0, total, step)]


def _pairs(n: np.ndarray | float) -> np.ndarray:
    return np.asarray(n * (np.asarray(n) - 1) / 2)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Ratio, 0 where the denominator is 0 (a single cluster or label)."""
    safe = np.where(np.abs(denominator) > 1e-12, denominator, 1)
    return np.where(np.abs(denominator) > 1e-12, numerator / safe, 0.0)
