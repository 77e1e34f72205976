"""Groups of prompts that are scored together, their labels, and means over groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int

from lensclust.errors import InputError
from lensclust.results import permutation_p
from probes.design.units import Exchange, Units, exchangeable


@dataclass(frozen=True)
class Group:
    """Rows clustered together, and the labellings their partition is scored against.

    Attributes:
        name: the value that the rows share.
        rows: indices into the matrix.
        k: number of clusters.
        codes: labelling -> one row of label codes for the true labels, then the permuted ones.
        wording: labelling -> wording of each row, to separate pairs of rows of one wording from
            others (`probes.clustering.agreement.cross_wording_ari`).
    """

    name: str
    rows: Int[np.ndarray, " row"]
    k: int
    codes: Mapping[str, Int[np.ndarray, "labelling row"]]
    wording: Mapping[str, Int[np.ndarray, " row"]] = field(default_factory=dict)

    @cached_property
    def crossed(self) -> frozenset[str]:
        """Labellings in which rows of different wordings both agree and differ."""
        return frozenset(name for name in self.wording if self._crosses(name))

    def _crosses(self, name: str) -> bool:
        cells = np.stack([self.wording[name], self.codes[name][0]])
        wording, label = np.unique(cells, axis=1)
        alike = (label[:, None] == label)[wording[:, None] != wording]
        return bool(alike.any() and not alike.all())


def label_groups(
    call: str,
    labels: Mapping[str, np.ndarray],
    acts: xr.Dataset,
    *,
    by: str,
    given: str | None,
    condition: np.ndarray | None,
    k: int | None = None,
    units: Units = None,
    permutations: int,
    seed: int,
) -> tuple[list[Group], dict[str, Exchange], list[str]]:
    """Groups of rows to score, without unscorable ones, and reasons for these.

    The null permutes labels over exchangeable units (`probes.design`), alike in all groups.

    Args:
        acts: activations, whose columns define the exchangeable units.

    Returns:
        Groups, the exchange of each labelling under the null, and the reasons.

    Raises:
        InputError: if ``by`` has one value, ``k`` exceeds the rows of every group, or nothing is
            left; ``call`` is named.
    """
    require_two_values(call, by, labels[by])
    everything = np.arange(len(labels[by]))
    parts = (
        {"all": everything}
        if condition is None
        else {value: np.flatnonzero(condition == value) for value in np.unique(condition)}
    )
    chosen, single, lone, small = {}, [], 0, []
    for value, part in parts.items():
        names, counts = np.unique(labels[by][part], return_counts=True)
        lone += int((counts == 1).sum())
        present = int((counts > 1).sum())
        members = part[np.isin(labels[by][part], names[counts > 1])]
        if present < 2:
            single.append(value)
        elif (k or present) > len(members):
            small.append(value)
        else:
            chosen[str(value)] = (members, k or present)
    if k is not None and len(small) == len(parts):
        largest = max(len(part) for part in parts.values())
        raise InputError(f"{call}: k={k} clusters requested, but at most {largest} rows to cluster")
    if not chosen:
        raise InputError(
            f"{call}: nothing to cluster by {by!r} given {given!r}: no group holds two labels "
            "with two rows each"
        )
    used = np.sort(np.concatenate([members for members, _ in chosen.values()]))
    codes, wordings = ({name: {} for name in chosen} for _ in range(2))
    exchanges, constant = {}, set()
    for name, column in labels.items():
        scored = [g for g, (rows, _) in chosen.items() if len(set(column[rows].tolist())) > 1]
        constant |= {name} if len(scored) < len(chosen) else set()
        if not scored:
            continue
        exchanges[name] = exchangeable(
            column, acts, by=name, condition=condition, units=units, among=used, call=call
        )
        relabelled = exchanges[name].labellings(permutations, seed=seed)
        wording = exchanges[name].wording
        alike = np.ones(len(relabelled), dtype=bool)
        for group in scored:
            here = np.searchsorted(used, chosen[group][0])
            codes[group][name] = _compact(exchanges[name].fitted(relabelled, here, seed=seed))
            alike &= only_renamed(codes[group][name])
            if wording is not None:
                wordings[group][name] = _compact(wording[here])
        exchanges[name] = replace(exchanges[name], alike=float(alike.mean()))
    groups = [Group(g, rows, n, codes[g], wordings[g]) for g, (rows, n) in chosen.items()]
    reasons = {
        f"{lone} rows left out: the only one of their {by} in their group": lone,
        f"{len(single)} of {len(parts)} groups left out: fewer than two {by} labels": single,
        f"{len(small)} of {len(parts)} groups left out: fewer rows than clusters": small,
        f"not scored against {sorted(constant)}: constant given {given}": constant,
    }
    return groups, exchanges, [reason for reason, happened in reasons.items() if happened]


def _compact(codes: np.ndarray) -> np.ndarray:
    """Renumber codes without gaps."""
    return np.unique(codes, return_inverse=True)[1].reshape(codes.shape).astype(np.int32)


def only_renamed(
    codes: Int[np.ndarray, "labelling row"],
) -> Bool[np.ndarray, " labelling"]:
    """Mask of labellings that equal the first one up to names."""
    labels = int(codes.max()) + 1
    met = np.zeros((len(codes), labels, labels), dtype=bool)
    met[np.arange(len(codes))[:, None], codes, codes[0]] = True
    return (met.sum(1) <= 1).all(1) & (met.sum(2) <= 1).all(1)


def require_two_values(call: str, name: str, values: np.ndarray) -> None:
    """Raise InputError for a label with one value.

    >>> require_two_values("cluster", "task", np.array(["plural", "plural"]))
    Traceback (most recent call last):
    lensclust.errors.InputError: cluster: label 'task' is 'plural' for all 2 prompts, expected at \
least two values
    """
    if len(set(values.tolist())) < 2:
        raise InputError(
            f"{call}: label {name!r} is {str(values[0])!r} for all {len(values)} prompts, "
            "expected at least two values"
        )


def against_null(
    scores: Float[np.ndarray, "group labelling"],
    exchange: Exchange,
    permutations: int,
    *,
    tested: Float[np.ndarray, " labelling"] | None = None,
) -> dict[str, Any]:
    """Mean over groups of the true labels' score, and its null under relabellings.

    Args:
        tested: the statistic of p, where that is not the mean.
    """
    mean = scores.mean(0)
    # Without any other relabelling, the true one is the null.
    value, null = float(mean[0]), mean[1:] if mean.size > 1 else mean
    of = mean if tested is None else tested
    return {
        "value": value,
        "null_mean": float(null.mean()),
        "null_std": float(null.std(ddof=1)) if null.size > 1 else 0.0,
        "p": float(permutation_p(float(of[0]), of[1:])),
        "smallest_p": exchange.smallest_p(permutations),
        "n_groups": len(scores),
        "exchanged": exchange.exchanged,
    }
