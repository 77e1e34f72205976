"""k-means by site: do states at a layer or head cluster by task?

Standard of evidence: agreement of a partition with the labels alone is no evidence. Every score
comes with its null of permuted labels (F1's floor is not 0); rows that share a wording keep a
common label in every relabelling (`probes.design`), the same at every input, so that recognition of
the wording is no evidence of the task. Agreement across wordings (``cross_wording_ari``,
`probes.clustering.agreement`) is 0 on average where states encode only wordings. The default
``given="input"`` clusters the prompts of one input at a time, so that clusters cannot be inputs.
Also compare with the untrained model and with a clustering of the words.

Source: Wu & Varshney (arXiv 2402.12151) score clusters with F1, ARI and AMI; clustering within
input, both readings of F1 and the nulls are our reconstruction.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from joblib import delayed

from lensclust import figures
from lensclust.activations import dataset_sites, labelled, prompt_labels, site_values, stored_values
from lensclust.arguments import checked_arguments
from lensclust.errors import InputError, check_counts
from lensclust.figures import Shown
from lensclust.models import Site, found_device
from lensclust.parallel import in_parallel
from lensclust.progress import progress_bar
from probes.clustering.agreement import CROSS_WORDING, METRICS, SCALES, score_groups
from probes.clustering.kmeans_batched import group_partitions
from probes.design import Centroids, Exchange, Group, Units, against_null, label_groups
from probes.steering import Intervention, Label, shift, transport

log = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class Clustering(Shown):
    """k-means partitions of the activations at each site, scored against labellings.

    Attributes:
        frame: one row per site, labelling and metric: ``site, kind, layer, head, position, by,
            given, metric, value, null_mean, null_std, p, smallest_p, n_groups, exchanged, k``;
            ``exchanged`` names the units of the null, ``smallest_p`` is the smallest possible p.
        groups: the true labels' scores of each group: ``site, kind, layer, head, by, metric,
            group, value`` (``group`` is the value of ``given``).
        centroids: mean state of each label (for each value of ``given``), by variable of the
            activations: ``resid (layer, [given,] label, d_model)``, ``z (block, head, ...)``.
        assignments: cluster of each prompt at each site ``(site, prompt)``; -1 where left out.
            With ``given`` numbers are comparable only within one group.
        left_out: reasons for rows or groups that were not clustered, one sentence each.
        by, given: the labelling and the condition.
        notes: caveats of p, one sentence each.
    """

    frame: pd.DataFrame
    groups: pd.DataFrame
    centroids: xr.Dataset
    assignments: xr.DataArray
    left_out: tuple[str, ...]
    by: str
    given: str | None
    notes: tuple[str, ...] = ()

    def best(self, kind: str = "resid", *, metric: str = "ari") -> Site:
        """The site of a kind with the highest score; ties go to the earliest layer.

        Choose on one set of prompts and report on another: the best of many is biased upwards.
        """
        rows = self._scores(metric)
        rows = rows[rows["kind"] == kind]
        if rows.empty:
            raise InputError(f"best: no site of kind {kind!r}, only {set(self.frame['kind'])}")
        return Site.parse(str(rows.loc[rows["value"].idxmax(), "site"]))

    def transport(self, source: Label, target: Label) -> Intervention:
        """The intervention from one label's clusters to another's.

        `probes.steering.transport` between clusters of one condition where prompts were clustered
        within one, else `probes.steering.shift` by the difference of the mean states.

        Raises:
            InputError: if a label does not exist, or the two share no condition.
        """
        if self.given is None:
            return shift(self.centroids, source, target, by=self.by)
        return transport(self.centroids, source, target, by=self.by, given=self.given)

    def plot(self, metric: str | None = None) -> Any:
        """Score by layer with the band of permuted labels; a heat map for heads.

        Args:
            metric: one of the computed metrics; default the first.
        """
        metric = metric or self._first()
        rows = self._scores(metric)
        charts = [
            figures.curves(
                group,
                title=f"{metric.upper()} of {self.by} clusters, {kind}",
                caption=f"k-means within {self.given}.",
                y_title=metric,
            )
            if group["head"].isna().all()
            else figures.head_map(
                group,
                title=f"{metric.upper()} of {self.by} clusters, {kind}",
                caption=f"k-means within {self.given}.",
            )
            for kind, group in rows.groupby("kind", sort=False)
        ]
        return charts[0] if len(charts) == 1 else figures.stack(charts)

    def __repr__(self) -> str:
        metric = self._first()
        best = self._scores(metric).nlargest(1, "value").iloc[0]
        return (
            f"Clustering(by={self.by!r}, given={self.given!r}, {self.frame['site'].nunique()} "
            f"sites; best {metric.upper()} {best['value']:.2f} at {best['site']}, "
            f"permuted labels {best['null_mean']:.2f})"
        )

    def _tables(self) -> tuple[pd.DataFrame, ...]:
        rows = self._scores(self._first()).nlargest(10, "value")
        return (rows[["site", "metric", "value", "null_mean", "null_std", "p"]],)

    def _first(self) -> str:
        return str(self.frame["metric"].iloc[0])

    def _scores(self, metric: str) -> pd.DataFrame:
        _require_known([metric], tuple(self.frame["metric"].unique()))
        return self.frame[(self.frame["metric"] == metric) & (self.frame["by"] == self.by)]


@checked_arguments
def cluster(
    acts: xr.Dataset,
    *,
    by: str = "task",
    given: str | None = "input",
    k: int | None = None,
    score_against: Sequence[str] | None = None,
    kinds: str | Sequence[str] | None = None,
    position: str | None = None,
    scale: str = "none",
    metrics: str | Sequence[str] = METRICS,
    units: Units = None,
    permutations: int = 100,
    n_init: int = 4,
    seed: int = 0,
    device: str | torch.device | None = None,
    jobs: int = -1,
    progress: bool = True,
) -> Clustering:
    """Cluster the prompts at every site by k-means and score the clusters against a label.

    Args:
        acts: activations from `lensclust.extract`, in memory or opened from disk (then one site
            is read at a time).
        by: the label to score against; a coordinate of ``prompt``.
        given: cluster within each value of this label, and average the scores; None clusters all
            prompts together, where task and input compete.
        k: number of clusters; default the number of ``by`` labels present (in each group).
        score_against: further labels to score the same partitions against; None for none.
        kinds: only these kinds of site (``"resid"``, ``"head"``, ...).
        position: which read position, if the activations hold several.
        scale: ``none``, ``unit`` (rows to unit norm) or ``standard`` (features to unit variance).
        metrics: which scores to compute; ``silhouette`` alone costs more than k-means where many
            rows are clustered together. Those across wordings are left out, with a note, where
            no two wordings share a label.
        units: rows that keep a common label under the null (`probes.design`): a column, several,
            one value per row, or ``"rows"``. Default: those of one wording, from the columns.
        permutations: relabellings in the null, at most all. p is at least
            1 / (permutations + 1) and 1 / the number of distinct relabellings.
        n_init: k-means restarts.
        seed: of k-means and of the permutations.
        device: run k-means there, restarts, groups and sites stacked
            (`probes.clustering.kmeans_batched`); meant for a GPU. Default: scikit-learn on the CPU,
            which is faster there.
        jobs: worker processes (joblib's ``n_jobs``).

    Returns:
        Scores by site: ``ari``, ``ami``, ``pair_f1``, ``matched_f1`` of the partition,
        ``silhouette`` of the labels, and ``cross_wording_ari`` and ``cross_wording_f1`` over rows
        of different wordings, each with its permuted-label null.

    Raises:
        InputError: if a label does not exist or has one value, ``k`` exceeds the rows of every
            group, nothing is left to cluster, a state is not finite, or there is no such device.

    >>> import lensclust as lc
    >>> prompts = lc.tasks.sif().where(split="new_string")
    >>> acts = lc.extract(lc.load("native:sif-small"), prompts, "resid")
    >>> clusters = cluster(acts, by="task", given="input", jobs=1)
    >>> clusters.frame.metric.unique().tolist()
    ['ari', 'ami', 'pair_f1', 'matched_f1', 'silhouette', 'cross_wording_ari', 'cross_wording_f1']
    """
    if scale not in SCALES:
        raise InputError(f"cluster: scale {scale!r} is not known: expected one of {list(SCALES)}")
    check_counts("cluster", permutations=permutations, n_init=n_init)
    check_counts("cluster", least=2, k=k)
    chosen = (metrics,) if isinstance(metrics, str) else tuple(dict.fromkeys(metrics))
    _require_known(chosen, METRICS)
    every = acts.sizes.get("prompt", 0) if isinstance(acts, xr.Dataset) else 0
    kept, unlabelled = labelled("cluster", acts, by=by, given=given, score_against=score_against)
    acts = acts.isel(prompt=kept) if unlabelled else acts
    further = [] if score_against is None else list(score_against)
    labels = {name: prompt_labels(acts, name) for name in dict.fromkeys((by, *further))}
    condition = None if given is None else prompt_labels(acts, given)
    groups, exchanges, left_out = label_groups(
        "cluster",
        labels,
        acts,
        by=by,
        given=given,
        condition=condition,
        k=k,
        units=units,
        permutations=permutations,
        seed=seed,
    )
    left_out = unlabelled + left_out
    notes = _require_scores(chosen, groups, exchanges, by)
    sites = dataset_sites(acts, kinds)
    centroids = Centroids(labels[by], condition, by, given)
    options: dict[str, Any] = {"scale": scale, "n_init": n_init, "seed": seed}
    states = (site_values(acts, site, position=position) for site in sites)
    partitioned: Iterable[tuple[np.ndarray, Any]] = ((values, None) for values in states)
    if device is not None:
        there = found_device(device)
        partitioned = group_partitions(states, groups, device=there, **options)
    calls = (
        delayed(score_groups)(values, groups, metrics=chosen, partitions=found, **options)
        for values, found in partitioned
    )
    work = in_parallel(calls, jobs=jobs)
    rows: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    names = {
        (name, across): [g.name for g in groups if name in (g.crossed if across else g.codes)]
        for name in labels
        for across in (False, True)
    }
    assignments = np.full((len(sites), every), -1, dtype=np.int32)
    place = position or str(acts["position"].values[0])
    with progress_bar("cluster", len(sites), enabled=progress) as advance:
        for index, (site, (scores, found)) in enumerate(zip(sites, work, strict=True)):
            assignments[index, kept] = found
            centroids.add(site, stored_values(acts, site, position=position))
            shared = {"site": str(site), "kind": site.kind, "layer": site.layer, "head": site.head}
            parts += [
                {**shared, "by": name, "metric": metric, "group": group, "value": value}
                for (name, metric), values in scores.items()
                for group, value in zip(
                    names[name, metric in CROSS_WORDING], values[:, 0].tolist(), strict=True
                )
            ]
            shared |= {"position": place, "given": given or "none"}
            rows += [
                shared
                | {"by": name, "metric": metric}
                | against_null(values, exchanges[name], permutations)
                for (name, metric), values in scores.items()
            ]
            advance()
    failed = sum(int((assignments[:, kept[group.rows[0]]] < 0).sum()) for group in groups)
    if failed:
        left_out.append(
            f"{failed} of {len(groups) * len(sites)} partitions scored 0: fewer distinct states "
            "than clusters"
        )
    for reason in left_out:
        log.warning("cluster: %s", reason)
    frame = pd.DataFrame(rows).astype({"head": "Int64"})
    frame["k"] = int(np.median([group.k for group in groups]))
    return Clustering(
        frame=frame,
        groups=pd.DataFrame(parts).astype({"head": "Int64"}),
        centroids=centroids.dataset(acts, sites),
        assignments=xr.DataArray(
            assignments, dims=("site", "prompt"), coords={"site": [str(s) for s in sites]}
        ),
        left_out=tuple(left_out),
        by=by,
        given=given,
        notes=notes,
    )


def _require_scores(
    metrics: Sequence[str], groups: Sequence[Group], exchanges: Mapping[str, Exchange], by: str
) -> tuple[str, ...]:
    """Notes on the null and on undefined metrics; an error if none is defined."""
    notes = [note for exchange in exchanges.values() for note in exchange.notes]
    across = [metric for metric in metrics if metric in CROSS_WORDING]
    for name in exchanges if across else ():
        if any(name in group.crossed for group in groups):
            continue
        reason = f"expected a {name} in two wordings of one group, found none"
        if name == by and len(across) == len(metrics):
            raise InputError(f"cluster: metrics={list(metrics)}: {reason}; choose other metrics")
        notes.append(f"{' and '.join(across)} by {name} left out: {reason}")
    for exchange in exchanges.values():
        if exchange.coarse:
            log.warning("cluster: %s", exchange.coarse)
    return tuple(notes)


def _require_known(given: Sequence[str], known: Sequence[str]) -> None:
    for metric in given:
        if metric not in known:
            raise InputError(f"metric {metric!r} is not known: expected one of {tuple(known)}")
    if not given:
        raise InputError(f"metrics: none given, expected some of {tuple(known)}")
