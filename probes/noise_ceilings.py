"""How well any hypothesis could do: the agreement of a site's RDMs over repeats."""

from __future__ import annotations

import warnings

import numpy as np
from jaxtyping import Float

METHODS = {"spearman": "spearman", "tau-a": "tau-a", "pearson": "corr"}


def noise_ceiling(rdms: Float[np.ndarray, "repeat pair"], compare: str) -> tuple[float, float]:
    """Lower and upper bound of the mean score over repeats: rsatoolbox's ``boot_noise_ceiling``.

    Each repeat is compared with the mean of the others (lower) and of all, itself included
    (upper), pooled in ranks where the comparison ranks. NaN where a repeat's RDM is constant.
    Source: Nili et al. 2014.
    """
    if (np.ptp(rdms, axis=1) == 0).any():
        return float("nan"), float("nan")
    from rsatoolbox.inference.noise_ceiling import boot_noise_ceiling
    from rsatoolbox.rdm.rdms import RDMs

    with warnings.catch_warnings():
        # That the mean of ranks is not the best RDM for tau-a: our docstring says it.
        warnings.simplefilter("ignore")
        low, high = boot_noise_ceiling(RDMs(rdms), method=METHODS[compare])
    return float(low), float(high)
