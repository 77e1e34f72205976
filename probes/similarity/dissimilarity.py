"""Representational dissimilarity matrices (RDMs) of hypotheses and of states.

A hypothesis RDM is 0 where two prompts share a component (a name, an activity) and 1 where they do
not, or graded by the difference of two numbers. A state RDM holds the distances between the states
of a site. Only the pairs above the diagonal are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float, Int
from scipy.spatial.distance import pdist

from lensclust.activations import label_columns
from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.prompts import MISSING, Prompts, label_texts, require_same_prompts
from probes.design import require_two_values

# The distance between equal rows is rounding, which must not be ranked.
DECIMALS = 10
PAIR_DISTANCES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "cosine": lambda x: np.round(pdist(x, "cosine"), DECIMALS),
    "correlation": lambda x: np.round(pdist(x, "correlation"), DECIMALS),
    "euclidean": lambda x: pdist(x, "euclidean"),
}
DISTANCES = (*PAIR_DISTANCES, "crossnobis")


@checked_arguments
def hypothesis(
    rows: xr.Dataset | pd.DataFrame, name: str, *, graded: bool = False
) -> Float[np.ndarray, "prompt prompt"]:
    """Dissimilarity of prompts by one label: 0 where two share its value, 1 elsewhere.

    With ``graded`` the label is a number, and the dissimilarity ``|a_i - a_j|``, divided by the
    largest.

    Args:
        rows: activations (labels are coordinates of ``prompt``) or a frame of rows.
        name: the label.
        graded: by distance instead of equality.

    Raises:
        InputError: if the label does not exist, all prompts have one value, or ``graded`` is used
            for values that are not finite numbers.

    >>> rows = pd.DataFrame({"name": ["Ann", "Ann", "Bo"], "slope": [1, 2, 5]})
    >>> hypothesis(rows, "name")[0].tolist(), hypothesis(rows, "slope", graded=True)[0].tolist()
    ([0.0, 0.0, 1.0], [0.0, 0.25, 1.0])
    """
    values = _label(rows, name)
    texts = label_texts(values)
    require_two_values("hypothesis", name, texts)
    if missing := int((texts == MISSING).sum()):
        raise InputError(
            f"hypothesis: {missing} of {len(texts)} prompts have no label {name!r}; leave them out"
        )
    if not graded:
        codes = np.unique(texts, return_inverse=True)[1]
        return (codes[:, None] != codes).astype(np.float64)
    try:
        numbers = values.astype(np.float64)
    except ValueError:
        numbers = np.array([np.nan])
    if not np.isfinite(numbers).all():
        raise InputError(
            f"hypothesis: graded=True, but label {name!r} holds values such as "
            f"{str(values[0])!r}, expected finite numbers"
        )
    apart = np.abs(numbers[:, None] - numbers)
    return apart / apart.max()


@checked_arguments
def combined(
    hypotheses: Sequence[Float[np.ndarray, "prompt prompt"]],
) -> Float[np.ndarray, "prompt prompt"]:
    """Combine several hypotheses into their mean.

    Also `combine_hypotheses`.

    Raises:
        InputError: if none is given or their sizes differ.

    >>> rows = pd.DataFrame({"name": ["Ann", "Ann", "Bo"], "activity": ["runs", "reads", "runs"]})
    >>> combined([hypothesis(rows, "name"), hypothesis(rows, "activity")])[0].tolist()
    [0.0, 0.5, 0.5]
    """
    shapes = {np.shape(matrix) for matrix in hypotheses}
    if len(shapes) != 1:
        raise InputError(f"combined: expected matrices of one size, given {sorted(shapes)}")
    return np.mean(list(hypotheses), axis=0)


# The same function under a name that is clear out of context.
combine_hypotheses = combined


@checked_arguments
def with_nuisances(acts: xr.Dataset, prompts: Prompts) -> xr.Dataset:
    """Label activations with nuisances of their prompts: ``length`` and ``first_token``.

    ``length`` is in tokens; ``first_token`` is the id of the first, or of the second where all
    prompts begin with the same one (a beginning-of-sequence token). Existing labels are kept.

    Raises:
        InputError: if activations and prompts differ in number or labels.

    >>> import lensclust as lc
    >>> prompts = lc.tasks.sif().where(split="both")
    >>> acts = lc.extract(lc.load("native:sif-small"), prompts, "resid 0")
    >>> sorted(set(with_nuisances(acts, prompts).coords) - set(acts.coords))
    ['first_token', 'length']
    """
    if acts.sizes["prompt"] != len(prompts):
        raise InputError(
            f"with_nuisances: {acts.sizes['prompt']} activations, but {len(prompts)} prompts"
        )
    require_same_prompts("with_nuisances", label_columns(acts), prompts.label_arrays())
    tokens = prompts.tokens.numpy()
    column = int(tokens.shape[1] > 1 and (tokens[:, 0] == tokens[0, 0]).all())
    seen = {"length": prompts.lengths.numpy(), "first_token": tokens[:, column].astype(str)}
    fresh = {name: ("prompt", value) for name, value in seen.items() if name not in acts.coords}
    return acts.assign_coords(fresh)


def nuisance(acts: xr.Dataset, name: str) -> Float[np.ndarray, "prompt prompt"]:
    """Dissimilarity by a nuisance label: graded for numbers, else equal or not.

    0 for all pairs if all prompts have one value.

    Raises:
        InputError: if the activations have no such label.
    """
    values = _label(acts, name)
    if len(set(values.tolist())) < 2:
        return np.zeros((len(values), len(values)))
    return hypothesis(acts, name, graded=values.dtype.kind in "iuf")


def pair_index(n: int) -> tuple[Int[np.ndarray, " pair"], Int[np.ndarray, " pair"]]:
    """Rows and columns above the diagonal, in the order of scipy's ``pdist``."""
    first, second = np.triu_indices(n, 1)
    return first, second


def standardised(x: Float[np.ndarray, "row d"]) -> Float[np.ndarray, "row d"]:
    """Z-score each feature over the rows; 0 where it is constant."""
    spread = x.std(0)
    constant = x.max(0) == x.min(0)
    return np.where(constant, 0.0, (x - x.mean(0)) / np.where(constant, 1.0, spread))


def state_distances(
    x: Float[np.ndarray, "row d"], distance: str, *, site: str
) -> Float[np.ndarray, " pair"]:
    """Distances between the rows of a site, above the diagonal.

    Raises:
        InputError: if a row has norm 0, so that no angle is defined.
    """
    if (x == x[0]).all():
        return np.zeros(len(x) * (len(x) - 1) // 2)
    found = PAIR_DISTANCES[distance](x)
    if not np.isfinite(found).all():
        raise InputError(
            f"rsa: {site}: a row has no {distance} distance (all its features are equal or 0), "
            "expected states with a direction; use distance='euclidean'"
        )
    return found


def crossnobis(
    x: Float[np.ndarray, "repeat item d"],
) -> Float[np.ndarray, " pair"]:
    """Cross-validated Mahalanobis (crossnobis) distances between items; can be below 0.

    The noise covariance is that of the repeats of an item, shrunk towards its diagonal; the
    distances are rsatoolbox's, divided by the number of features. With known noise they would be
    0 on average between equal items. Estimating it from the same repeats adds a small bias, which
    decreases with the number of items and is equal for all pairs, so that no correlation with a
    hypothesis changes. Features that are constant over repeats have no noise estimate and are
    left out; without any other, all distances are 0.
    """
    noisy = (np.ptp(x, axis=0) > 0).any(0)
    if not noisy.any():
        return np.zeros(x.shape[1] * (x.shape[1] - 1) // 2)
    x = x[..., noisy]
    # Imported here: it takes seconds, and only repeats need it.
    from rsatoolbox.data.dataset import Dataset
    from rsatoolbox.data.noise import prec_from_measurements
    from rsatoolbox.rdm.calc import calc_rdm_crossnobis

    repeats, items, d = x.shape
    dataset = Dataset(
        x.reshape(-1, d).astype(np.float64),
        obs_descriptors={
            "item": np.tile(np.arange(items), repeats),
            "repeat": np.repeat(np.arange(repeats), items),
        },
    )
    noise = np.asarray(prec_from_measurements(dataset, obs_desc="item", method="shrinkage_diag"))
    return calc_rdm_crossnobis(dataset, "item", noise, "repeat").dissimilarities[0]


def _label(rows: xr.Dataset | pd.DataFrame, name: str) -> np.ndarray:
    if isinstance(rows, pd.DataFrame):
        known = [str(column) for column in rows]
        found = rows[name].to_numpy() if name in rows else None
    else:
        known = [str(c) for c in rows.coords if rows[c].dims == ("prompt",)]
        found = rows[name].values if name in known else None
    if found is None:
        hint = " (`with_nuisances` adds them)" if name in ("length", "first_token") else ""
        raise InputError(f"label {name!r} is not among those of the prompts{hint}: {known}")
    return found
