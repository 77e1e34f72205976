"""Intervals over seeds and permutation p-values; scipy does the mathematics."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy import stats

# Relative; scores in single precision are summed in another order under another labelling.
ROUNDING = 1e-6


def mean_interval(
    values: Float[np.ndarray, " n"], *, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean and Student-t interval of independent values; the interval of one value is NaN.

    >>> [round(x, 2) for x in mean_interval(np.array([1.0, 2.0, 3.0]))]
    [2.0, -0.48, 4.48]
    """
    mean = float(np.mean(values))
    if values.size < 2:
        return mean, float("nan"), float("nan")
    error = float(stats.sem(values))
    if error == 0:
        return mean, mean, mean
    low, high = stats.t.interval(confidence, values.size - 1, loc=mean, scale=error)
    return mean, float(low), float(high)


def permutation_p(
    value: float | Float[np.ndarray, "*n"], null: Float[np.ndarray, ...]
) -> Float[np.ndarray, ...]:
    """One-sided p of ``value`` under a null sampled along the last axis of ``null``.

    Counts the observed value among the permutations (Phipson & Smyth 2010), so p is never 0:
    with R permutations the smallest p is 1 / (R + 1). Relabellings that only rename labels give
    the value again but for the order of summing: what is less by rounding counts as equal.

    >>> float(permutation_p(0.9, np.zeros(99)))
    0.01
    """
    observed = np.asarray(value, dtype=np.float64)
    least = observed - ROUNDING * np.maximum(np.abs(observed), ROUNDING)
    at_least = (null >= least[..., None]).sum(axis=-1)
    return np.asarray((at_least + 1) / (null.shape[-1] + 1))
