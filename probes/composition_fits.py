"""One change of a pattern fitted by others, to all layers and to all but some, at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import nnls

# Directions in which bases vary less than this share of the most are not fitted.
SINGULAR = 1e-10


@dataclass(frozen=True)
class Fit:
    """What bases make of a change.

    Attributes:
        slopes, intercept: of the fit to all layers.
        by_fold: slopes of the fits without a fold.
        errors: of each layer, squared and summed over heads, by the fit that has not seen it.
        r2, r2_out: in sample, and over layers that were not seen.
    """

    slopes: Float[np.ndarray, " basis"]
    intercept: float
    by_fold: Float[np.ndarray, "fold basis"]
    errors: Float[np.ndarray, " block"]
    r2: float
    r2_out: float


class Fits:
    """Fits of one change by any bases, to all layers and to all but a fold of them.

    Every fit is read off the same sums of products, one set a layer.

    Args:
        wanted: the change, not the same everywhere.
        held: the fold in which each layer is held out, from 0.
        nonnegative: keep slopes at 0 or above.

    >>> wanted = np.arange(6.0).reshape(3, 2)
    >>> found = Fits(wanted, np.arange(3), nonnegative=False).of(2 * wanted[None] + 1)
    >>> found.slopes.round(6).tolist(), round(found.intercept, 6), round(found.r2_out, 6)
    ([0.5], -0.5, 1.0)
    """

    def __init__(
        self,
        wanted: Float[np.ndarray, "block head"],
        held: Int[np.ndarray, " block"],
        *,
        nonnegative: bool,
    ) -> None:
        self.solve = _not_negative if nonnegative else _least_squares
        # Which layers each fit sees (the first sees all), and which fit has not seen a layer.
        kept = [held != fold for fold in np.unique(held)]
        self.seen = np.stack([np.ones_like(held, dtype=bool), *kept]).astype(np.float64)
        self.unseen = held + 1
        # In units of its own, as bases are: changes are small numbers, and solvers have limits.
        self.middle, self.unit = float(wanted.mean()), float(wanted.std())
        self.y = (wanted - self.middle) / self.unit
        means = self.seen @ self.y.mean(1) / self.seen.sum(1)
        self.plain = ((self.y - means[self.unseen, None]) ** 2).sum(1) * self.unit**2

    def of(self, bases: Float[np.ndarray, "basis block head"]) -> Fit:
        """The fits by some bases, with an intercept."""
        center, scale = (f(bases, axis=(1, 2), keepdims=True) for f in (np.mean, np.std))
        scale = np.where(scale > 0, scale, 1.0)
        x = (bases - center) / scale
        all_of = np.concatenate([np.ones_like(x[:1]), x, self.y[None]])
        products = np.einsum("ibh,jbh->bij", all_of, all_of)
        sums = np.einsum("fb,bij->fij", self.seen, products)
        means = sums[:, 0, 1:] / sums[:, 0, :1]
        spread = sums[:, 1:, 1:] - sums[:, :1, :1] * means[:, :, None] * means[:, None]
        slopes = self.solve(spread[:, :-1, :-1], spread[:, :-1, -1])
        level = means[:, -1] - (slopes * means[:, :-1]).sum(1)

        def errors(fit: Int[np.ndarray, " block"]) -> Float[np.ndarray, " block"]:
            said = level[fit, None] + np.einsum("bk,kbh->bh", slopes[fit], x)
            return ((self.y - said) ** 2).sum(1) * self.unit**2

        inside, outside = errors(0 * self.unseen), errors(self.unseen)
        given = slopes * self.unit / scale[:, 0, 0]
        return Fit(
            slopes=given[0],
            intercept=float(self.middle + self.unit * level[0] - given[0] @ center[:, 0, 0]),
            by_fold=given[1:],
            errors=outside,
            r2=float(1 - inside.sum() / (self.y.size * self.unit**2)),
            r2_out=float(1 - outside.sum() / self.plain.sum()),
        )


def _least_squares(
    spread: Float[np.ndarray, "fit basis basis"], along: Float[np.ndarray, "fit basis"]
) -> Float[np.ndarray, "fit basis"]:
    """The smallest solution, where bases depend on each other."""
    return np.einsum("fij,fj->fi", np.linalg.pinv(spread, rcond=SINGULAR, hermitian=True), along)


def _not_negative(
    spread: Float[np.ndarray, "fit basis basis"], along: Float[np.ndarray, "fit basis"]
) -> Float[np.ndarray, "fit basis"]:
    found = []
    for matrix, target in zip(spread, along, strict=True):
        sizes, axes = np.linalg.eigh(matrix)
        roots = np.sqrt(np.where(sizes > SINGULAR * sizes.max(), sizes, 0))
        seen = np.divide(axes.T @ target, roots, out=np.zeros_like(roots), where=roots > 0)
        found.append(nnls(roots[:, None] * axes.T, seen)[0])
    return np.stack(found)
