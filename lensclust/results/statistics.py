"""Confidence intervals of means and permutation p-values, computed with scipy.

An interval is a statement about *units*: values that share one (a seed, a wording, a task that is
the source of several interventions) are not independent. It stays within the measure's range, and
is never narrower than the smallest step between two of its values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import stats
from scipy.special import expit, logit

# Relative; relabelling changes the order in which single-precision scores are summed.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Scale:
    """Range and step of a measure.

    Attributes:
        low, high: the ends of its range.
        step: the smallest difference of two values, 0 if there is none.
    """

    low: float = -math.inf
    high: float = math.inf
    step: float = 0.0

    @property
    def gain(self) -> Scale:
        """The scale of the difference of two values.

        >>> share(of=50).gain
        Scale(low=-1.0, high=1.0, step=0.02)
        """
        width = self.high - self.low
        return Scale(-width, width, self.step)


REAL = Scale()


def share(of: int) -> Scale:
    """Scale of a share of ``of`` prompts, such as accuracy: 0 to 1."""
    return Scale(0.0, 1.0, 1 / of)


def agreement(of: int) -> Scale:
    """Scale of chance-corrected agreement (ARI, AMI, silhouette) over ``of`` rows: -1 to 1.

    One misassigned row of two equal clusters lowers the ARI by about 2 / rows.
    """
    return Scale(-1.0, 1.0, 2 / of)


def correlation(of: int) -> Scale:
    """Scale of a rank correlation over ``of`` points; a step swaps two neighbouring ranks.

    >>> correlation(of=5)
    Scale(low=-1.0, high=1.0, step=0.1)
    """
    return Scale(-1.0, 1.0, 12 / (of * (of**2 - 1)) if of > 1 else 2.0)


@dataclass(frozen=True)
class Mean:
    """A mean of measured values with its confidence interval.

    Attributes:
        value: the mean.
        low, high: its interval, NaN if there is only one unit.
        n: number of independent units, the fewest if several kinds are crossed.
        least, most: the range of the averaged values: of means of units if there is one kind, the
            value itself if nothing was averaged.
        error: standard error, on the scale of the link function.
        scale: scale of the values.
    """

    value: float
    low: float
    high: float
    n: int
    least: float
    most: float
    error: float
    scale: Scale

    def p_above(self, bound: float | int = 0) -> float:
        """One-sided p of a mean of at most ``bound``: small if the mean is above it.

        The t test that corresponds to the interval. NaN if there is none.

        >>> mean_of([0.2, 0.3, 0.25, 0.2]).p_above(0) < 0.01
        True
        """
        return self._p_beyond(bound, 1)

    def p_below(self, bound: float | int = 0) -> float:
        """One-sided p of a mean of at least ``bound``."""
        return self._p_beyond(bound, -1)

    def _p_beyond(self, bound: float | int, side: int) -> float:
        if not math.isfinite(self.error):
            return math.nan
        away = side * (self._linked(self.value) - self._linked(bound))
        if self.error == 0:
            return float(away <= 0)
        return float(stats.t.sf(away / self.error, self.n - 1))

    def _linked(self, value: float | int) -> float:
        return _link(value, self.scale, self.n)[0]


def mean_of(
    values: ArrayLike,
    *,
    scale: Scale = REAL,
    units: Mapping[str, np.ndarray] | None = None,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Mean:
    """The mean of values, with an interval over their units.

    Independent values: Student t. Measures with a range: t on the logit of the mean (delta
    method), which is smoothed by two steps at either end, then mapped back.
    If units of several kinds are crossed (inputs and wordings, or tasks as sources and as
    targets), the standard error is that of the pigeonhole bootstrap (Owen 2007): units of each
    kind are drawn with replacement, and a value's weight is the product of its units' counts; the
    variance is corrected by k / (k - 1), and t has k - 1 degrees of freedom for the k units of
    the rarest kind. Units of one kind: the t of their means.

    Args:
        values: ``(value)``; one NaN makes all NaN.
        scale: range and step of the measure. The interval stays in the range and reaches at
            least one step to each side.
        units: kind -> the unit of each value ``(value)``, or several ``(value, role)``, such as
            ``{"task": [[0, 1], [1, 0], ...]}`` for a source and a target. By default each value
            is a unit.
        draws: number of bootstrap samples.

    Raises:
        ValueError: if there is no value, or one is outside the range.

    >>> found = mean_of([1.0, 1.0, 1.0], scale=share(of=100))
    >>> found.low < 0.99, found.high
    (True, 1.0)
    """
    measured = np.asarray(values, dtype=np.float64)
    if measured.size == 0:
        raise ValueError("mean_of: no value given")
    if measured.min() < scale.low - ROUNDING or measured.max() > scale.high + ROUNDING:
        raise ValueError(
            f"mean_of: values from {measured.min():g} to {measured.max():g} given, expected "
            f"{scale.low:g} to {scale.high:g}"
        )
    kinds = [np.asarray(of_value) for of_value in (units or {}).values()]
    if len(kinds) > 1 or any(of_value.ndim > 1 for of_value in kinds):
        n, error = _pigeonhole(measured, kinds, draws=draws, seed=seed)
    else:
        measured = _means(measured, kinds[0]) if kinds else measured
        n = measured.size
        error = float(stats.sem(measured)) if n > 1 else math.nan
    found = estimate_of(measured.mean(), error, n, scale=scale, confidence=confidence)
    return replace(found, least=float(measured.min()), most=float(measured.max()))


def estimate_of(
    value: float, error: float, n: int, *, scale: Scale = REAL, confidence: float = 0.95
) -> Mean:
    """The interval of a value with known standard error, as in `mean_of`.

    For statistics that are not means over units, such as agreement over pairs of rows, with the
    error from resampling units.

    Args:
        error: standard error, NaN if there is none.
        n: number of independent units, the fewest if several kinds are crossed.
    """
    value = float(value)
    found = Mean(value, math.nan, math.nan, n, value, value, error=math.nan, scale=scale)
    if n < 2 or not math.isfinite(error):
        return found
    # Values are exact up to half a step.
    error = max(error, scale.step / math.sqrt(12 * n))
    at, slope = _link(value, scale, n)
    error *= slope
    reach = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    low = min(_unlink(at - reach, scale), value - scale.step)
    high = max(_unlink(at + reach, scale), value + scale.step)
    return replace(found, low=max(low, scale.low), high=min(high, scale.high), error=error)


def mean_interval(
    values: Float[np.ndarray, " n"], *, confidence: float = 0.95, scale: Scale = REAL
) -> tuple[float, float, float]:
    """`mean_of` as an array of mean, low and high.

    >>> [round(x, 2) for x in mean_interval(np.array([1.0, 2.0, 3.0]))]
    [2.0, -0.48, 4.48]
    """
    found = mean_of(values, confidence=confidence, scale=scale)
    return found.value, found.low, found.high


def permutation_p(
    value: float | Float[np.ndarray, "*n"], null: Float[np.ndarray, ...]
) -> Float[np.ndarray, ...]:
    """One-sided p of ``value`` under a null sampled along the last axis of ``null``.

    Counts the observed value among the permutations (Phipson & Smyth 2010), so p is never 0:
    with R permutations the smallest p is 1 / (R + 1). Permutations that only rename labels give
    the same value up to the order of summation, so values that differ by rounding count as equal.

    >>> float(permutation_p(0.9, np.zeros(99)))
    0.01
    """
    observed = np.asarray(value, dtype=np.float64)
    least = observed - ROUNDING * np.maximum(np.abs(observed), ROUNDING)
    at_least = (null >= least[..., None]).sum(axis=-1)
    return np.asarray((at_least + 1) / (null.shape[-1] + 1))


def holm(p: ArrayLike) -> Float[np.ndarray, " test"]:
    """p-values corrected for their number (Holm 1979); NaN is kept and not counted as a test.

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    found = np.asarray(p, dtype=np.float64).copy()
    tested = np.flatnonzero(np.isfinite(found))
    order = tested[np.argsort(found[tested], kind="stable")]
    scaled = found[order] * np.arange(len(order), 0, -1)
    found[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return found


def q_values(p: ArrayLike) -> Float[np.ndarray, " test"]:
    """False discovery rates (Benjamini & Hochberg 1995); NaN is kept and not counted as a test.

    >>> q_values([0.01, 0.04, 0.03]).round(3).tolist()
    [0.03, 0.04, 0.04]
    """
    found = np.asarray(p, dtype=np.float64).copy()
    tested = np.isfinite(found)
    if tested.any():
        found[tested] = stats.false_discovery_control(found[tested])
    return found


def _means(values: np.ndarray, units: np.ndarray) -> Float[np.ndarray, " unit"]:
    code = np.unique(units.astype(str), return_inverse=True)[1].ravel()
    return np.bincount(code, values) / np.bincount(code)


def _pigeonhole(
    values: np.ndarray, kinds: Sequence[np.ndarray], *, draws: int, seed: int
) -> tuple[int, float]:
    """Number of units of the rarest kind, and the standard error of the mean over all kinds."""
    rng = np.random.default_rng(seed)
    counts = np.ones((draws, len(values)))
    rarest = len(values)
    for of_value in kinds:
        names, code = np.unique(of_value.astype(str), return_inverse=True)
        k, roles = len(names), code.reshape(len(values), -1).T
        rarest = min(rarest, k)
        drawn = rng.multinomial(k, np.full(k, 1 / k), size=draws)
        for role in roles:
            counts *= drawn[:, role]
    total = counts.sum(1)
    means = counts[total > 0] @ values / total[total > 0]
    if rarest < 2 or len(means) < 2:
        return rarest, math.nan
    return rarest, float(means.std(ddof=1)) * math.sqrt(rarest / (rarest - 1))


# Number of additional steps at either end of a smoothed mean.
_SMOOTHED = 2.0


def _link(value: float | int, scale: Scale, n: int) -> tuple[float, float]:
    """The logit of a smoothed mean and its slope; the value itself if there is no range."""
    width = scale.high - scale.low
    if not math.isfinite(width):
        return float(value), 1.0
    steps = n * width / (scale.step or width * ROUNDING)
    part = ((value - scale.low) / width * steps + _SMOOTHED) / (steps + 2 * _SMOOTHED)
    return float(logit(part)), 1 / (width * part * (1 - part))


def _unlink(linked: float, scale: Scale) -> float:
    width = scale.high - scale.low
    return scale.low + width * float(expit(linked)) if math.isfinite(width) else linked
