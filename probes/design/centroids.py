"""Mean states by label, computed site by site so that activations can stay on disk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from scipy import sparse

from lensclust.activations import (
    VARIABLES,
    dataset_sites,
    prompt_labels,
    stored_values,
    with_labels,
)
from lensclust.arguments import checked_arguments
from lensclust.models import Site


class Centroids:
    """Mean states by label (and condition), accumulated site by site."""

    def __init__(
        self, labels: np.ndarray, condition: np.ndarray | None, by: str, given: str | None
    ) -> None:
        names, code = np.unique(labels, return_inverse=True)
        self.coords: dict[str, np.ndarray] = {by: names}
        cell = code
        if condition is not None and given is not None:
            values, outer = np.unique(condition, return_inverse=True)
            self.coords = {given: values, by: names}
            cell = outer * len(names) + code
        self.shape = tuple(map(len, self.coords.values()))
        count = np.bincount(cell, minlength=int(np.prod(self.shape)))
        self.empty = count == 0
        self.average = sparse.csr_array(
            (1 / count[cell], (cell, np.arange(len(cell)))), shape=(len(count), len(cell))
        )
        self.means: dict[Site, np.ndarray] = {}

    def add(self, site: Site, values: np.ndarray) -> None:
        mean = self.average @ values.astype(np.float64)
        mean[self.empty] = np.nan
        self.means[site] = mean.reshape(*self.shape, -1).astype(np.float32)

    def dataset(self, acts: xr.Dataset, sites: Sequence[Site]) -> xr.Dataset:
        variables = {}
        for variable, axis in dict.fromkeys(VARIABLES[site.kind] for site in sites):
            own = [site for site in sites if VARIABLES[site.kind][0] == variable]
            axes = [axis, "head"] if own[0].head is not None else [axis]
            sizes = [acts.sizes[name] for name in axes]
            stacked = np.stack([self.means[site] for site in own])
            coords = {name: acts[name].values for name in axes} | self.coords
            variables[variable] = xr.DataArray(
                stacked.reshape(*sizes, *stacked.shape[1:]),
                dims=(*axes, *self.coords, "d_head" if variable == "z" else "d_model"),
                coords=coords,
            )
        return xr.Dataset(variables)


@checked_arguments
def mean_states(
    acts: xr.Dataset,
    *,
    by: str = "task",
    given: str | None = None,
    kinds: str | Sequence[str] | None = None,
    position: str | None = None,
) -> xr.Dataset:
    """Mean state of each label at every site, within each value of ``given``.

    Returns:
        By variable of the activations: ``resid (layer, [given,] label, d_model)``,
        ``z (block, head, ...)``; NaN where no prompt has that label and value. Prompts without
        a label are left out, with a line in the log.

    Raises:
        InputError: if a label or position does not exist.

    >>> import lensclust as lc
    >>> acts = lc.extract(lc.load("native:sif-small"), lc.tasks.sif().where(split="both"), "resid")
    >>> mean_states(acts, by="task", given="input").resid.dims
    ('layer', 'input', 'task', 'd_model')
    """
    acts = with_labels("mean_states", acts, by=by, given=given)
    condition = None if given is None else prompt_labels(acts, given)
    centroids = Centroids(prompt_labels(acts, by), condition, by, given)
    sites = dataset_sites(acts, kinds)
    for site in sites:
        centroids.add(site, stored_values(acts, site, position=position))
    return centroids.dataset(acts, sites)
