"""Mantel and partial Mantel tests: correlation of dissimilarity matrices, permuting items.

The entries of a matrix are not independent, its items are: the null permutes the items of the
hypothesis (Mantel 1967), those of one wording together (`probes.design`), with the same
permutations for all matrices. With nuisances ``Z`` (their entries ranked where the comparison
ranks, and always a constant), both sides are first replaced by their residuals after least squares
on ``Z``. The hypothesis' *residual* matrix is then permuted, and ``Z`` partialled out again:

    r(π) = corr(M x, M π(M h)),   M = I - Z (ZᵀZ)⁻¹ Zᵀ

This is double semi-partialling (Dekker, Krackhardt & Snijders 2007): permuting ``h`` itself would
break its relation to ``Z`` and so test another null. ``r`` is the partial correlation, which orders
the permutations as its t does. Without nuisances it is the Mantel test, which is exact; with them
only linear effects of their (ranked) entries are removed. Where that is not enough, items can be
permuted within groups that share the nuisance, which is exact again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from lensclust.errors import InputError
from probes.similarity.dissimilarity import pair_index

# Entries of one block of relabelled matrices.
BLOCK = 2**22
# Pairs of entries that decide the null of tau-a; where there are fewer, all of them.
COMPARISONS = 50_000
# Residuals below this share of the original are rounding.
NOTHING = 1e-8
DECIMALS = 10

TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "spearman": lambda entries: stats.rankdata(entries, axis=-1),
    "tau-a": lambda entries: stats.rankdata(entries, axis=-1),
    "pearson": lambda entries: np.asarray(entries, dtype=np.float64),
}


@dataclass(frozen=True)
class Scores:
    """Scores of matrices against one hypothesis.

    Attributes:
        value: the score.
        statistic, null: the statistic of p, observed and under relabelling: equal to ``value``
            except for tau-a, where it may use fewer pairs of entries.
    """

    value: Float[np.ndarray, " matrix"]
    statistic: Float[np.ndarray, " matrix"]
    null: Float[np.ndarray, "matrix permutation"]


@dataclass(frozen=True)
class MatrixTest:
    """A hypothesis to test matrices against, with nuisances partialled out of both.

    Attributes:
        compare: ``spearman``, ``tau-a`` or ``pearson``.
        target: the transformed hypothesis, with nuisances partialled out.
        basis: orthonormal columns that span the constant and the transformed nuisances.
    """

    compare: str
    target: Float[np.ndarray, "item item"]
    basis: Float[np.ndarray, "pair column"]

    @classmethod
    def of(
        cls,
        hypothesis: Float[np.ndarray, "item item"],
        nuisances: Sequence[Float[np.ndarray, "item item"]],
        compare: str,
        *,
        name: str,
    ) -> MatrixTest:
        """Transform a hypothesis and partial out the nuisances.

        Raises:
            InputError: if the nuisances leave nothing of it.
        """
        n = len(hypothesis)
        pairs, transform = pair_index(n), TRANSFORMS[compare]
        columns = [np.ones(len(pairs[0])), *(transform(each[pairs]) for each in nuisances)]
        scaled = np.stack([column / np.linalg.norm(column) for column in columns], axis=1)
        left, sizes, _ = np.linalg.svd(scaled, full_matrices=False)
        basis = left[:, sizes > NOTHING * sizes[0]]
        entries = transform(hypothesis[pairs])
        residual = _without(entries[None], basis)[0]
        if np.linalg.norm(residual) < NOTHING * np.linalg.norm(entries):
            raise InputError(
                f"rsa: hypothesis {name!r} is a linear function of the nuisances, so nothing of "
                "it is left; name other nuisances"
            )
        target = np.zeros((n, n))
        target[pairs] = residual
        target += target.T
        # A repeated item gets the smallest distance between items to itself.
        distances = hypothesis[pairs]
        np.fill_diagonal(target, residual[distances == distances.min()].mean())
        return cls(compare, target, basis)

    def transformed(self, entries: Float[np.ndarray, "matrix pair"]) -> np.ndarray:
        """Ranks (or entries) with nuisances partialled out; 0 where they explain all."""
        ranks = TRANSFORMS[self.compare](entries)
        left = _without(ranks, self.basis)
        nothing = np.linalg.norm(left, axis=1) < NOTHING * np.linalg.norm(ranks, axis=1)
        return np.where(nothing[:, None], 0.0, left)

    def scores(
        self,
        residuals: Float[np.ndarray, "matrix pair"],
        orders: Int[np.ndarray, "labelling item"],
        *,
        seed: int,
    ) -> Scores:
        """Score matrices from `transformed`; the first order is that of the hypothesis."""
        correlations = self._correlations(residuals, orders)
        if self.compare != "tau-a":
            return Scores(correlations[:, 0], correlations[:, 0], correlations[:, 1:])
        entries = np.round(self.target[pair_index(len(self.target))], 6)
        levels, counts = np.unique(entries, return_counts=True)
        n = entries.size
        if self.basis.shape[1] == 1 and len(levels) == 2:
            # With two levels, tau-a is a rank sum like Spearman's: all relabellings are exact.
            size = np.linalg.norm(residuals, axis=1) * np.sqrt(counts.prod() / n)
            exact = correlations * (2 * size / (n * (n - 1) / 2))[:, None]
            return Scores(exact[:, 0], exact[:, 0], exact[:, 1:])
        rounded = np.round(residuals, 6)
        value = np.array([tau_a(row, entries) for row in rounded])
        found = self._concordance(rounded, orders, seed)
        return Scores(value, found[:, 0], found[:, 1:])

    def _correlations(self, residuals: np.ndarray, orders: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            unit = residuals / np.linalg.norm(residuals, axis=1, keepdims=True)
            parts = []
            for relabelled in self._relabelled(orders):
                explained = (relabelled @ self.basis) ** 2
                size = np.sqrt((relabelled**2).sum(1) - explained.sum(1))
                parts.append((unit @ relabelled.T) / size)
        return np.round(np.concatenate(parts, axis=1), DECIMALS)

    def _concordance(self, residuals: np.ndarray, orders: np.ndarray, seed: int) -> np.ndarray:
        """Mean agreement in sign over (a sample of) pairs of entries: an incomplete tau-a."""
        one, other = _comparisons(residuals.shape[1], seed)
        own = np.sign(residuals[:, one] - residuals[:, other]).astype(np.float32)
        parts = []
        for relabelled in self._relabelled(orders):
            left = np.round(_without(relabelled, self.basis), 6)
            signs = np.sign(left[:, one] - left[:, other]).astype(np.float32)
            parts.append(own @ signs.T / len(one))
        found = np.concatenate(parts, axis=1).astype(np.float64)
        found[~residuals.any(1)] = np.nan
        return found

    def _relabelled(self, orders: np.ndarray) -> Iterator[Float[np.ndarray, "labelling pair"]]:
        first, second = pair_index(len(self.target))
        step = max(1, BLOCK // max(len(first), COMPARISONS))
        for start in range(0, len(orders), step):
            block = orders[start : start + step]
            yield self.target[block[:, first], block[:, second]]


def relabellings(
    n: int, permutations: int, *, block: Int[np.ndarray, " item"] | None, seed: int
) -> Int[np.ndarray, "labelling item"]:
    """The identity order of the items, then random ones within blocks.

    Raises:
        InputError: if no block holds two items.

    >>> relabellings(3, 1, block=np.array([0, 0, 1]), seed=0)[:, 2].tolist()
    [2, 2]
    """
    blocks = np.zeros(n, dtype=np.int64) if block is None else block
    if np.unique(blocks, return_counts=True)[1].max() < 2:
        raise InputError("rsa: no two prompts can change places: each stands alone in its group")
    rng = np.random.default_rng(seed)
    items = np.arange(n)
    return np.stack([items, *(permute_within(items, blocks, rng) for _ in range(permutations))])


def permute_within(
    values: Int[np.ndarray, " unit"], block: Int[np.ndarray, " unit"], rng: np.random.Generator
) -> Int[np.ndarray, " unit"]:
    """Values permuted among the units of each block.

    >>> permute_within(np.array([3, 3, 5]), np.array([0, 0, 1]), np.random.default_rng(0)).tolist()
    [3, 3, 5]
    """
    shuffled = np.empty_like(values)
    here = np.argsort(block, kind="stable")
    shuffled[here] = values[np.lexsort((rng.random(len(block)), block))]
    return shuffled


def tau_a(x: Float[np.ndarray, " entry"], y: Float[np.ndarray, " entry"]) -> float:
    """Kendall's tau-a: concordant minus discordant pairs over all pairs; NaN if constant.

    >>> tau_a(np.array([1.0, 2, 3]), np.array([0.0, 1, 1])) == 2 / 3
    True
    """
    total = x.size * (x.size - 1) / 2
    untied = 1.0
    for side in (x, y):
        counts = np.unique(side, return_counts=True)[1]
        untied *= total - (counts * (counts - 1) / 2).sum()
    # scipy computes tau-b, over untied pairs.
    tau_b = stats.kendalltau(x, y, method="asymptotic")[0]
    return float(tau_b * np.sqrt(untied) / total)


def _without(
    entries: Float[np.ndarray, "matrix pair"], basis: Float[np.ndarray, "pair column"]
) -> Float[np.ndarray, "matrix pair"]:
    return entries - (entries @ basis) @ basis.T


def _comparisons(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    if n * (n - 1) // 2 <= COMPARISONS:
        return pair_index(n)
    rng = np.random.default_rng(seed)
    one = rng.integers(0, n, COMPARISONS)
    return one, (one + rng.integers(1, n, COMPARISONS)) % n
