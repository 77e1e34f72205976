"""Erasing what a linear classifier could tell of a label, and the control of doing so.

What an erasure breaks shows that something in the removed directions was used; that it was the
label shows only against the erasure of as many random ones (`erase_random`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import xarray as xr
from concept_erasure import LeaceEraser, LeaceFitter
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformer_lens.utilities.statistics import derive_generator

from lensclust.activations import prompt_labels, stored_values, with_labels
from lensclust.arguments import checked_arguments
from lensclust.sites import Site
from probes.interventions import Edit, Intervention, States


@checked_arguments
def erase(
    acts: xr.Dataset,
    *,
    by: str = "task",
    given: str | None = None,
    position: str | None = None,
    name: str = "erase",
) -> Intervention:
    """Remove what a linear classifier could tell of a label (LEACE, Belrose et al. 2023).

    With ``given`` each condition has an eraser of its own, and a state gets that of the nearest
    condition mean: what is removed is the label *given* the condition.

    Source: arXiv 2306.03819, by the authors' package ``concept-erasure``.
    """
    acts = with_labels("erase", acts, by=by, given=given)
    labels = prompt_labels(acts, by)
    conditions = None if given is None else prompt_labels(acts, given)

    @lru_cache(maxsize=1)
    def edit_at(site: Site) -> Edit:
        x = torch.from_numpy(stored_values(acts, site, position=position).astype(np.float64))

        def fit(rows: np.ndarray) -> Edit:
            if len(np.unique(labels[rows])) == 1:  # nothing to tell, nothing to erase
                return lambda states: states
            fitted = LeaceFitter.fit(x[rows], _one_hot(labels[rows])).eraser
            assert fitted.bias is not None  # it is affine
            left, right, bias = fitted.proj_left, fitted.proj_right, fitted.bias

            def erased(states: States) -> States:
                to = states.device
                return LeaceEraser(left.to(to), right.to(to), bias.to(to))(states)

            return erased

        return _grouped(x, conditions, fit)

    return Intervention(name, edit_at)


@checked_arguments
def erase_random(
    acts: xr.Dataset,
    *,
    by: str = "task",
    given: str | None = None,
    position: str | None = None,
    seed: int = 0,
    name: str = "erase, random subspace",
) -> Intervention:
    """The control of `erase`: project out as many random directions as it removes."""
    acts = with_labels("erase_random", acts, by=by, given=given)
    labels = prompt_labels(acts, by)
    conditions = None if given is None else prompt_labels(acts, given)

    @lru_cache(maxsize=1)
    def edit_at(site: Site) -> Edit:
        x = torch.from_numpy(stored_values(acts, site, position=position).astype(np.float64))
        generator = derive_generator(seed, "subspace", str(site))

        def fit(rows: np.ndarray) -> Edit:
            rank = min(len(np.unique(labels[rows])) - 1, x.shape[1])
            drawn = torch.randn(x.shape[1], rank, generator=generator, dtype=x.dtype)
            basis, mean = torch.linalg.qr(drawn).Q, x[rows].mean(0)

            def projected(states: States) -> States:
                directions, origin = basis.to(states.device), mean.to(states.device)
                return states - (states - origin) @ directions @ directions.T

            return projected

        return _grouped(x, conditions, fit)

    return Intervention(name, edit_at)


def _grouped(
    x: Float[Tensor, "row d"], conditions: np.ndarray | None, fit: Callable[[np.ndarray], Edit]
) -> Edit:
    """One edit fitted on all rows, or one by condition, applied by the nearest condition mean."""
    if conditions is None:
        edit = fit(np.arange(len(x)))
        return lambda states: edit(_exact(states)).to(states)
    rows_of = [np.flatnonzero(conditions == value) for value in np.unique(conditions)]
    means = torch.stack([x[rows].mean(0) for rows in rows_of])
    edits = [fit(rows) for rows in rows_of]

    def by_condition(states: States) -> States:
        given = _exact(states)
        # The device is asked once which condition each row has, not once a condition.
        nearest = torch.cdist(given, means.to(given.device)).argmin(1).cpu()
        out = given.clone()
        for index in nearest.unique().tolist():
            chosen = (nearest == index).nonzero()[:, 0].to(given.device)
            out[chosen] = edits[index](given[chosen])
        return out.to(states)

    return by_condition


def _exact(states: States) -> States:
    """In double precision, where they are if that device has it."""
    return states.double() if states.device.type != "mps" else states.cpu().double()


def _one_hot(labels: np.ndarray) -> Tensor:
    names, code = np.unique(labels, return_inverse=True)
    return F.one_hot(torch.from_numpy(code), len(names)).double()
