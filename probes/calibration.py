"""Baselines that use as many labels as reweighting: Calib+ and prompt selection.

Source: Chang, Thomason & Jia 2024 (arXiv 2406.13131), section 5, and the behaviour of their
script. Their recipe for prompt selection is not published; here it is the obvious one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Float
from scipy.special import log_softmax, softmax

from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from probes.component_logits import ComponentLogits
from probes.labelled_examples import Examples
from probes.scripted_fits import scripted_fits

STEPS, RATE = 5000, 0.05


@dataclass(frozen=True)
class Calibration:
    """One factor a label for the model's own probabilities.

    Attributes:
        weights: ``(label)``.
    """

    weights: xr.DataArray

    def __repr__(self) -> str:
        factors = zip(self.weights["label"].values.tolist(), self.weights.values, strict=True)
        return f"Calibration({', '.join(f'{label}: {factor:.3g}' for label, factor in factors)})"

    def scores(self, components: ComponentLogits) -> xr.DataArray:
        """Label probabilities of the model times the factors ``(prompt, label)``.

        Raises:
            InputError: if there are other labels than the factors are of, or in another order.
        """
        if components.labels != (known := self.weights["label"].values.tolist()):
            raise InputError(
                f"calibration: labels {components.labels} given, expected {known} in this order"
            )
        return _probabilities(components) * self.weights

    def predict(self, components: ComponentLogits) -> np.ndarray:
        """The label of each prompt."""
        return np.array(components.labels)[self.scores(components).argmax("label").values]

    def accuracy(self, components: ComponentLogits) -> float:
        """Share of prompts whose right label is predicted."""
        guesses = self.scores(components).argmax("label").values
        return float((guesses == components.targets).mean())


@checked_arguments
def calibrate(components: ComponentLogits) -> Calibration:
    """Calib+: one factor a label, trained on labelled prompts.

    The products of probabilities and factors are taken as logits, their cross-entropy descends
    from factors of 1 by at most 5,000 steps of 0.05, and the script's stopping rules hold
    (`probes.scripted_fits`).

    Raises:
        InputError: if there are no right labels, or fewer prompts than labels.

    >>> import lensclust as lc
    >>> from probes.components import decompose
    >>> model, prompts = lc.load("native:sif-small"), lc.tasks.sif().where(split="new_string")
    >>> rows = prompts.rows.assign(label=[*"ab"] * (len(prompts) // 2))
    >>> prompts = lc.Prompts.from_token_lists(prompts.tokens.tolist(), rows)
    >>> parts = decompose(model, prompts, {"a": 3, "b": 5})
    >>> found = calibrate(parts)
    >>> found.weights.dims, len(found.predict(parts)) == len(prompts)
    (('label',), True)
    """
    return calibrate_many([components])[0]


def calibrate_many(components: Sequence[ComponentLogits]) -> list[Calibration]:
    """`calibrate` for each of many problems, as one batch."""
    if not components:
        raise InputError("calibrate: no components given, expected at least one problem")
    for each in components:
        if len(each.targets) < len(each.labels):
            raise InputError(
                f"calibrate: {len(each.targets)} labelled prompts for {len(each.labels)} labels, "
                "expected at least as many"
            )
    widest = max(len(each.labels) for each in components)
    features = []
    for each in components:
        probabilities = _probabilities(each).values
        # A label's factor acts on its own score alone.
        own = np.zeros((*probabilities.shape, widest))
        here = np.arange(probabilities.shape[1])
        own[:, here, here] = probabilities
        features.append(own)
    examples = Examples.of(
        features,
        [np.zeros(each.shape[:2]) for each in features],
        [each.targets for each in components],
    )
    fitted = scripted_fits(
        examples, rate=RATE, penalty=0.0, steps=STEPS, clipped=False, check_first=True
    ).numpy()
    return [
        Calibration(
            xr.DataArray(row[: len(each.labels)], dims=("label",), coords={"label": each.labels})
        )
        for row, each in zip(fitted, components, strict=True)
    ]


@checked_arguments
def select_prompt(candidates: Sequence[ComponentLogits]) -> int:
    """Index of the prompt (template, demonstrations) under which the model does best.

    Best is the highest accuracy of the model itself on the labelled prompts given; among equals
    the lowest mean cross-entropy of the right label among the labels.

    Raises:
        InputError: if there is no candidate, or one has no right labels.
    """
    if not candidates:
        raise InputError("select_prompt: no candidate given, expected at least one")
    merits = [(each.model_accuracy, -_cross_entropy(each)) for each in candidates]
    return max(range(len(merits)), key=merits.__getitem__)


def _cross_entropy(components: ComponentLogits) -> float:
    logs = log_softmax(components.model_logits.values, axis=1)
    return float(-logs[np.arange(len(logs)), components.targets].mean())


def _probabilities(components: ComponentLogits) -> Float[xr.DataArray, "prompt label"]:
    return components.model_logits.copy(data=softmax(components.model_logits.values, axis=1))
