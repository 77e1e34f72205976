"""Similarity of states: are a prompt's nearest neighbours prompts of the same task?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float, Int

from lensclust.activations import dataset_sites, prompt_labels, site_values
from lensclust.errors import InputError
from lensclust.stats import permutation_p

BLOCK = 2048


def nearest_neighbour(
    acts: xr.Dataset,
    *,
    target: str = "task",
    apart: str | Sequence[str] = "template",
    per: str | None = None,
    kinds: str | Sequence[str] | None = None,
    position: str | None = None,
    permutations: int = 100,
    seed: int = 0,
) -> pd.DataFrame:
    """1-nearest-neighbour accuracy for a label at every site, neighbours held apart.

    A prompt's nearest neighbour (cosine) is looked for only among prompts that differ from it
    in every ``apart`` label, so that a shared wording (or input) cannot give the task away.

    With ``per``, the accuracy of the prompts of each value of that label stands apart (the
    neighbours still come from all prompts).

    Returns:
        One row a site (and group): ``site, kind, layer, head, by, metric, group, value,
        null_mean, null_std, p``; the null permutes the target labels over the prompts.

    Raises:
        InputError: if a label does not exist, or a prompt has no neighbour left.

    >>> import lensclust as lc
    >>> acts = lc.extract(lc.load("native:sif-small"), lc.tasks.sif().where(split="both"), "resid")
    >>> scores = nearest_neighbour(acts, target="input", apart="template")
    >>> bool(scores.value[0] > 2 * scores.null_mean[0])  # the last token's embedding is the input's
    True
    """
    if permutations < 2:
        raise InputError(f"nearest_neighbour: permutations={permutations}, expected at least 2")
    labels = _codes(prompt_labels(acts, target))
    names = [apart] if isinstance(apart, str) else list(apart)
    groups = np.stack(
        [np.arange(len(labels)), *(_codes(prompt_labels(acts, name)) for name in names)]
    )
    parts = {"all": np.arange(len(labels))}
    if per is not None:
        values = prompt_labels(acts, per)
        parts = {str(value): np.flatnonzero(values == value) for value in np.unique(values)}
    rng = np.random.default_rng(seed)
    permuted = np.stack([rng.permutation(labels) for _ in range(permutations)])
    rows: list[dict[str, Any]] = []
    for site in dataset_sites(acts, kinds):
        nearest = neighbours(site_values(acts, site, position=position), groups)
        right = np.vstack([labels[nearest] == labels, permuted[:, nearest] == permuted])
        place = {"site": str(site), "kind": site.kind, "layer": site.layer, "head": site.head}
        for name, members in parts.items():
            value, *null = right[:, members].mean(1)
            rows.append(
                {
                    **place,
                    "by": target,
                    "metric": "1nn_accuracy",
                    "group": name,
                    "value": float(value),
                    "null_mean": float(np.mean(null)),
                    "null_std": float(np.std(null, ddof=1)),
                    "p": float(permutation_p(float(value), np.array(null))),
                }
            )
    return pd.DataFrame(rows).astype({"head": "Int64"})


def neighbours(
    x: Float[np.ndarray, "row d"], groups: Int[np.ndarray, "grouping row"]
) -> Int[np.ndarray, " row"]:
    """Index of each row's nearest row (cosine) that shares no group with it.

    Raises:
        InputError: if a row shares a group with every other.

    >>> neighbours(np.array([[1.0, 0], [1, 0.1], [0.5, 1]]), np.array([[0, 0, 1]])).tolist()
    [2, 2, 1]
    """
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    nearest = np.empty(len(x), dtype=np.int64)
    for start in range(0, len(x), BLOCK):
        part = slice(start, start + BLOCK)
        likeness = unit[part] @ unit.T
        for group in groups:
            likeness[group[part, None] == group[None]] = -np.inf
        alone = np.isneginf(likeness).all(1)
        if alone.any():
            raise InputError(f"neighbours: none is left for row {start + int(alone.argmax())}")
        nearest[part] = likeness.argmax(1)
    return nearest


def _codes(labels: np.ndarray) -> Int[np.ndarray, " row"]:
    return np.unique(labels, return_inverse=True)[1]
