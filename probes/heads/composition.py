"""Regress the change of one task's activation pattern on the changes of other tasks.

    change ~ intercept + sum_i a_i basis_i        over all heads of the model

by least squares, or with every a_i at least 0 (the intercept is free in both). R² is 1 minus the
squared error over that of the mean. Out of sample, layers are held out together, since heads of
a layer are not independent, and the mean is that of the fitted layers.

Standard of evidence: all changes share a common effect of fine-tuning, so R² is high even for
unrelated tasks. It is compared with that of fits

    random      from as many bases of independent normal numbers
    permuted    from the same bases with their heads permuted within each layer (all in the same
                way): the profile over layers alone
    shared      from the mean change of the tasks as the only basis

and only an out-of-sample R² above all of these is evidence for a composition.

Source: Zhao et al. (arXiv 2409.15820) fit a linear regression and report its R². Intercept, sign
constraint, held-out layers and nulls are ours: theirs are not known to us.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float, Int
from scipy import stats
from scipy.optimize import nnls

from lensclust.arguments import checked_arguments, numbers
from lensclust.errors import InputError
from lensclust.figures import Shown
from lensclust.results import permutation_p

Given = xr.DataArray | np.ndarray
Bases = Mapping[str, Given] | Sequence[Given]
# Directions of the bases with less than this share of the largest variance are not fitted.
SINGULAR = 1e-10


@dataclass(frozen=True)
class Composition(Shown):
    """Coefficients, R² and nulls of a change as a combination of others.

    Attributes:
        coefficients: of each basis, by name: ``value``, and its range over the folds' fits as
            ``low`` and ``high``.
        intercept: of all heads.
        r2: in sample, of the fit to all layers.
        r2_out: out of sample, over held-out layers; below 0 if worse than the mean.
        frame: one row per null and metric (``r2``, ``r2_out``): ``null, metric, value, null_mean,
            null_std, null_high`` (95 % of the null lies below), ``p, n``. For ``shared``, p is
            that of a one-sided signed-rank test that the squared error of held-out layers is
            smaller than with the shared change, and NaN in sample.
        folds: one row per held-out layer: ``block, fold, error, error_shared, error_mean``, squared
            errors summed over its heads, of the fit, of the shared change, and of the mean.
        nonnegative: whether coefficients were constrained to be at least 0.
    """

    coefficients: pd.DataFrame
    intercept: float
    r2: float
    r2_out: float
    frame: pd.DataFrame
    folds: pd.DataFrame
    nonnegative: bool

    def shares(self) -> pd.Series:
        """Each coefficient divided by their sum: the share of each task in a mix.

        Raises:
            InputError: if a coefficient is below 0, or none is above.
        """
        values = self.coefficients["value"]
        if bool((values < 0).any()) or not bool((values > 0).any()):
            raise InputError(
                f"shares: coefficients are {values.to_dict()}, expected none below 0 and one "
                "above; compose with nonnegative=True"
            )
        return values / values.sum()

    def __repr__(self) -> str:
        terms = " + ".join(f"{row.value:.3g} {row.Index}" for row in self.coefficients.itertuples())
        return (
            f"Composition({terms}; R² {self.r2:.3f}, {self.r2_out:.3f} over held-out layers, "
            f"largest p {self.frame['p'].max():.2g})"
        )


@checked_arguments
def compose(
    change: Given,
    basis: Bases,
    *,
    names: Sequence[str] | None = None,
    nonnegative: bool = False,
    shared: Given | None = None,
    folds: int | None = None,
    nulls: int = 199,
    seed: int = 0,
) -> Composition:
    """Fit the change of a pattern by those of other tasks, with three nulls.

    Also `compose_patterns`.

    Args:
        change: of the pattern of one task ``(block, head)``, such as its pattern after
            fine-tuning minus that before.
        basis: the changes of other tasks, by name or in the order of ``names``.
        names: of the bases, where they come in a list; numbers unless given.
        nonnegative: keep coefficients at 0 or above.
        shared: the change common to all tasks, such as the mean over other tuned tasks; default
            the mean of the bases.
        folds: number of groups of neighbouring layers that are held out in turn; default each
            layer alone.
        nulls: draws each of random and of permuted bases.
        seed: of the draws.

    Raises:
        InputError: if shapes differ, a number is not finite, the change or a basis is constant,
            there are fewer than two layers, or more unknowns than heads to fit.

    >>> rng = np.random.default_rng(0)
    >>> add, read = rng.random((2, 6, 4))
    >>> found = compose(2 * add + read, {"add": add, "read": read}, nonnegative=True)
    >>> found.coefficients.value.round(6).to_dict(), round(found.r2_out, 6)
    ({'add': 2.0, 'read': 1.0}, 1.0)
    """
    wanted = _numbers(change, "the change")
    bases = _bases(basis, names)
    common = np.mean(list(bases.values()), axis=0) if shared is None else shared
    others = {**bases, "shared": _numbers(common, "the shared change")}
    for name, values in others.items():
        if values.shape != wanted.shape:
            raise InputError(
                f"compose: {name!r} has {values.shape} blocks and heads, the change {wanted.shape}"
            )
    held = _held_out(wanted.shape[0], folds)
    fewest = int((held[:, None] != held).sum(1).min()) * wanted.shape[1]
    if fewest <= len(bases) + 1:
        raise InputError(
            f"compose: {len(bases)} bases and an intercept, but only {fewest} heads to fit them to"
        )
    if np.ptp(wanted) == 0:
        raise InputError("compose: the change is the same at every head: there is nothing to fit")
    if nulls < 2:
        raise InputError(f"compose: nulls={nulls}, expected at least 2")
    fits = Fits(wanted, held, nonnegative=nonnegative)
    matrix = np.stack(list(bases.values()))
    ours, alone = fits.of(matrix), fits.of(others["shared"][None])
    # A separate stream: changes simulated from the same seed must not equal a null.
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
    drawn = {
        "random": [fits.of(rng.standard_normal(matrix.shape)) for _ in range(nulls)],
        "permuted": [fits.of(_permuted(matrix, rng)) for _ in range(nulls)],
    }
    table = pd.DataFrame({"block": np.arange(len(held)), "fold": held})
    table = table.assign(error=ours.errors, error_shared=alone.errors, error_mean=fits.plain)
    coefficients = pd.DataFrame(
        {"value": ours.slopes, "low": ours.by_fold.min(0), "high": ours.by_fold.max(0)},
        index=pd.Index(list(bases), name="basis"),
    )
    return Composition(
        coefficients=coefficients,
        intercept=ours.intercept,
        r2=ours.r2,
        r2_out=ours.r2_out,
        frame=_against(ours, drawn, alone),
        folds=table,
        nonnegative=nonnegative,
    )


# The same function under a name that is clear out of context.
compose_patterns = compose


def _against(ours: Fit, drawn: Mapping[str, Sequence[Fit]], alone: Fit) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for metric in ("r2", "r2_out"):
        value = getattr(ours, metric)
        for null, fits in drawn.items():
            found = np.array([getattr(fit, metric) for fit in fits])
            rows.append(
                {"null": null, "metric": metric, "value": value}
                | {
                    "null_mean": found.mean(),
                    "null_std": found.std(ddof=1) if len(found) > 1 else 0,
                }
                | {"null_high": np.quantile(found, 0.95)}
                | {"p": float(permutation_p(value, found)), "n": len(found)}
            )
        gained = alone.errors - ours.errors
        # Errors that differ by rounding alone count as equal.
        gained = np.where(np.abs(gained) > 1e-9 * (alone.errors + ours.errors), gained, 0.0)
        test: Any = stats.wilcoxon(gained, alternative="greater") if gained.any() else None
        p = (1.0 if test is None else float(test.pvalue)) if metric == "r2_out" else np.nan
        rows.append(
            {"null": "shared", "metric": metric, "value": value}
            | {"null_mean": getattr(alone, metric), "null_std": np.nan, "null_high": np.nan}
            | {"p": p, "n": len(gained)}
        )
    return pd.DataFrame(rows)


def _permuted(
    bases: Float[np.ndarray, "basis block head"], rng: np.random.Generator
) -> Float[np.ndarray, "basis block head"]:
    order = rng.permuted(np.tile(np.arange(bases.shape[2]), (bases.shape[1], 1)), axis=1)
    return np.take_along_axis(bases, order[None], axis=2)


def _bases(basis: Bases, names: Sequence[str] | None) -> dict[str, Float[np.ndarray, "block head"]]:
    if isinstance(basis, Mapping):
        if names is not None:
            raise InputError("compose: names given twice: the bases already have names")
        named = dict(basis)
    elif not isinstance(basis, (list, tuple, np.ndarray, xr.DataArray)):
        raise InputError(
            f"compose: {type(basis).__name__} given as basis, expected name -> change, or a list"
        )
    else:
        labels = [str(i) for i in range(len(basis))] if names is None else [*names]
        if len(set(labels)) != len(basis):
            raise InputError(f"compose: {len(basis)} bases, but {len(set(labels))} names for them")
        named = dict(zip(labels, basis, strict=True))
    if not named:
        raise InputError("compose: no basis given, expected at least one")
    found = {str(name): _numbers(values, f"basis {name!r}") for name, values in named.items()}
    for name, values in found.items():
        if np.ptp(values) == 0:
            raise InputError(f"compose: basis {name!r} is the same at every head")
    return found


def _numbers(given: Given, what: str) -> Float[np.ndarray, "block head"]:
    values = numbers("compose", what, given)
    if values.ndim != 2:
        raise InputError(f"compose: {what} has {values.ndim} axes, expected blocks and heads")
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        raise InputError(f"compose: {what} is not finite at head {bad[0, 0]}.{bad[0, 1]}")
    return values


def _held_out(blocks: int, folds: int | None) -> Int[np.ndarray, " block"]:
    """The fold in which each layer is held out."""
    n = blocks if folds is None else folds
    if not 2 <= n <= blocks:
        raise InputError(
            f"compose: {n} folds of {blocks} layers, expected at least 2 and at most one a layer"
        )
    return np.repeat(np.arange(n), [len(part) for part in np.array_split(np.arange(blocks), n)])


@dataclass(frozen=True)
class Fit:
    """A fit of a change by bases.

    Attributes:
        slopes, intercept: of the fit to all layers.
        by_fold: slopes of the fits without one fold.
        errors: of each held-out layer, squared and summed over heads.
        r2, r2_out: in sample, and over held-out layers.
    """

    slopes: Float[np.ndarray, " basis"]
    intercept: float
    by_fold: Float[np.ndarray, "fold basis"]
    errors: Float[np.ndarray, " block"]
    r2: float
    r2_out: float


class Fits:
    """Fits of one change by any bases, to all layers and to all but a fold of them.

    All fits use the same sums of products, one set per layer.

    Args:
        wanted: the change, not constant.
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
        # Layers of each fit (the first has all), and the fit that leaves out each layer.
        kept = [held != fold for fold in np.unique(held)]
        self.seen = np.stack([np.ones_like(held, dtype=bool), *kept]).astype(np.float64)
        self.unseen = held + 1
        # Scaled to unit size like the bases: changes are small, and solvers have tolerances.
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
    """The minimum-norm solution, where bases are linearly dependent."""
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
