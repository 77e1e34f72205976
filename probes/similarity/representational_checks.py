"""Check the arguments of `probes.rsa`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float, Int

from lensclust.activations import label_columns, label_names, labelled, prompt_labels, require_axes
from lensclust.errors import InputError
from probes.design import Exchange, Units, exchangeable
from probes.similarity.dissimilarity import DISTANCES, hypothesis, nuisance, pair_index
from probes.similarity.mantel import TRANSFORMS

LEAST = 4  # items, so that there are more pairs than items


def checked_options(
    distance: str | Sequence[str],
    compare: str | Sequence[str],
    standardise: bool | str,
    repeats: str | None,
    permutations: int,
) -> tuple[list[str], list[str], list[bool]]:
    """Check distances, comparisons and standardisations; return each as a list."""
    distances, compares = (
        [each] if isinstance(each, str) else list(each) for each in (distance, compare)
    )
    for what, given, known in (
        ("distance", distances, list(DISTANCES)),
        ("compare", compares, list(TRANSFORMS)),
    ):
        if not given or len(set(given)) < len(given) or not set(given) <= set(known):
            raise InputError(f"rsa: {what}={given}, expected some of {known}, each once")
    if "crossnobis" in distances and repeats is None:
        raise InputError("rsa: distance='crossnobis' needs items and repeats, given neither")
    if permutations < 2:
        raise InputError(f"rsa: permutations={permutations}, expected at least 2")
    if standardise not in (True, False, "both"):
        raise InputError(f"rsa: standardise={standardise!r}, expected True, False or 'both'")
    return distances, compares, [False, True] if standardise == "both" else [bool(standardise)]


def only_labelled(
    acts: xr.Dataset, hypotheses: Any, nuisance: Any, **options: str | None
) -> tuple[xr.Dataset, Any, Any, list[str]]:
    """Activations and matrices of the prompts that have all labels, and notes on the others."""
    require_axes(acts)
    known = label_names(acts)
    named = [] if isinstance(nuisance, (str, Mapping)) else list(nuisance)
    if not isinstance(hypotheses, Mapping):
        named += [hypotheses] if isinstance(hypotheses, str) else list(hypotheses)
    # Missing labels raise where they are needed, with a hint that names what adds them.
    rows, notes = labelled("rsa", acts, labels=[n for n in named if n in known], **options)
    if not notes:
        return acts, hypotheses, nuisance, []

    def of_these(given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        every = acts.sizes["prompt"]
        return {
            name: np.asarray(each)[np.ix_(rows, rows)] if np.shape(each) == (every,) * 2 else each
            for name, each in given.items()
        }

    return acts.isel(prompt=rows), of_these(hypotheses), of_these(nuisance), notes


def item_layout(
    acts: xr.Dataset, items: str | None, repeats: str | None
) -> Int[np.ndarray, "repeat item"]:
    """Prompt index by repeat and item; without these labels one repeat of each prompt.

    Raises:
        InputError: if only one of the two labels is given, an item does not occur exactly once in
            each repeat, or there are too few items or repeats.
    """
    n = acts.sizes["prompt"]
    if (items is None) != (repeats is None):
        raise InputError(f"rsa: items={items!r} and repeats={repeats!r}, expected both or neither")
    if items is None or repeats is None:
        layout = np.arange(n)[None]
    else:
        item = np.unique(prompt_labels(acts, items), return_inverse=True)[1]
        repeat = np.unique(prompt_labels(acts, repeats), return_inverse=True)[1]
        layout = np.full((repeat.max() + 1, item.max() + 1), -1)
        layout[repeat, item] = np.arange(n)
        if layout.size != n or (layout < 0).any():
            raise InputError(
                f"rsa: {n} prompts for {layout.shape[1]} of {items!r} in {layout.shape[0]} of "
                f"{repeats!r}, expected each item once in each repeat"
            )
        if len(layout) < 2:
            raise InputError(f"rsa: repeats={repeats!r} has one value, expected at least two")
    if layout.shape[1] < LEAST:
        raise InputError(f"rsa: {layout.shape[1]} prompts or items, expected at least {LEAST}")
    return layout


def checked_hypotheses(
    acts: xr.Dataset,
    given: str | Sequence[str] | Mapping[str, Any],
    layout: Int[np.ndarray, "repeat item"],
) -> dict[str, Float[np.ndarray, "item item"]]:
    """RDM of each hypothesis over items: the mean over repeats, within each repeat.

    Raises:
        InputError: if there is none, or one is not a matrix of the prompts, is constant, not
            symmetric or not finite.
    """
    if not given:
        raise InputError("rsa: no hypothesis given, expected at least one")
    if not isinstance(given, Mapping):
        names = [given] if isinstance(given, str) else list(given)
        given = {name: hypothesis(acts, name) for name in names}
    found = {name: _of_items("hypothesis", name, each, layout) for name, each in given.items()}
    for name, matrix in found.items():
        if _constant(matrix):
            raise InputError(
                f"rsa: hypothesis {name!r} is {matrix[0, 1]:g} for all pairs, expected two values"
            )
    return found


def checked_nuisances(
    acts: xr.Dataset,
    given: Sequence[str] | Mapping[str, Any],
    layout: Int[np.ndarray, "repeat item"],
) -> tuple[list[Float[np.ndarray, "item item"]], list[str]]:
    """Nuisances that vary over the items, and a note on each constant one.

    Raises:
        InputError: if there is no such label, or a matrix is not one of the prompts.
    """
    if isinstance(given, str):
        raise InputError(f"rsa: nuisance={given!r}, expected a list of labels or name -> matrix")
    if not isinstance(given, Mapping):
        given = {name: nuisance(acts, name) for name in given}
    found = {name: _of_items("nuisance", name, each, layout) for name, each in given.items()}
    notes = [
        f"nuisance {name!r} is the same for all pairs: left out"
        for name, matrix in found.items()
        if _constant(matrix)
    ]
    return [matrix for matrix in found.values() if not _constant(matrix)], notes


def item_columns(acts: xr.Dataset, layout: Int[np.ndarray, "repeat item"]) -> pd.DataFrame:
    """Columns of the items: those that are equal in all repeats."""
    columns = label_columns(acts)
    return pd.DataFrame(
        {
            name: values[layout[0]]
            for name, values in columns.items()
            if (values[layout].astype(str) == values[layout[0]].astype(str)).all()
        }
    )


def exchange_of(
    matrix: Float[np.ndarray, "item item"], columns: pd.DataFrame, *, name: str, units: Units
) -> Exchange:
    """Exchange under the null of a hypothesis; items at distance 0 share a label."""
    filled = np.where(np.eye(len(matrix), dtype=bool), 0.0, np.round(matrix, 9))
    labels = np.unique(filled, axis=0, return_inverse=True)[1].ravel()
    found = exchangeable(labels, columns, by=name, units=units, call="rsa")
    # Labels can be renamed only if the hypothesis is their equality.
    levels = np.unique(filled[pair_index(len(filled))])
    return replace(found, renamed=bool(len(levels) == 2 and levels[0] == 0))


def _of_items(
    what: str, name: str, given: Any, layout: Int[np.ndarray, "repeat item"]
) -> Float[np.ndarray, "item item"]:
    matrix = np.asarray(given, dtype=np.float64)
    if matrix.shape != (layout.size, layout.size):
        raise InputError(
            f"rsa: {what} {name!r} has shape {matrix.shape}, expected "
            f"{(layout.size, layout.size)}: one row and column for each prompt"
        )
    if not np.isfinite(matrix[~np.eye(len(matrix), dtype=bool)]).all():
        raise InputError(f"rsa: {what} {name!r} holds NaN or infinity, expected finite numbers")
    if not np.allclose(matrix, matrix.T, equal_nan=True):
        raise InputError(f"rsa: {what} {name!r} is not symmetric")
    return np.mean([matrix[np.ix_(rows, rows)] for rows in layout], axis=0)


def _constant(matrix: Float[np.ndarray, "item item"]) -> bool:
    return bool(np.ptp(matrix[pair_index(len(matrix))]) == 0)
