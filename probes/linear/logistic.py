"""Multinomial logistic probes of a site, by scikit-learn, one fit per fold and labelling."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from probes.linear.moments import Readout


def logistic(
    x: Float[np.ndarray, "row d"],
    codes: Int[np.ndarray, " row"],
    penalty: float,
    *,
    n_classes: int,
) -> tuple[Readout, bool]:
    """Fit multinomial logistic regression; return its readout and whether it converged.

    Equals scikit-learn's ``LogisticRegression(C=1 / (penalty * e))`` with ``e`` the mean
    eigenvalue of the centred scatter of ``x``, the same relative penalty as in
    `probes.linear.moments`.

    >>> x = np.random.default_rng(0).normal(size=(30, 3))
    >>> readout, converged = logistic(x, np.arange(30) % 2, 0.1, n_classes=2)
    >>> readout(x).shape, converged
    ((30, 1), True)
    """
    origin = x.mean(0)
    weights, offsets = np.zeros((n_classes, x.shape[1])), np.full(n_classes, -np.inf)
    seen, counts = np.unique(codes, return_counts=True)
    spread = float((x - origin).std())
    # Constant up to rounding: only label frequencies can predict.
    if len(seen) < 2 or spread <= 1e-13 * float(np.abs(origin).max()):
        offsets[seen] = np.log(counts / len(codes))
        return Readout(weights[:, :, None], offsets[:, None], origin), True
    model: Any = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-7, max_iter=5000)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit((x - origin) / spread, codes)
    if len(seen) == 2:
        # Two classes have one row of coefficients: plus and minus half of it are equivalent.
        half, offset = model.coef_[0] / 2, model.intercept_[0] / 2
        weights[seen], offsets[seen] = np.stack([-half, half]), [-offset, offset]
    else:
        weights[seen], offsets[seen] = model.coef_, model.intercept_
    converged = not any(issubclass(w.category, ConvergenceWarning) for w in caught)
    return Readout(weights[:, :, None] / spread, offsets[:, None], origin), converged
