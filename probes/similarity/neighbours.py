"""Nearest-neighbour accuracy and silhouettes of labels at every site.

Standard of evidence: each score comes with its null of permuted labels, in which rows of one
wording keep a common label (`probes.design`), and neighbours must have another template (or other
``apart`` labels), so that a shared wording cannot reveal the task.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float, Int

from lensclust.activations import dataset_sites, prompt_labels, site_values, with_labels
from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.models import found_device
from lensclust.progress import followed
from probes.arrays import host, namespace, placed
from probes.clustering import SCALES, label_silhouettes
from probes.design import Units, against_null, exchangeable, label_groups, require_two_values

log = logging.getLogger(__name__)

BLOCK = 2048


@checked_arguments
def nearest_neighbour(
    acts: xr.Dataset,
    *,
    target: str = "task",
    k: int = 1,
    apart: str | Sequence[str] | None = "template",
    per: str | None = None,
    kinds: str | Sequence[str] | None = None,
    position: str | None = None,
    units: Units = None,
    permutations: int = 100,
    seed: int = 0,
    device: Any = None,
    progress: bool = True,
) -> pd.DataFrame:
    """k-nearest-neighbour accuracy for a label at every site, over different wordings.

    A prompt's nearest neighbours (cosine) are searched only among prompts that differ from it in
    every ``apart`` label (None for none), so that a shared wording (or input) cannot reveal the
    task. It is right if most of the ``k`` have its label; ties between labels go to the one with
    the nearest neighbour, and equally near prompts keep the order of the activations. With
    ``k=10`` and ``target="task"`` this is the task decodability of Han et al. (arXiv 2412.12276),
    over different wordings.

    With ``per``, accuracy is given for each value of that label (neighbours still come from all
    prompts). With ``device`` the search runs there (`probes.arrays`), in the same precision.
    ``progress`` shows a bar. ``units`` are the prompts that keep a common label under the null: a
    column, several, one value per prompt or ``"rows"``; by default those of one wording, from the
    columns (`probes.design`).

    Returns:
        One row per site (and group): ``site, kind, layer, head, by, metric, group, value,
        null_mean, null_std, p, smallest_p, exchanged``, the metric being ``1nn_accuracy``,
        ``10nn_accuracy``, ...; ``exchanged`` names the units of the null. ``p`` is that of the
        accuracy in which every unit weighs equally, whatever its number of prompts.

    Raises:
        InputError: if a label does not exist, the target has one value, a prompt has fewer than
            ``k`` neighbours left, a state is not finite, or there is no such device.

    >>> import lensclust as lc
    >>> acts = lc.extract(lc.load("native:sif-small"), lc.tasks.sif().where(split="both"), "resid")
    >>> scores = nearest_neighbour(acts, target="input", apart="template")
    >>> bool(scores.value[0] > 2 * scores.null_mean[0])  # the last token's embedding is the input's
    True
    """
    if permutations < 2 or k < 1:
        raise InputError(
            "nearest_neighbour: expected permutations of at least 2 and k of at least 1, given "
            f"{permutations}, {k}"
        )
    if isinstance(acts, xr.Dataset) and k >= acts.sizes.get("prompt", 0):
        raise InputError(
            f"nearest_neighbour: k={k}, but of {acts.sizes.get('prompt', 0)} prompts each has one "
            "neighbour fewer"
        )
    acts = with_labels("nearest_neighbour", acts, target=target, apart=apart, per=per)
    values = prompt_labels(acts, target)
    require_two_values("nearest_neighbour", target, values)
    labels = _codes(values)
    names = [apart] if isinstance(apart, str) else list(() if apart is None else apart)
    groups = np.stack(
        [np.arange(len(labels)), *(_codes(prompt_labels(acts, name)) for name in names)]
    )
    parts = {"all": np.arange(len(labels))}
    if per is not None:
        wanted = prompt_labels(acts, per)
        parts = {str(value): np.flatnonzero(wanted == value) for value in np.unique(wanted)}
    exchange = exchangeable(values, acts, by=target, units=units, call="nearest_neighbour")
    labellings = exchange.labellings(permutations, seed=seed)
    if exchange.coarse:
        log.warning("nearest_neighbour: %s", exchange.coarse)
    there = None if device is None else found_device(device)
    rows: list[dict[str, Any]] = []
    sites = dataset_sites(acts, kinds)
    for site in followed("nearest_neighbour", sites, enabled=progress):
        nearest = neighbours(site_values(acts, site, position=position), groups, k, there)
        right = np.stack([vote(codes[nearest]) == codes for codes in labellings])
        place = {"site": str(site), "kind": site.kind, "layer": site.layer, "head": site.head}
        for name, members in parts.items():
            found = right[:, members]
            unit = exchange.unit[members]
            share = 1 / np.bincount(unit)[unit]
            scores = against_null(
                found.mean(1)[None], exchange, permutations, tested=found @ (share / share.sum())
            )
            del scores["n_groups"]
            rows.append(
                {**place, "by": target, "metric": f"{k}nn_accuracy", "group": name} | scores
            )
    return pd.DataFrame(rows).astype({"head": "Int64"})


@checked_arguments
def silhouettes(
    acts: xr.Dataset,
    *,
    by: str = "task",
    given: str | None = "input",
    kinds: str | Sequence[str] | None = None,
    position: str | None = None,
    scale: str = "none",
    units: Units = None,
    permutations: int = 100,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Silhouette of a label at every site, without k-means.

    The rows of `cluster` for its metric ``silhouette``, without a partition (Rousseeuw 1987;
    Euclidean, over at most 1,000 evenly spaced rows of a group).

    Args:
        by: the label to score; a coordinate of ``prompt``.
        given: score prompts within each value of this label, and average; None scores all prompts
            together.
        scale: ``none``, ``unit`` (rows to unit norm: cosine geometry) or ``standard``.
        units: rows that keep a common label under the null, as in `cluster`.
        permutations: relabellings in the null; p is at least 1 / (permutations + 1).
        progress: show a bar.

    Returns:
        One row per site: ``site, kind, layer, head, by, given, metric, value, null_mean, null_std,
        p, smallest_p, n_groups, exchanged``.

    Raises:
        InputError: if a label does not exist or has one value, no group holds two labels with
            two rows each, or a state is not finite.

    >>> import lensclust as lc
    >>> acts = lc.extract(lc.load("native:sif-small"), lc.tasks.sif().where(split="both"), "resid")
    >>> scores = silhouettes(acts, by="input", given=None)
    >>> bool(scores.value[0] > 0.3 > scores.null_mean[0])  # the last token is the input's
    True
    """
    if scale not in SCALES:
        raise InputError(f"silhouettes: scale {scale!r} is not known: expected {list(SCALES)}")
    if permutations < 1:
        raise InputError(f"silhouettes: permutations={permutations}, expected at least 1")
    acts = with_labels("silhouettes", acts, by=by, given=given)
    condition = None if given is None else prompt_labels(acts, given)
    groups, exchanges, left_out = label_groups(
        "silhouettes",
        {by: prompt_labels(acts, by)},
        acts,
        by=by,
        given=given,
        condition=condition,
        units=units,
        permutations=permutations,
        seed=seed,
    )
    exchange = exchanges[by]
    for reason in (*left_out, exchange.coarse) if exchange.coarse else left_out:
        log.warning("silhouettes: %s", reason)
    rows: list[dict[str, Any]] = []
    sites = dataset_sites(acts, kinds)
    for site in followed("silhouettes", sites, enabled=progress):
        x = site_values(acts, site, position=position)
        scores = [label_silhouettes(SCALES[scale](x[group.rows]), group)[by] for group in groups]
        place = {"site": str(site), "kind": site.kind, "layer": site.layer, "head": site.head}
        shared = {"by": by, "given": given or "none", "metric": "silhouette"}
        rows.append(place | shared | against_null(np.stack(scores), exchange, permutations))
    return pd.DataFrame(rows).astype({"head": "Int64"})


def neighbours(
    x: Float[np.ndarray, "row d"],
    groups: Int[np.ndarray, "grouping row"],
    k: int = 1,
    device: Any = None,
) -> Int[np.ndarray, "row k"]:
    """Indices of each row's nearest rows (cosine) that share no group with it, nearest first.

    Raises:
        InputError: if fewer than ``k`` rows share no group with a row.

    >>> neighbours(np.array([[1.0, 0], [1, 0.1], [0.5, 1]]), np.array([[0, 0, 1]])).tolist()
    [[2], [2], [1]]
    """
    unit = placed(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12), device)
    apart, xp = placed(groups, device), namespace(unit)
    nearest = np.empty((len(x), k), dtype=np.int64)
    for start in range(0, len(x), BLOCK):
        part = slice(start, start + BLOCK)
        likeness = unit[part] @ unit.T
        for group in apart:
            likeness[group[part, None] == group[None]] = -np.inf
        left = xp.isfinite(likeness).sum(1)
        if left.min() < k:
            row = int(left.argmin())
            raise InputError(
                f"neighbours: {left[row] or 'none'} {'is' if left[row] < 2 else 'are'} left for "
                f"row {start + row}, expected at least k={k} rows that share no group with it"
            )
        here = placed(np.arange(len(likeness)), device)
        # k passes that each take the first maximum: unlike a partial sort, ties keep their order.
        for rank in range(k):
            found = likeness.argmax(1)
            nearest[part, rank], likeness[here, found] = host(found), -np.inf
    return nearest


def vote(labels: Int[np.ndarray, "row k"]) -> Int[np.ndarray, " row"]:
    """Most frequent label of each row; ties go to the first.

    >>> vote(np.array([[2, 0, 0], [2, 0, 1]])).tolist()
    [0, 2]
    """
    rows = np.arange(len(labels))
    counts = np.zeros((len(labels), int(labels.max()) + 1), dtype=np.int64)
    for column in labels.T:
        counts[rows, column] += 1
    first = counts[rows[:, None], labels].argmax(1)
    return labels[rows, first]


def _codes(labels: np.ndarray) -> Int[np.ndarray, " row"]:
    return np.unique(labels, return_inverse=True)[1]
