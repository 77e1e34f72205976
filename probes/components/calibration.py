"""Baselines with as many labels as reweighting: calibration and prompt selection.

With p the model's probabilities of the labels and z their logits (minus their mean over labels, to
which a softmax is invariant), a label's score is

    Calib+            w_y p_y            one factor per label, towards 1
    vector scaling    a_y z_y + b_y      one scale and one bias per label, towards 1 and 0

Three ways to learn them from labelled prompts:

    "script"           Calib+ by the source's schedule: plain steps and its stopping rules, which
                       end it as soon as all labelled prompts are right, with factors still near 1
                       (`probes.components.scripted_fits`)
    "converged"        Calib+, the products taken as logits as the script does: the minimum of
                       mean cross-entropy + λ/2 |w - 1|²
    "vector scaling"   the minimum of mean cross-entropy + λ/2 (|a - 1|² + |b|²)

The latter two are found to convergence (`probes.components.ridge_fits`), with λ chosen on the folds
that `reweight` uses and by the same rule, so that no difference between reweighting and calibration
comes from stopping one of them early.

Source: Chang, Thomason & Jia 2024 (arXiv 2406.13131), section 5, and the behaviour of their
script; vector scaling: Guo, Pleiss, Sun & Weinberger 2017 (arXiv 1706.04599). The recipe for
prompt selection is not published; here the prompt of highest accuracy is selected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float, Int
from scipy.special import log_softmax, softmax

from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from probes.components.component_logits import ComponentLogits
from probes.components.labelled_examples import Examples
from probes.components.penalties import chosen_penalty, example_folds, penalty_frame, require_folds
from probes.components.ridge_fits import ridge_fit
from probes.components.scripted_fits import scripted_fits

SCRIPT, CONVERGED, VECTOR_SCALING = "script", "converged", "vector scaling"
METHODS = (SCRIPT, CONVERGED, VECTOR_SCALING)
PENALTIES = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0)
STEPS, RATE = 5000, 0.05


@dataclass(frozen=True)
class Calibration:
    """Factors of the model's label probabilities, or scales and biases of its logits.

    Attributes:
        weights: ``(label)``, factors or scales.
        biases: ``(label)``; None for Calib+.
        method: how they were learnt.
        penalty: ``λ``; NaN for the script, which has none.
        gap: bound of the objective above its minimum (nats); NaN for the script.
        frame: one row per penalty, on held-out prompts: ``penalty, cross_entropy, accuracy,
            chosen``; empty where no penalty was chosen.
    """

    weights: xr.DataArray
    biases: xr.DataArray | None = None
    method: str = SCRIPT
    penalty: float = float("nan")
    gap: float = float("nan")
    frame: pd.DataFrame = field(default_factory=pd.DataFrame)

    def __repr__(self) -> str:
        factors = zip(self.weights["label"].values.tolist(), self.weights.values, strict=True)
        how = "" if self.method == SCRIPT else f", {self.method}"
        shown = ", ".join(f"{label}: {factor:.3g}" for label, factor in factors)
        return f"Calibration({shown}{how})"

    def scores(self, components: ComponentLogits) -> xr.DataArray:
        """Label probabilities times the factors, or scaled logits: ``(prompt, label)``.

        Raises:
            InputError: if the labels are not those of the factors, in the same order.
        """
        if components.labels != (known := self.weights["label"].values.tolist()):
            raise InputError(
                f"calibration: labels {components.labels} given, expected {known} in this order"
            )
        if self.biases is None:
            return _probabilities(components) * self.weights
        return _centred(components) * self.weights + self.biases

    def predict(self, components: ComponentLogits) -> np.ndarray:
        """The label of each prompt."""
        return np.array(components.labels)[self.scores(components).argmax("label").values]

    def accuracy(self, components: ComponentLogits) -> float:
        """Share of prompts whose right label is predicted."""
        guesses = self.scores(components).argmax("label").values
        return float((guesses == components.targets).mean())


@checked_arguments
def calibrate(
    components: ComponentLogits,
    *,
    method: str = SCRIPT,
    penalty: float | int | None = None,
    folds: int = 4,
    seed: int = 0,
) -> Calibration:
    """Calib+ or vector scaling, trained on labelled prompts: `calibrate_many` of one.

    >>> import lensclust as lc
    >>> from probes import decompose
    >>> model, prompts = lc.load("native:sif-small"), lc.tasks.sif().where(split="new_string")
    >>> rows = prompts.rows.assign(label=[*"ab"] * (len(prompts) // 2))
    >>> prompts = lc.Prompts.from_token_lists(prompts.tokens.tolist(), rows)
    >>> parts = decompose(model, prompts, {"a": 3, "b": 5})
    >>> found = calibrate(parts)
    >>> found.weights.dims, len(found.predict(parts)) == len(prompts)
    (('label',), True)
    >>> calibrate(parts, method="vector scaling").gap < 1e-6
    True
    """
    return calibrate_many([components], method=method, penalty=penalty, folds=folds, seed=seed)[0]


@checked_arguments
def calibrate_many(
    components: Sequence[ComponentLogits],
    *,
    method: str = SCRIPT,
    penalty: float | int | None = None,
    folds: int = 4,
    seed: int = 0,
) -> list[Calibration]:
    """`calibrate` for each of many problems.

    Args:
        components: decomposed labelled prompts, one entry per problem.
        method: ``"script"`` (the source's), ``"converged"`` or ``"vector scaling"``.
        penalty: ``λ``; by default the one of `PENALTIES` with the lowest cross-entropy of
            held-out prompts, for each problem.
        folds: to choose the penalty, the same as those of `reweight` with this seed.
        seed: of the folds.

    Raises:
        InputError: if there is no problem, no right labels, fewer prompts than labels, an option
            is out of range, or ``"script"`` comes with a penalty.
    """
    _check(components, method, penalty, folds)
    if method == SCRIPT:
        return _scripted(components)
    return [
        _converged(each, method, None if penalty is None else float(penalty), folds, seed)
        for each in components
    ]


def _check(
    components: Sequence[ComponentLogits], method: str, penalty: float | int | None, folds: int
) -> None:
    if not components:
        raise InputError("calibrate: no components given, expected at least one problem")
    if method not in METHODS:
        raise InputError(f"calibrate: method={method!r}, expected one of {METHODS}")
    for each in components:
        if len(each.targets) < len(each.labels):
            raise InputError(
                f"calibrate: {len(each.targets)} labelled prompts for {len(each.labels)} labels, "
                "expected at least as many"
            )
    if penalty is not None and method == SCRIPT:
        raise InputError("calibrate: method='script' has no penalty, give none")
    if penalty is not None and not 0 < penalty < np.inf:
        raise InputError(f"calibrate: penalty={penalty}, expected a number above 0")
    if method != SCRIPT:
        require_folds("calibrate", folds, max(len(each.targets) for each in components))


def _scripted(components: Sequence[ComponentLogits]) -> list[Calibration]:
    """The source's schedule, for all problems as one batch."""
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
        Calibration(_by_label(row[: len(each.labels)], each))
        for row, each in zip(fitted, components, strict=True)
    ]


def _converged(
    components: ComponentLogits, method: str, penalty: float | None, folds: int, seed: int
) -> Calibration:
    n_labels, targets = len(components.labels), components.targets
    if method == CONVERGED:
        offsets = _probabilities(components).values.astype(np.float64)
        features = offsets[:, :, None] * np.eye(n_labels)
    else:
        offsets = _centred(components).values.astype(np.float64)
        biases = np.broadcast_to(np.eye(n_labels), (len(targets), n_labels, n_labels))
        features = np.concatenate([offsets[:, :, None] * np.eye(n_labels), biases], axis=2)
    frame = pd.DataFrame()
    if penalty is None:
        fold = example_folds(targets, folds, seed=seed)
        frame = _held_out(features, offsets, targets, fold)
        penalty = chosen_penalty(frame)
    # Parameters are fitted as differences from the model itself.
    found = ridge_fit(features, offsets, targets, penalty=penalty)
    weights = _by_label(1 + found.values[:n_labels], components)
    made = None if method == CONVERGED else _by_label(found.values[n_labels:], components)
    return Calibration(weights, made, method, penalty, found.gap, frame)


def _held_out(
    features: Float[np.ndarray, "example label parameter"],
    offsets: Float[np.ndarray, "example label"],
    targets: Int[np.ndarray, " example"],
    fold: Int[np.ndarray, " example"],
) -> pd.DataFrame:
    """Score of each penalty on held-out prompts."""
    losses, right = np.empty((2, len(PENALTIES), len(targets)))
    for held in np.unique(fold):
        here, values = fold == held, None
        kept = features[~here], offsets[~here], targets[~here]
        # From the largest penalty down, with warm starts.
        for place in reversed(range(len(PENALTIES))):
            values = ridge_fit(*kept, penalty=PENALTIES[place], start=values).values
            logits = offsets[here] + features[here] @ values
            chosen = np.arange(here.sum()), targets[here]
            losses[place, here] = -log_softmax(logits, axis=1)[chosen]
            right[place, here] = logits.argmax(1) == targets[here]
    return penalty_frame(PENALTIES, losses.mean(1), right.mean(1))


@checked_arguments
def select_prompt(candidates: Sequence[ComponentLogits]) -> int:
    """Index of the prompt (template, demonstrations) with the best accuracy.

    Best is the highest accuracy of the model on the labelled prompts; ties go to the lowest mean
    cross-entropy of the right label among the labels.

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


def _centred(components: ComponentLogits) -> Float[xr.DataArray, "prompt label"]:
    logits = components.model_logits
    return logits - logits.mean("label")


def _by_label(values: np.ndarray, components: ComponentLogits) -> xr.DataArray:
    return xr.DataArray(values, dims=("label",), coords={"label": components.labels})
