"""Inner products of Gram matrices of centred states, and their permutation moments.

With centred states ``X (row, d)`` and ``Y (row, e)``, ``<XXᵀ, YYᵀ> = |XᵀY|²``: through Gram
matrices a pair of sites costs ``row²``, through features ``row · d · e``. Sites are read one at a
time with bounded memory, so that states can stay on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from lensclust.activations import dataset_sites, site_values
from lensclust.models import Site
from probes.arrays import Array, host, namespace, placed, wide

KEPT_BYTES = 256_000_000

Products = Float[np.ndarray, "site_a site_b"]


class Side:
    """The sites of one activation set, with summaries of each Gram matrix.

    Args:
        device: of the computation; None for numpy.

    Attributes:
        norms: the Gram matrix's diagonal, ``(site, row)``.
        square: its squared Frobenius norm, by site.
        cube: the trace of its third power, by site.
    """

    def __init__(
        self,
        acts: xr.Dataset,
        kinds: str | Sequence[str] | None,
        position: str | None,
        device: Any = None,
    ) -> None:
        self.acts = acts
        self.device = device
        self.position = position
        self.sites: list[Site] = dataset_sites(acts, kinds)
        self.rows = acts.sizes["prompt"]
        self.norms = np.full((len(self.sites), self.rows), np.nan)
        self.square = np.full(len(self.sites), np.nan)
        self.cube = np.full(len(self.sites), np.nan)

    def states(self, index: int) -> Float[Array, "row d"]:
        """Centred states of unit total variance, or 0 where they are constant up to rounding."""
        values = site_values(self.acts, self.sites[index], position=self.position)
        raw = wide(placed(values, self.device))
        xp = namespace(raw)
        x = raw - raw.mean(0)
        spread = xp.linalg.norm(x)
        if spread <= np.finfo(np.float32).eps * xp.linalg.norm(raw):
            x, spread = xp.zeros_like(x), 1.0
        x = x / spread
        if np.isnan(self.square[index]):
            moments = x.T @ x if x.shape[1] <= x.shape[0] else x @ x.T
            self.norms[index] = host(xp.einsum("ij,ij->i", x, x))
            self.square[index] = float((moments**2).sum())
            self.cube[index] = float(((moments @ moments) * moments).sum())
        return x

    def widths(self) -> list[int]:
        return [self.acts.sizes["d_model" if s.head is None else "d_head"] for s in self.sites]

    def trace(self) -> Float[np.ndarray, " site"]:
        return self.norms.sum(1)

    def size(self, *, debiased: bool) -> Float[np.ndarray, " site"]:
        """Norm of each Gram matrix, or of its U-centred form; NaN where it is 0."""
        squared = self.square
        if debiased:
            squared = squared - _self_pairs(self.rows, (self.norms**2).sum(1), self.trace() ** 2)
        return np.sqrt(np.where(squared > 1e-12 * self.square, squared, np.nan))


def products(a: Side, b: Side, *, debiased: bool) -> Products:
    """Inner product of the Gram matrices of every pair of sites, by the cheaper route.

    Debiased, both are U-centred first: zero on the diagonal, and all rows summing to 0.
    """
    n, widths = a.rows, (a.widths(), b.widths())
    by_gram = n * (sum(map(sum, widths)) + len(widths[0]) * len(widths[1]))
    found = (_by_gram if by_gram < sum(widths[0]) * sum(widths[1]) else _by_feature)(a, b)
    if debiased:
        found = found - _self_pairs(n, a.norms @ b.norms.T, np.outer(a.trace(), b.trace()))
    return found


def shuffled(a: Side, b: Side, *, debiased: bool) -> tuple[Products, Products, Products]:
    """Permutation mean, standard deviation and skewness of the cosine of two Gram matrices.

    Mean and deviation are exact over all permutations of one side's rows; the skewness is that
    of many rows. A matrix enters by ``beta = trace² / |.|²``, its effective dimension, and by
    its squared diagonal; both are 0 where the diagonal is.

    Source: Kazi-Aoual et al. (1995); Josse, Pagès & Husson (2008).
    """
    n = a.rows
    betas, taus, skews = [], [], []
    for side in (a, b):
        squared = side.size(debiased=debiased) ** 2
        diagonal = 0 if debiased else 1
        beta = diagonal * side.trace() ** 2 / squared
        excess = n * (n + 1) * diagonal * (side.norms**2).sum(1) / squared
        betas.append(beta)
        taus.append((n - 1) / (n - 3) * (excess - (n - 1) * (beta + 2)))
        with np.errstate(invalid="ignore"):
            skews.append(side.cube / side.square**1.5)
    mean = np.sqrt(np.outer(*betas)) / (n - 1)
    free = np.outer(*(n - 1 - beta for beta in betas))
    variance = 2 * free + (n - 3) / (n * (n - 1)) * np.outer(*taus)
    variance /= (n + 1) * (n - 1) ** 2 * (n - 2)
    return mean, np.sqrt(np.maximum(variance, 0)), np.sqrt(8) * np.outer(*skews)


def relabelled(
    a: Side, b: Side, orders: Int[np.ndarray, "labelling row"], *, debiased: bool
) -> Float[np.ndarray, "labelling site_a site_b"]:
    """Cosines of the Gram matrices of every pair of sites, with reordered rows of side b.

    An order may repeat a row and omit another, so b's states are centred again.
    """
    n = a.rows
    found = np.empty((len(orders), len(a.sites), len(b.sites)))
    step = max(1, KEPT_BYTES // (8 * n * n))
    for start in range(0, len(a.sites), step):
        part = range(start, min(start + step, len(a.sites)))
        kept = np.stack([_centred(_gram(a, i), debiased).ravel() for i in part])
        for j in range(len(b.sites)):
            gram = _gram(b, j)
            centred = _centred(gram, debiased)
            for index, order in enumerate(orders):
                whole = len(np.unique(order)) == n
                moved = (centred if whole else gram)[np.ix_(order, order)]
                moved = moved if whole else _centred(moved, debiased)
                found[index, part.start : part.stop, j] = kept @ moved.ravel()
    return found


def _gram(side: Side, index: int) -> Float[np.ndarray, "row row"]:
    x = host(side.states(index))
    return x @ x.T


def _centred(gram: Float[np.ndarray, "row row"], debiased: bool) -> Float[np.ndarray, "row row"]:
    """The Gram matrix centred (or U-centred) and of norm 1; NaN where it is 0."""
    n = len(gram)
    if debiased:
        gram = gram * ~np.eye(n, dtype=bool)
        sums = gram.sum(0) / (n - 2)
        gram = gram - sums - sums[:, None] + sums.sum() / (n - 1)
        np.fill_diagonal(gram, 0)
    else:
        means = gram.mean(0)
        gram = gram - means - means[:, None] + means.mean()
    size = np.linalg.norm(gram)
    return gram / size if size > 1e-6 else np.full_like(gram, np.nan)


def _self_pairs(n: int, diagonals: np.ndarray, traces: np.ndarray) -> np.ndarray:
    """Contribution of the diagonals to the inner product of matrices whose rows sum to 0."""
    return n / (n - 2) * diagonals - traces / ((n - 1) * (n - 2))


def _by_gram(a: Side, b: Side) -> Products:
    """All pairs at once, from blocks of rows of every Gram matrix."""
    found = np.zeros((len(a.sites), len(b.sites)))
    sides = [a] if a is b else [a, b]
    step = max(1, KEPT_BYTES // (8 * a.rows * sum(len(side.sites) for side in sides)))
    for start in range(0, a.rows, step):
        part = slice(start, start + step)
        stacked = [_stretches(side, part) for side in sides]
        found += host(stacked[0] @ stacked[-1].T)
    return found


def _by_feature(a: Side, b: Side) -> Products:
    """Products of a block of sites of one side with each site of the other."""
    found = np.empty((len(a.sites), len(b.sites)))
    step = max(1, KEPT_BYTES // (8 * a.rows * max(a.widths())))
    for start in range(0, len(a.sites), step):
        kept = [a.states(i) for i in _range(a)[start : start + step]]
        starts = np.cumsum([0, *(x.shape[1] for x in kept[:-1])])
        together = namespace(kept[0]).concatenate(kept, axis=1)
        # For one side against itself, pairs before this block follow by symmetry.
        for index in _range(b)[start if a is b else 0 :]:
            y = b.states(index)
            by_site = np.add.reduceat(host(((y.T @ together) ** 2).sum(0)), starts)
            found[start : start + step, index] = by_site
            if a is b:
                found[index, start : start + step] = by_site
    return found


def _stretches(side: Side, part: slice) -> Float[Array, "site entry"]:
    stretches = [(x[part] @ x.T).ravel() for x in map(side.states, _range(side))]
    return namespace(stretches[0]).stack(stretches)


def _range(side: Side) -> range:
    return range(len(side.sites))
