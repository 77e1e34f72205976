"""Scores at the best layer, with a bootstrap over inputs and wordings.

The best of many sites is biased upwards on the data that chose it: here no group of prompts helps
to choose its own site. Intervals are over groups (inputs) and wordings, which are crossed: both
are drawn with replacement, wordings within tasks, the same for every source of states, so that
differences are paired.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.stats import rankdata

from lensclust.results import Mean, Scale, agreement, correlation, estimate_of
from probes.clustering import counted_agreement
from studies.scales import AGREED
from studies.scores import where

if TYPE_CHECKING:
    import xarray as xr

DRAWS = 500


@dataclass(frozen=True)
class Source:
    """Scores of one source of states, by group, with their partitions.

    Attributes:
        name: of the model, the words or a control.
        seed: of the control.
        groups: rows ``site, kind, by, metric, group, value``.
        clusters: ``(site, prompt)`` with the labels of the prompts; -1 where not clustered.
        given: the label whose values are the groups.
    """

    name: str
    seed: int
    groups: pd.DataFrame
    clusters: xr.DataArray
    given: str


def chosen_sites(groups: pd.DataFrame, metric: str, *, kind: str = "resid") -> dict[str, str]:
    """Site of each group, chosen by the mean score over the other half of the groups.

    >>> rows = [{"metric": "ari", "kind": "resid", "by": "task", "group": group, "site": site,
    ...          "value": value} for group, site, value in
    ...         [("x", "a", 1.0), ("x", "b", 0.0), ("y", "a", 0.0), ("y", "b", 1.0)]]
    >>> chosen_sites(pd.DataFrame(rows), "ari")
    {'x': 'b', 'y': 'a'}
    """
    task = where(groups, metric=metric, kind=kind, by="task")
    names = sorted(task["group"].unique())
    found = {}
    for own, other in ((names[::2], names[1::2]), (names[1::2], names[::2])):
        rows = where(task, group=other or own)
        best = str(rows.groupby("site")["value"].mean().idxmax())
        found |= dict.fromkeys(own, best)
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Redrawn:
    """Agreement across wordings of each group, observed and in each bootstrap draw.

    Attributes:
        value: ``(group)``.
        draws: ``(draw, group)``, with resampled wordings.
        counts: ``(draw, group)``, how often a group was drawn.
        names: of the groups.
        n: units of the rarer kind, for the degrees of freedom.
        widened: factor of the variance: drawing k units with replacement gives (k - 1) / k of it.
        scale: with the step of one wording that clusters otherwise, at every input.
    """

    value: Float[np.ndarray, " group"]
    draws: Float[np.ndarray, "draw group"]
    counts: Float[np.ndarray, "draw group"]
    names: tuple[str, ...]
    n: int
    widened: float
    scale: Scale

    def mean(self) -> Mean:
        """The mean over groups, with an interval over groups and wordings."""
        drawn = (self.counts * self.draws).sum(1) / np.maximum(self.counts.sum(1), 1)
        error = drawn[self.counts.sum(1) > 0].std(ddof=1) * math.sqrt(self.widened)
        return estimate_of(float(self.value.mean()), float(error), self.n, scale=self.scale)

    def above(self, other: Redrawn, *, least: float = 0.0) -> Mean:
        """The difference from another source over the same groups and draws.

        Args:
            least: a lower mean of the other counts as this value: a score below chance leaves no
                more to explain than chance.
        """
        shared = [name for name in self.names if name in other.names]
        own, its = (each.of(shared) for each in (self, other))
        total = np.maximum(own.counts.sum(1, keepdims=True), 1)
        drawn = [(own.counts * each.draws).sum(1) / total[:, 0] for each in (own, its)]
        its_mean = max(float(its.value.mean()), least)
        drawn[1] = np.maximum(drawn[1], least)
        differences = (drawn[0] - drawn[1])[own.counts.sum(1) > 0]
        error = float(differences.std(ddof=1)) * math.sqrt(own.widened)
        return estimate_of(float(own.value.mean()) - its_mean, error, own.n, scale=own.scale.gain)

    def of(self, names: Sequence[str]) -> Redrawn:
        """The groups with these names."""
        at = [self.names.index(name) for name in names]
        fewest = min(self.n, len(at))
        return replace(
            self,
            value=self.value[at],
            draws=self.draws[:, at],
            counts=self.counts[:, at],
            names=tuple(names),
            n=fewest,
            widened=max(self.widened, _widened(len(at))),
        )


def redrawn(
    source: Source,
    sites: dict[str, str],
    *,
    by: str = "task",
    wording: str = "instruction",
    seed: int = 0,
) -> Redrawn:
    """Agreement across wordings at each group's site, with bootstrap draws.

    Args:
        sites: group -> site.
        by: the label to agree with.
        wording: the label of a prompt's wording.
        seed: of the draws: the same for equal groups and wordings.
    """
    rng = np.random.default_rng(seed)
    labels = {name: _codes(source.clusters[name].values) for name in (by, "task", wording)}
    group = source.clusters[source.given].values.astype(str)
    of_wording = pd.Series(labels["task"]).groupby(labels[wording]).first().to_numpy()
    drawn = np.zeros((DRAWS, len(of_wording)))
    fewest = len(of_wording)
    for task in np.unique(of_wording):
        places = np.flatnonzero(of_wording == task)
        fewest = min(fewest, len(places))
        drawn[:, places] = rng.multinomial(
            len(places), np.full(len(places), 1 / len(places)), size=DRAWS
        )
    names = tuple(sites)
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=DRAWS)
    values, draws = np.zeros(len(names)), np.zeros((DRAWS, len(names)))
    for place, name in enumerate(names):
        rows = np.flatnonzero(group == name)
        found = source.clusters.sel(site=sites[name]).values[rows]
        kept = rows[found >= 0]
        if len(kept) == 0:  # fewer distinct states than clusters
            continue
        parts = (found[found >= 0], labels[by][kept], labels[wording][kept])
        values[place] = counted_agreement(*parts, np.ones((1, len(kept))))[0]
        draws[:, place] = counted_agreement(*parts, drawn[:, labels[wording][kept]])
    n_tasks = len(np.unique(of_wording))
    return Redrawn(
        values,
        draws,
        counts.astype(float),
        names,
        n=min(len(names), len(of_wording) - n_tasks + 1),
        widened=max(_widened(len(names)), _widened(fewest)),
        scale=agreement(of=len(of_wording)),
    )


def over_seeds(parts: Sequence[Redrawn]) -> Redrawn:
    """The mean over several controls that read the same groups."""
    return replace(
        parts[0],
        value=np.mean([part.value for part in parts], axis=0),
        draws=np.mean([part.draws for part in parts], axis=0),
    )


def agreed_at(sources: Sequence[Source], *, kind: str = "resid", **options: Any) -> Redrawn:
    """Agreement of one source (over all its seeds) at sites chosen on other groups."""
    return over_seeds(
        [
            redrawn(source, chosen_sites(source.groups, AGREED, kind=kind), **options)
            for source in sources
        ]
    )


def with_depth(source: Source) -> Redrawn:
    """Rank correlation of agreement with layer in each group, over the same draws."""
    groups = where(source.groups, metric=AGREED, by="task", kind="resid")
    sites = groups.sort_values("layer")["site"].drop_duplicates()
    names = sorted(groups["group"].unique())
    layers = [redrawn(source, dict.fromkeys(names, str(site))) for site in sites]
    return replace(
        layers[0],
        value=_with_place(np.stack([layer.value for layer in layers])),
        draws=_with_place(np.stack([layer.draws for layer in layers])),
        scale=correlation(of=len(layers)),
    )


def _with_place(values: np.ndarray) -> np.ndarray:
    """Spearman's rho of values with their index on the first axis; 0 where constant."""
    ranks = rankdata(values, axis=0) - (len(values) + 1) / 2
    place = np.arange(len(values)) - (len(values) - 1) / 2
    size = np.sqrt((ranks**2).sum(0) * (place**2).sum())
    return np.tensordot(place, ranks, 1) / np.where(size > 0, size, np.inf)


def _widened(k: int) -> float:
    return k / (k - 1) if k > 1 else math.inf


def _codes(values: np.ndarray) -> Int[np.ndarray, " prompt"]:
    return np.unique(values.astype(str), return_inverse=True)[1].ravel()
