"""Which rows are held out together, and which labellings a probe's score is compared with.

Folds keep a group (a template, an instruction) on one side. The null permutes labels over what
is exchangeable and over nothing finer, since rows that share a wording are not independent:

    no groups                       rows, within their fold
    labels constant in each group   whole groups, within their fold
    labels vary within groups       the labels of a group trade places: all rows of one label in
                                    one group move together, as rows of one instruction must
      with ``exchange="rows"``      single rows within their group

Groups are dealt to folds by the first label they hold, so that each label spreads evenly. No
permutation above changes how many such groups a fold has, so the null stays exact.

A control task (Hewitt & Liang 2019, arXiv 1909.03368) gives each value of a label, such as each
input word, a target label at random: what a probe scores there it has memorised.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import numpy as np
import xarray as xr
from jaxtyping import Int
from scipy.special import gammaln

from lensclust.activations import prompt_labels
from lensclust.errors import InputError

# One random control task is a noisy estimate; the Gram matrix makes a few cost little more.
CONTROL_TASKS = 5
EXCHANGES = ("labels", "rows")
# Exchanged labels whose rows differ more than this in number change the label frequencies.
UNEQUAL = 1.5


@dataclass(frozen=True)
class Design:
    """Labellings and folds, the same at every site.

    Attributes:
        names: the target labels.
        codes: index into ``names``; column 0 holds the true labels, then come the control tasks,
            then the permuted labels.
        fold: the fold in which a row is tested.
        n_folds, n_controls: how many.
        exchanged: what the null permutes: ``rows``, ``groups`` or ``labels within groups`` ...
        notes: what a reader of the scores should know, one sentence each.
    """

    names: np.ndarray
    codes: Int[np.ndarray, "row labelling"]
    fold: Int[np.ndarray, " row"]
    n_folds: int
    n_controls: int
    exchanged: str
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
    seed: int = 0,
) -> Design:
    """Deal rows into folds and draw control tasks and permuted labels.

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
    dealing, controlling, permuting = np.random.default_rng(seed).spawn(3)
    fold = deal((table > 0).argmax(1), folds, dealing)[group]
    notes = _require_learnable(names, _count(fold, true, folds, len(names)), target, groups)
    exchanged, unit, block = _exchangeable(true, group, fold, table, groups, exchange)
    if permutations:
        notes += _require_exchangeable(true, unit, block, permutations, exchanged, folds)
    drawn = [] if control is None else _controls(acts, control, true, controlling)
    of_unit = np.unique(unit, return_index=True)[1]
    permuted = [
        permute_within(true[of_unit], block[of_unit], permuting)[unit] for _ in range(permutations)
    ]
    return Design(
        names=names,
        # The narrowest type: comparing codes is a good part of the work.
        codes=np.stack([true, *drawn, *permuted], axis=1).astype(np.min_scalar_type(-len(names))),
        fold=fold,
        n_folds=folds,
        n_controls=len(drawn),
        exchanged=exchanged,
        notes=tuple(notes),
    )


def deal(
    strata: Int[np.ndarray, " group"], folds: int, rng: np.random.Generator
) -> Int[np.ndarray, " group"]:
    """A fold for each group: groups of one stratum are dealt out like cards, in random order.

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


def permute_within(
    values: Int[np.ndarray, " unit"], block: Int[np.ndarray, " unit"], rng: np.random.Generator
) -> Int[np.ndarray, " unit"]:
    """Values shuffled among the units of each block.

    >>> permute_within(np.array([3, 3, 5]), np.array([0, 0, 1]), np.random.default_rng(0)).tolist()
    [3, 3, 5]
    """
    shuffled = np.empty_like(values)
    here = np.argsort(block, kind="stable")
    shuffled[here] = values[np.lexsort((rng.random(len(block)), block))]
    return shuffled


def _exchangeable(
    true: np.ndarray,
    group: np.ndarray,
    fold: np.ndarray,
    table: np.ndarray,
    groups: str | None,
    exchange: str,
) -> tuple[str, np.ndarray, np.ndarray]:
    """What the null permutes, the unit of each row and the block in which units trade labels."""
    rows = np.arange(len(true))
    if exchange not in EXCHANGES:
        raise InputError(f"probe: exchange {exchange!r} is not known: expected one of {EXCHANGES}")
    if groups is None:
        return "rows", rows, fold
    if ((table > 0).sum(1) == 1).all():
        if exchange == "rows":
            raise InputError(
                f"probe: exchange='rows', but every {groups} has one label: rows within it have "
                "nothing to exchange"
            )
        return "groups", group, fold
    if exchange == "rows":
        return "rows within groups", rows, group
    return "labels within groups", _codes(group * table.shape[1] + true), group


def _require_exchangeable(
    true: np.ndarray,
    unit: np.ndarray,
    block: np.ndarray,
    permutations: int,
    exchanged: str,
    folds: int,
) -> list[str]:
    """Notes on how much the null can say; an error where it can say nothing."""
    first, sizes = np.unique(unit, return_index=True, return_counts=True)[1:]
    table = _count(block[first], true[first], int(block.max()) + 1, int(true.max()) + 1)
    labellings = float((gammaln(table.sum(1) + 1) - gammaln(table + 1).sum(1)).sum())
    if labellings < 1e-9:
        raise InputError(
            f"probe: no labels can be exchanged ({exchanged}, {folds} folds): use fewer folds, "
            "other groups or permutations=0"
        )
    notes = []
    if labellings < log(permutations + 1):
        notes.append(
            f"only {np.exp(labellings):.0f} labellings by exchanging {exchanged}: p is coarse"
        )
    if exchanged != "rows" and sizes.max() > UNEQUAL * sizes.min():
        notes.append(
            f"exchanging {exchanged} of {sizes.min()} to {sizes.max()} rows changes how frequent "
            "labels are: trust the p of balanced_accuracy before that of accuracy"
        )
    return notes


def _require_learnable(
    names: np.ndarray, table: Int[np.ndarray, "fold class"], target: str, groups: str | None
) -> list[str]:
    """A note on labels that training never sees when they are tested; an error if all are."""
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
