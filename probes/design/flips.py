"""Sign-flip test by unit: does a mean change differ from 0, with dependent rows in a unit?

If each unit's change is as likely as its negative, all 2^(units - 1) patterns of signs (up to the
overall sign) are equally likely. If these are no more than the requested flips, all are used and
p is exact.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from jaxtyping import Float, Int

from lensclust.results import permutation_p


def sign_flips(
    units: int, flips: int, *, seed: int | np.random.Generator
) -> Float[np.ndarray, "unit flip"]:
    """Signs of each unit, the identity first: all patterns, or ``flips`` random ones.

    >>> sign_flips(3, 99, seed=0).astype(int).tolist()
    [[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1]]
    """
    if units - 1 <= np.log2(flips + 1):
        return np.array([(1.0, *rest) for rest in product((1.0, -1.0), repeat=units - 1)]).T
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (units, flips + 1))
    signs[:, 0] = 1
    return signs


def smallest_flip_p(units: int, flips: int) -> float:
    """The smallest p possible with this number of units and flips."""
    return float(max(1 / (flips + 1), 2.0 ** (1 - units)))


def flipped_p(
    change: Float[np.ndarray, "site row"], unit: Int[np.ndarray, " row"], flips: int, *, seed: int
) -> tuple[Float[np.ndarray, " site"], Float[np.ndarray, " site"]]:
    """Two-sided p of the mean change at each site, uncorrected and max-corrected over sites."""
    of_unit = np.stack([np.bincount(unit, row) for row in change])
    sums = np.abs(of_unit @ sign_flips(of_unit.shape[1], flips, seed=seed))
    observed, null = sums[:, 0], sums[:, 1:]
    return permutation_p(observed, null), permutation_p(observed, null.max(0, keepdims=True))
