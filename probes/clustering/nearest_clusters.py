"""Nearest-centroid classification of new prompts' states by known labels."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from scipy.spatial.distance import cdist

from lensclust.activations import dataset_sites, head_frame, labelled, prompt_labels, site_values
from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from probes.design import mean_states
from probes.steering import states_at

log = logging.getLogger(__name__)


@checked_arguments
def membership(
    acts: xr.Dataset,
    known: xr.Dataset,
    *,
    by: str = "task",
    given: str | None = "input",
    kinds: Any = None,
    position: str | None = None,
) -> pd.DataFrame:
    """Classify prompts by the nearest mean state of known prompts, at every site.

    With ``given``, only means of prompts with the same value of that label compete, so that this
    label cannot decide.

    Args:
        acts: the states to classify.
        known: labelled states for the means, such as those of the training prompts.

    Returns:
        One row per site and prompt: ``site, kind, layer, head, prompt`` (its index in ``acts``),
        ``nearest`` (label of the nearest mean), ``right`` (it is the prompt's own), ``margin``
        (distance to the nearest other label's mean minus that to its own, over their sum; -1
        to 1, positive when right).

    Raises:
        InputError: if a label does not exist, a prompt's own label (within its condition) is
            unknown or the only one, or states are not finite.

    >>> import lensclust as lc
    >>> model, prompts = lc.load("native:sif-small"), lc.tasks.sif(n_tasks=4, strings_per_regex=8)
    >>> known = lc.extract(model, prompts.where(split="train"), "resid")
    >>> new = lc.extract(model, prompts.where(split="new_string"), "resid")
    >>> membership(new, known).groupby("layer").right.mean().between(0, 1).all()
    np.True_
    """
    kept, notes = labelled("membership", acts, by=by, given=given)
    for note in notes:
        log.warning("membership: %s", note)
    acts = acts.isel(prompt=kept) if notes else acts
    labels = prompt_labels(acts, by)
    conditions = None if given is None else prompt_labels(acts, given)
    parts = (
        {"all": np.arange(len(labels))}
        if conditions is None
        else {value: np.flatnonzero(conditions == value) for value in np.unique(conditions)}
    )
    centroids = mean_states(known, by=by, given=given, kinds=kinds, position=position)
    tables = []
    for site in dataset_sites(acts, kinds):
        values = site_values(acts, site, position=position)
        means = states_at(centroids, site)
        if site.kind == "head":  # in the coordinates of `site_values`
            frame = head_frame(acts, site)
            means = means.copy(data=means.values @ frame.transpose("d_head", "rank").values)
        for value, rows in parts.items():
            here = means if given is None else _condition(means, given, value)
            found = ~np.isnan(here.values).any(-1)
            names = here[by].values[found]
            own = labels[rows]
            unknown = np.setdiff1d(own, names)
            if len(unknown) or len(names) < 2:
                raise InputError(
                    f"membership: {given or 'prompts'} {str(value)!r}: known prompts have {by} "
                    f"{names.tolist()}, expected {sorted(set(own.tolist()))} and one other at least"
                )
            distance = cdist(values[rows], here.values[found])
            is_own = own[:, None] == names
            to_own = distance[is_own]
            to_other = np.where(is_own, np.inf, distance).min(1)
            tables.append(
                pd.DataFrame(
                    {
                        "site": str(site),
                        "kind": site.kind,
                        "layer": site.layer,
                        "head": site.head,
                        "prompt": kept[rows],
                        "nearest": names[distance.argmin(1)],
                        "right": to_own < to_other,
                        "margin": (to_other - to_own) / np.maximum(to_other + to_own, 1e-12),
                    }
                )
            )
    return pd.concat(tables, ignore_index=True).astype({"head": "Int64"})


def _condition(means: xr.DataArray, given: str, value: str) -> xr.DataArray:
    if value not in means[given].values:
        raise InputError(f"membership: no known prompt has {given} {str(value)!r}")
    return means.sel({given: value})
