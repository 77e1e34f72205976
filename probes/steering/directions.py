"""Interventions along one direction: between two means, of a probe, or a given vector.

`probes.steering.shift` moves every state by the same amount; `project` moves each to the same
coordinate, so that a state already there is unchanged: projecting twice equals projecting once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lensclust.arguments import checked_arguments, numbers
from lensclust.errors import InputError
from lensclust.models import Site
from probes.steering.interventions import (
    Edit,
    Intervention,
    Label,
    States,
    require_labels,
    states_at,
)

Vector = Float[np.ndarray, " d"] | Float[Tensor, " d"]


@checked_arguments
def project(
    centroids: xr.Dataset, source: Label, target: Label, *, by: str = "task", name: str = "project"
) -> Intervention:
    """Set the coordinate along the difference of two labels' means to the target's.

    With ``u`` the unit difference and ``p`` the target mean's coordinate along it, a state ``x``
    becomes ``x + (p - x·u) u``; components orthogonal to ``u`` are unchanged. Equal means leave
    states unchanged.

    Args:
        centroids: mean states by label (`probes.design.mean_states`). With a condition
            beside the label, means are averaged over the conditions that both labels have.

    Raises:
        InputError: at the call if a label does not exist; when it is used if the site does not
            exist or the two labels share no condition.

    Source: Stolfo et al. 2024 (arXiv 2410.12877), where the source is the same prompts without
    the instruction.

    >>> import lensclust as lc
    >>> from probes import mean_states
    >>> acts = lc.extract(lc.load("native:sif-small"), lc.tasks.sif().where(split="both"), "resid")
    >>> move, site = project(mean_states(acts), "0", "1"), Site("resid", 3)
    >>> once = move.edit_at(site)(torch.randn(4, 64))
    >>> bool((move.size(once, site) < 1e-5).all())  # already there
    True
    """
    places = require_labels(centroids, by, source, target)

    def edit_at(site: Site) -> Edit:
        values = states_at(centroids, site)
        start, stop = (values.isel({by: place}) for place in places)
        # A condition with only one of the two labels would bias the difference.
        both = np.isfinite(start) & np.isfinite(stop)
        others = [d for d in start.dims if d != values.dims[-1]]
        if not both.any():
            raise InputError(f"project: {source!r} and {target!r} share no {', '.join(others)}")
        begin, end = (
            torch.from_numpy(np.asarray(mean.where(both).mean(others), dtype=np.float64))
            for mean in (start, stop)
        )
        unit = F.normalize(end - begin, dim=0)
        return _onto(unit.float(), float(end @ unit))

    return Intervention(name, edit_at)


def _onto(unit: Tensor, coordinate: float) -> Edit:
    def edit(states: States) -> States:
        exact = torch.promote_types(states.dtype, torch.float32)
        x, along = states.to(exact), unit.to(states.device, exact)
        # A zero direction (equal means) changes nothing.
        return (x + (coordinate - x @ along)[:, None] * along).to(states)

    return edit


@checked_arguments
def add_direction(
    vectors: Vector | Mapping[Any, Vector], *, name: str = "add direction"
) -> Intervention:
    """Add a given vector: a probe's direction, a function vector, a feature.

    Args:
        vectors: one vector, added at every site of its width, or one for each site (a
            `Site` or its name). It is added unscaled, so its norm is the strength: scale a unit
            direction (`Intervention.scaled`) to the norm of the states. At heads it is in
            ``hook_z``, as `probes.linear.ProbeSweep.direction` gives it.

    Raises:
        InputError: at the call if a vector is not one finite row of numbers; when it is used if
            there is none for the site or its length is not that of the states.

    >>> states = torch.zeros(2, 3)
    >>> push = add_direction(np.array([0.0, 3.0, 4.0])).scaled(2)
    >>> push.edit_at(Site("resid", 0))(states).tolist(), push.size(states, Site("mlp_out", 1))
    ([[0.0, 6.0, 8.0], [0.0, 6.0, 8.0]], tensor([10., 10.]))
    """
    if isinstance(vectors, Mapping):
        by_site = {
            site if isinstance(site, Site) else Site.parse(str(site)): _checked(vector, str(site))
            for site, vector in vectors.items()
        }
        common = None
    else:
        by_site, common = {}, _checked(vectors, "every site")

    def edit_at(site: Site) -> Edit:
        vector = by_site.get(site, common)
        if vector is None:
            known = [str(place) for place in by_site]
            raise InputError(f"add_direction: no vector for site {str(site)!r}: given {known}")

        def edit(states: States) -> States:
            if states.shape[-1] != len(vector):
                raise InputError(
                    f"add_direction: a vector of {len(vector)} numbers at {str(site)!r}, whose "
                    f"states have {states.shape[-1]}"
                )
            return states + vector.to(states)

        return edit

    return Intervention(name, edit_at)


def _checked(vector: Any, where: str) -> Tensor:
    values = torch.from_numpy(numbers("add_direction", f"the vector for {where}", vector)).float()
    if values.ndim != 1 or not bool(values.isfinite().all()):
        raise InputError(
            f"add_direction: the vector for {where} has shape {tuple(values.shape)} and "
            f"{int((~values.isfinite()).sum())} numbers that are not finite, expected one row"
        )
    return values
