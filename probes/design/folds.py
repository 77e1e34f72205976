"""Folds of a probe, and the labellings of its null and control tasks.

Folds keep a group (a template, an instruction) on one side. The null permutes labels over
exchangeable units and nothing finer, since rows that share a wording are not independent
(`probes.design`): whole wordings, or the labels within each, and without a column of wordings the
groups take their place. Without either, rows exchange labels within their fold.

    groups lie inside units (or units are groups)   assigned to folds by unit (by label), so that
                                                    each label spreads evenly
    units lie inside a fold                         they exchange labels with those of their fold

No relabelling above changes how many such groups a fold has, so the null stays exact. With
``exchange="rows"`` single rows exchange labels within their group, valid only if labels were
assigned row by row.

A control task (Hewitt & Liang 2019, arXiv 1909.03368) gives each value of a label, such as each
input word, a random target label: a probe's score there is memorisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Int

from lensclust.activations import prompt_labels
from lensclust.errors import InputError
from probes.design.units import ROWS, UNEQUAL_ROWS, Exchange, Units, exchangeable, nested

# One random control task is a noisy estimate; the Gram matrix makes a few cost little more.
CONTROL_TASKS = 5
EXCHANGES = ("labels", "rows")


@dataclass(frozen=True)
class Design:
    """Labellings and folds, the same at every site.

    Attributes:
        names: the target labels.
        codes: index into ``names``; column 0 holds the true labels, then come the control tasks,
            then the permuted labels.
        fold: the fold in which a row is tested.
        n_folds, n_controls: numbers of folds and control tasks.
        exchanged: what the null permutes, such as ``template`` or ``task within template``.
        smallest_p: the smallest possible p; NaN without permutations.
        notes: caveats of the scores, one sentence each.
    """

    names: np.ndarray
    codes: Int[np.ndarray, "row labelling"]
    fold: Int[np.ndarray, " row"]
    n_folds: int
    n_controls: int
    exchanged: str
    smallest_p: float
    notes: tuple[str, ...]


def design(
    acts: xr.Dataset,
    *,
    target: str,
    groups: str | None,
    control: str | None,
    folds: int,
    permutations: int,
    exchange: str = "labels",
    units: Units = None,
    seed: int = 0,
) -> Design:
    """Assign rows to folds and draw control tasks and permuted labels.

    Raises:
        InputError: if a label does not exist, ``target`` or ``control`` has one value, there are
            more folds than groups, nothing learned could be tested, or nothing is exchangeable.
    """
    names, true = np.unique(prompt_labels(acts, target), return_inverse=True)
    if len(names) < 2:
        raise InputError(f"probe: every row has {target} {str(names[0])!r}, expected two labels")
    rows = np.arange(len(true))
    group = rows if groups is None else _codes(prompt_labels(acts, groups))
    n_groups = int(group.max()) + 1
    if not 2 <= folds <= n_groups:
        what = "rows" if groups is None else f"groups of {groups!r}"
        raise InputError(f"probe: folds={folds}, expected 2 to {n_groups}, the number of {what}")
    table = _count(group, true, n_groups, len(names))
    if exchange not in EXCHANGES:
        raise InputError(f"probe: exchange {exchange!r} is not known: expected one of {EXCHANGES}")
    if exchange == "rows":
        found = _rows_within(acts, target, groups, table)
    else:
        found = _exchange(acts, names[true], target, groups, units)
    dealing, controlling, permuting = np.random.default_rng(seed).spawn(3)
    strata = (table > 0).argmax(1)
    # Units that span folds must spread over them evenly, whatever their label.
    if nested(group, found.unit) and not nested(found.unit, group):
        strata = found.unit[np.unique(group, return_index=True)[1]]
    fold = deal(strata, folds, dealing)[group]
    notes = _require_learnable(names, _count(fold, true, folds, len(names)), target, groups)
    if nested(found.unit, fold):
        found = found.within(fold)
    if permutations:
        notes += _require_exchangeable(found, folds)
    drawn = [] if control is None else _controls(acts, control, true, controlling)
    labels = found.labellings(permutations, seed=int(permuting.integers(2**32)))
    return Design(
        names=names,
        # The narrowest type: comparing codes takes much of the time.
        codes=np.stack([true, *drawn, *labels[1:]], axis=1).astype(np.min_scalar_type(-len(names))),
        fold=fold,
        n_folds=folds,
        n_controls=len(drawn),
        exchanged=found.exchanged,
        smallest_p=found.smallest_p(permutations) if permutations else float("nan"),
        notes=tuple(notes),
    )


def deal(
    strata: Int[np.ndarray, " group"], folds: int, rng: np.random.Generator
) -> Int[np.ndarray, " group"]:
    """Fold of each group: groups of a stratum are spread evenly over folds, in random order.

    >>> fold = deal(np.array([0, 0, 0, 1, 1, 1]), 3, np.random.default_rng(0))
    >>> sorted(fold[:3].tolist()), sorted(fold[3:].tolist())
    ([0, 1, 2], [0, 1, 2])
    """
    order = rng.permutation(len(strata))
    rank = rng.permutation(int(strata.max()) + 1)
    order = order[np.argsort(rank[strata[order]], kind="stable")]
    fold = np.empty(len(strata), dtype=np.int64)
    fold[order] = np.arange(len(strata)) % folds
    return fold


def _exchange(
    acts: xr.Dataset, labels: np.ndarray, target: str, groups: str | None, units: Units
) -> Exchange:
    """Exchangeable units; groups are the units where no wording is known, or within one."""
    found = exchangeable(labels, acts, by=target, units=units, call="probe")
    if units is not None:
        return found
    if groups is None:
        # Rows that share nothing else exchange labels within their fold, not within their input.
        alone = found.wording is None and found.unit.max() + 1 == len(labels)
        return exchangeable(labels, acts, by=target, units=ROWS) if alone else found
    group = _codes(prompt_labels(acts, groups))
    if found.wording is None or nested(found.wording, group):
        return exchangeable(labels, acts, by=target, units=groups, call="probe")
    return found


def _rows_within(
    acts: xr.Dataset, target: str, groups: str | None, table: Int[np.ndarray, "group label"]
) -> Exchange:
    """Exchange of single rows, within their group if there are groups."""
    condition = None if groups is None else prompt_labels(acts, groups)
    if groups is not None and ((table > 0).sum(1) == 1).all():
        raise InputError(
            f"probe: exchange='rows', but every {groups} has one label: rows within it have "
            "nothing to exchange"
        )
    labels = prompt_labels(acts, target)
    return exchangeable(labels, acts, by=target, condition=condition, units=ROWS, call="probe")


def _require_exchangeable(found: Exchange, folds: int) -> list[str]:
    """Notes on the resolution of the null; an error if nothing is exchangeable."""
    if not found.moves:
        raise InputError(
            f"probe: no labels can be exchanged ({found.exchanged}, {folds} folds): use fewer "
            "folds, other groups or permutations=0"
        )
    unequal = [
        f"{note}: trust the p of balanced_accuracy before that of accuracy"
        for note in found.notes
        if note.endswith(UNEQUAL_ROWS)
    ]
    return [*(note for note in found.notes if not note.endswith(UNEQUAL_ROWS)), *unequal]


def _require_learnable(
    names: np.ndarray, table: Int[np.ndarray, "fold class"], target: str, groups: str | None
) -> list[str]:
    """A note on labels that are never in training when tested; an error if all are."""
    where = "one row" if groups is None else f"one {groups} or fold"
    alone = names[(table > 0).sum(0) < 2]
    if len(names) - len(alone) < 2:
        raise InputError(
            f"probe: nothing to learn: {len(alone)} of {len(names)} {target} labels have "
            f"{where} only, such as {str(alone[0])!r}, and two must stand in several"
        )
    if not alone.size:
        return []
    return [
        f"{len(alone)} of {len(names)} {target} labels have {where} only, such as "
        f"{str(alone[0])!r}: their rows count as wrong"
    ]


def _controls(
    acts: xr.Dataset, control: str, true: np.ndarray, rng: np.random.Generator
) -> list[np.ndarray]:
    value = _codes(prompt_labels(acts, control))
    if value.max() == 0:
        raise InputError(f"probe: control {control!r} is the same in every row, expected several")
    drawn = []
    while len(drawn) < CONTROL_TASKS:
        label = rng.choice(true, size=int(value.max()) + 1)
        if len(np.unique(label)) > 1:
            drawn.append(label[value])
    return drawn


def _codes(values: np.ndarray) -> Int[np.ndarray, " row"]:
    return np.unique(values, return_inverse=True)[1]


def _count(
    first: np.ndarray, second: np.ndarray, n_first: int, n_second: int
) -> Int[np.ndarray, "first second"]:
    counts = np.bincount(first * n_second + second, minlength=n_first * n_second)
    return counts.reshape(n_first, n_second)
