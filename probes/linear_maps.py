"""Linear maps from one label's cluster to another's: moves that depend on where a state lies.

`probes.interventions.shift` moves every state alike and `transport` looks up the nearest mean it
knows. A linear map lies between the two: it moves unlike states differently, and also those of
conditions that it was not fitted on.

- ``ridge``: how far a condition's mean moves from source to target, predicted from the source's
  states by ridge regression. An infinite penalty leaves the mean of those moves.
- ``gaussian``: the optimal transport map between two normal distributions, which gives the moved
  source the target's mean and covariance at the least mean squared distance. Equal covariances
  leave the shift of the mean.

Both are fitted in float64 and applied in float32 (or the states' own precision, if higher).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import xarray as xr

from lensclust.activations import prompt_labels, stored_values, with_labels
from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.labels import label_text
from lensclust.sites import Site
from probes.interventions import Edit, Intervention, Label
from probes.map_fits import LinearMap, condition_means, gaussian_map, ridge_map

KINDS = ("ridge", "gaussian")


@checked_arguments
def linear_transport(
    acts: xr.Dataset,
    source: Label,
    target: Label,
    *,
    by: str = "task",
    given: str = "input",
    fit: str = "ridge",
    penalty: float | int | None = 1e-2,
    position: str | None = None,
    name: str | None = None,
) -> Intervention:
    """Move states by a linear map fitted between two labels' states.

    Args:
        acts: states whose labels make the clusters, such as those of the training prompts.
        by: the label that ``source`` and ``target`` are values of.
        given: the condition (such as the input) that pairs the two labels' states; ``ridge``
            only. Each source state is paired with the move of its condition's mean, so a map
            that fits perfectly keeps each state's place around its mean; conditions count
            alike, however many states they have.
        fit: ``ridge`` or ``gaussian``.
        penalty: of the ridge, in units of the mean eigenvalue of the source's covariance;
            infinity is allowed. None: at each site the one of `probes.map_fits.PENALTIES` that
            predicts best the moves of conditions left out in turn (ties go to the largest).
            It falls back on the mean shift where moves of new conditions cannot be predicted,
            as with fewer than three shared conditions; the least squared error need not move
            the most answers (`probes.validation.tune` counts those).
            ``edit_at(site).penalty`` tells which it was.
        position: which read position, if the activations hold several.

    Returns:
        The intervention; at each site ``edit_at`` gives a `LinearMap`. It is fitted when a site
        is first used, in time ``O(n² d)`` and memory ``O(n d)`` for ``n`` states.

    Raises:
        InputError: at the call if a label, fit or penalty is not known or no condition is
            shared; when a site is used if it is not there, or the source's
            covariance is singular (``gaussian``: fewer than three different states).

    Source: the Gaussian map is Knott & Smith 1984, for steering Singh et al. 2024 (arXiv
    2402.09631), with covariances shrunk as in Ledoit & Wolf 2004.

    >>> import torch, lensclust as lc
    >>> acts = lc.extract(lc.load("native:sif-small"), lc.tasks.sif().where(split="both"), "resid")
    >>> there = linear_transport(acts, "0", "1", fit="gaussian").edit_at(Site("resid", 3))
    >>> moved = there(torch.from_numpy(stored_values(acts, Site("resid", 3))[acts.task == 0]))
    >>> theirs = stored_values(acts, Site("resid", 3))[acts.task == 1]
    >>> bool(np.allclose(moved.mean(0), theirs.mean(0), atol=1e-5))
    True
    """
    if fit not in KINDS:
        raise InputError(f"linear_transport: fit {fit!r} is not known: expected one of {KINDS}")
    if penalty is not None and not penalty > 0:
        raise InputError(f"linear_transport: penalty={penalty}, expected a number above 0")
    pairing = {"given": given} if fit == "ridge" else {}
    acts = with_labels("linear_transport", acts, by=by, **pairing)
    labels = prompt_labels(acts, by)
    source, target = label_text(source), label_text(target)
    for label in (source, target):
        if label not in labels:
            known = np.unique(labels).tolist()
            raise InputError(
                f"linear_transport: {by} {label!r} is not in these activations: they have {known}"
            )
    if source == target:
        raise InputError(f"linear_transport: {by} {source!r} given twice: expected two labels")
    rows_a, rows_b = (np.flatnonzero(labels == label) for label in (source, target))

    def states(rows: np.ndarray, site: Site) -> np.ndarray:
        return stored_values(acts.isel(prompt=rows), site, position=position).astype(np.float64)

    def gaussian(site: Site) -> LinearMap:
        start, stop = states(rows_a, site), states(rows_b, site)
        return gaussian_map(start, stop, where=f"of {by} {source!r} at {str(site)!r}")

    def ridge() -> Callable[[Site], LinearMap]:
        conditions = prompt_labels(acts, given)
        shared = np.intersect1d(conditions[rows_a], conditions[rows_b])
        if len(shared) == 0:
            raise InputError(f"linear_transport: {source!r} and {target!r} share no {given}")
        kept = [rows[np.isin(conditions[rows], shared)] for rows in (rows_a, rows_b)]
        codes = [np.searchsorted(shared, conditions[rows]) for rows in kept]

        def at(site: Site) -> LinearMap:
            start, stop = (states(rows, site) for rows in kept)
            moves = condition_means(stop, codes[1]) - condition_means(start, codes[0])
            return ridge_map(start, moves, codes[0], penalty)

        return at

    fitted = gaussian if fit == "gaussian" else ridge()

    @cache
    def edit_at(site: Site) -> Edit:
        return fitted(site)

    return Intervention(name or f"{fit} map", edit_at)
