"""Gated interventions: edit only the states that lie in the source task's cluster.

When steering a running model, the task of a prompt is unknown. An ungated intervention changes
every prompt and damages other tasks; a gate decides by the state.

Standard of evidence: the effect of the gated intervention on prompts of *other* labels, beside that
without the gate, on states that the gate was not fitted on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from lensclust.activations import prompt_labels, stored_values, with_labels
from lensclust.errors import InputError
from lensclust.models import Site
from lensclust.prompts import label_text
from probes.design import mean_states
from probes.steering.interventions import (
    Edit,
    Intervention,
    Label,
    States,
    require_labels,
    states_at,
)


def only_members(
    intervention: Intervention,
    centroids: xr.Dataset,
    source: Label,
    *,
    by: str = "task",
    given: str | None = None,
    name: str | None = None,
) -> Intervention:
    """Edit only states whose nearest label mean is the source's; keep all others.

    Args:
        intervention: what to do with the source's states.
        centroids: mean states of all expected labels (`probes.design.mean_states`), also by
            ``given`` if that is named: then a state is edited if the nearest of all means is the
            source's under any condition.
        source: the label whose states are moved.

    Raises:
        InputError: at the call if the label does not exist or is the only one; when it is used
            if the site does not exist.

    >>> import lensclust as lc
    >>> from probes import shift
    >>> acts = lc.extract(lc.load("native:sif-small"), lc.tasks.sif().where(split="both"), "resid")
    >>> means, site = mean_states(acts), Site("resid", 3)
    >>> gated = only_members(shift(means, "0", "1"), means, "0")
    >>> states = torch.from_numpy(means.resid.sel(layer=3).values)  # a mean is nearest to itself
    >>> gated.size(states, site).gt(0).tolist() == [True] + 9 * [False]
    True
    """
    (place,) = require_labels(centroids, by, source)
    if len(centroids[by]) < 2:
        raise InputError(f"only_members: {by} {source!r} is the only label, expected another")
    if given is not None and given not in centroids.dims:
        raise InputError(f"only_members: these means are not by {given!r}: {list(centroids.dims)}")

    def edit_at(site: Site) -> Edit:
        values = states_at(centroids, site)
        axes = [axis for axis in (given, by) if axis is not None]
        if set(values.dims[:-1]) != set(axes):
            raise InputError(f"only_members: means by {values.dims[:-1]}, expected by {axes}")
        values = values.transpose(*axes, ...)
        means = values.values.reshape(-1, values.shape[-1])
        owner = np.broadcast_to(np.arange(len(values[by])), values.shape[:-1]).ravel() == place
        known = np.isfinite(means).all(-1)
        points = torch.from_numpy(means[known].astype(np.float32))
        is_source = torch.from_numpy(owner[known])

        def inside(states: States) -> Tensor:
            nearest = torch.cdist(states.float(), points.to(states.device)).argmin(1)
            return is_source.to(states.device)[nearest]

        return _where(inside, intervention.edit_at(site))

    name = name or f"{intervention.name}, members"
    return Intervention(name, edit_at, intervention.by_row)


def only_near(
    intervention: Intervention,
    acts: xr.Dataset,
    source: Label,
    target: Label,
    *,
    by: str = "task",
    given: str | None = None,
    position: str | None = None,
    name: str | None = None,
) -> Intervention:
    """Edit only states as near to the source's mean as the source's own states.

    It needs no other labels. A state is near if its squared distance to the nearest source mean
    (one for each value of ``given``) is below the midpoint of the typical distances of the
    source's states (each left out of its mean) and of the target's. A mean of one state gives no
    typical distance; where all are such, it is 0.

    Args:
        intervention: what to do with the source's states.
        acts: states of both labels, such as those of a few examples.

    Raises:
        InputError: if a label does not exist or both are the same.
    """
    acts = with_labels("only_near", acts, by=by, given=given)
    labels = prompt_labels(acts, by)
    source, target = label_text(source), label_text(target)
    for label in (source, target):
        if label not in labels:
            known = np.unique(labels).tolist()
            raise InputError(f"only_near: {by} {label!r} is not in these activations: {known}")
    if source == target:
        raise InputError(f"only_near: {by} {source!r} given twice: expected two labels")
    own = acts.isel(prompt=np.flatnonzero(labels == source))
    means = mean_states(own, by=by, given=given, position=position)
    conditions = None if given is None else prompt_labels(own, given)
    cell = np.zeros(own.sizes["prompt"], dtype=int)
    if conditions is not None:
        cell = np.unique(conditions, return_inverse=True)[1]
    count = np.bincount(cell)[cell]
    theirs = acts.isel(prompt=np.flatnonzero(labels == target))

    def edit_at(site: Site) -> Edit:
        found = states_at(means, site).sel({by: source})
        points = torch.from_numpy(np.atleast_2d(found.values).astype(np.float32))
        mine = torch.from_numpy(stored_values(own, site, position=position)).float()
        others = torch.from_numpy(stored_values(theirs, site, position=position)).float()
        # Leaving a state out of a mean of m moves the mean by 1 / (m - 1) of its distance.
        stretch = torch.from_numpy((count / np.maximum(count - 1, 1)) ** 2)
        away = ((mine - points[cell]) ** 2).sum(1) * stretch
        several = torch.from_numpy(count > 1)
        usual = float(away[several].mean()) if bool(several.any()) else 0.0
        radius = (usual + float((_distance(others, points) ** 2).mean())) / 2

        def inside(states: States) -> Tensor:
            return _distance(states.float(), points.to(states.device)) ** 2 < radius

        return _where(inside, intervention.edit_at(site))

    return Intervention(name or f"{intervention.name}, near", edit_at, intervention.by_row)


def _distance(states: States, points: Float[Tensor, "point d"]) -> Float[Tensor, " row"]:
    return torch.cdist(states, points).amin(1)


def _where(inside: Callable[[States], Tensor], edit: Edit) -> Edit:
    return lambda states: torch.where(inside(states)[:, None], edit(states), states)
