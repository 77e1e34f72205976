"""Which prompts are scored together, against which labels, and the mean over those groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from lensclust.errors import InputError
from lensclust.stats import permutation_p


@dataclass(frozen=True)
class Group:
    """Rows clustered together, and the labellings their partition is scored against.

    Attributes:
        name: what the rows share.
        rows: indices into the matrix.
        k: number of clusters.
        codes: labelling -> one row of label codes for the true labels, then the permuted ones.
    """

    name: str
    rows: Int[np.ndarray, " row"]
    k: int
    codes: Mapping[str, Int[np.ndarray, "labelling row"]]


def label_groups(
    call: str,
    labels: Mapping[str, np.ndarray],
    *,
    by: str,
    given: str | None,
    condition: np.ndarray | None,
    k: int | None = None,
    permutations: int,
    seed: int,
) -> tuple[list[Group], list[str]]:
    """The rows to score together, without what cannot be scored, and the reasons.

    Raises:
        InputError: if ``by`` has one value, ``k`` exceeds the rows of every group, or nothing is
            left; ``call`` is named.
    """
    require_two_values(call, by, labels[by])
    rng = np.random.default_rng(seed)
    everything = np.arange(len(labels[by]))
    parts = (
        {"all": everything}
        if condition is None
        else {value: np.flatnonzero(condition == value) for value in np.unique(condition)}
    )
    groups, single, lone, small, constant = [], [], 0, [], set()
    for value, part in parts.items():
        names, counts = np.unique(labels[by][part], return_counts=True)
        lone += int((counts == 1).sum())
        rows = part[np.isin(labels[by][part], names[counts > 1])]
        present = int((counts > 1).sum())
        if present < 2:
            single.append(value)
        elif (k or present) > len(rows):
            small.append(value)
        else:
            codes = {}
            for name, column in labels.items():
                true = np.unique(column[rows], return_inverse=True)[1].astype(np.int32)
                if true.max() == 0:
                    constant.add(name)
                    continue
                codes[name] = np.stack(
                    [true, *(rng.permutation(true) for _ in range(permutations))]
                )
            groups.append(Group(str(value), rows, k or present, codes))
    if k is not None and len(small) == len(parts):
        largest = max(len(part) for part in parts.values())
        raise InputError(f"{call}: k={k} clusters asked for, but at most {largest} rows to cluster")
    if not groups:
        raise InputError(
            f"{call}: nothing to cluster by {by!r} given {given!r}: no group holds two labels "
            "with two rows each"
        )
    reasons = {
        f"{lone} rows left out: the only one of their {by} in their group": lone,
        f"{len(single)} of {len(parts)} groups left out: fewer than two {by} labels": single,
        f"{len(small)} of {len(parts)} groups left out: fewer rows than clusters": small,
        f"not scored against {sorted(constant)}: constant given {given}": constant,
    }
    return groups, [reason for reason, happened in reasons.items() if happened]


def require_two_values(call: str, name: str, values: np.ndarray) -> None:
    """Refuse a label that tells no prompts apart.

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


def against_null(scores: Float[np.ndarray, "group labelling"]) -> dict[str, Any]:
    """Mean over groups of the true labels' score, beside the same mean under permuted labels."""
    mean = scores.mean(0)
    value, null = float(mean[0]), mean[1:]
    return {
        "value": value,
        "null_mean": float(null.mean()) if null.size else float("nan"),
        "null_std": float(null.std(ddof=1)) if null.size > 1 else float("nan"),
        "p": float(permutation_p(value, null)),
        "n_groups": len(scores),
    }
