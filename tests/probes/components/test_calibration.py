"""Calibration to convergence is the minimum that others find, on the folds of reweighting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings, strategies as st
from jaxtyping import Float
from scipy.optimize import minimize
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from torch import nn

from lensclust.errors import InputError
from probes.components.calibration import METHODS, PENALTIES, calibrate, calibrate_many
from probes.components.component_logits import ComponentLogits
from probes.components.labelled_examples import Examples
from probes.components.penalties import example_folds
from probes.components.reweighting import PENALTIES as THEIRS, reweight
from probes.components.sparse_fits import sparse_fits
from tests.probes.components.test_components import planted

FITTED = METHODS[1:]


def parts_of(logits: Float[np.ndarray, "prompt label"], targets: np.ndarray) -> ComponentLogits:
    """Prompts whose model logits are given, from one component."""
    labels = [f"l{i}" for i in range(logits.shape[1])]
    data = xr.Dataset(
        {
            "logits": (("prompt", "component", "label"), logits[:, None].astype("f4")),
            "model_logits": (("prompt", "label"), logits.astype("f4")),
        },
        {
            "component": ["head 0.0"],
            "label": labels,
            "kind": ("component", ["head"]),
            "block": ("component", [0]),
            "head": ("component", [0]),
            "target": ("prompt", np.array(labels, dtype=object)[targets]),
        },
    )
    return ComponentLogits(data=data, error=0.0)


def draw(seed: int, n: int = 40, labels: int = 3, bias: float = 2.0) -> ComponentLogits:
    """A model that knows something and is biased towards the first label."""
    rng = np.random.default_rng(seed)
    targets = rng.permutation(np.arange(n) % labels)
    logits = rng.normal(size=(n, labels)) + 1.0 * np.eye(labels)[targets] + 5
    logits[:, 0] += bias
    return parts_of(logits, targets)


def objective(
    method: str, parts: ComponentLogits, penalty: float, values: torch.Tensor
) -> torch.Tensor:
    """What is to be minimised, in plain torch; scales first, then biases."""
    z = torch.tensor(parts.model_logits.values).double()
    y, k = torch.tensor(parts.targets), z.shape[1]
    if method == "converged":
        logits, far = z.softmax(1) * values, values - 1
    else:
        logits = (z - z.mean(1, keepdim=True)) * values[:k] + values[k:]
        far = torch.cat([values[:k] - 1, values[k:]])
    return nn.functional.cross_entropy(logits, y) + penalty / 2 * far.square().sum()


def values_of(found: Any) -> torch.Tensor:
    parts = [found.weights] if found.biases is None else [found.weights, found.biases]
    return torch.tensor(np.concatenate([each.values for each in parts])).double()


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 999),
    labels=st.integers(2, 5),
    method=st.sampled_from(FITTED),
    penalty=st.sampled_from(PENALTIES),
)
def test_the_minimum_is_that_of_an_independent_optimiser(
    seed: int, labels: int, method: str, penalty: float
) -> None:
    parts = draw(seed, labels=labels)
    found = calibrate(parts, method=method, penalty=penalty)
    size = labels * (1 if method == "converged" else 2)

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        at = torch.tensor(x, requires_grad=True)
        loss = objective(method, parts, penalty, at)
        loss.backward()
        assert at.grad is not None
        return float(loss.detach()), at.grad.numpy()

    options: Any = {"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-15, "gtol": 1e-9}
    least = minimize(value, np.full(size, 0.5), jac=True, method="L-BFGS-B", options=options)
    reached = float(objective(method, parts, penalty, values_of(found)))
    assert -1e-7 <= reached - least.fun <= found.gap + 1e-7
    assert found.gap < 1e-8
    np.testing.assert_allclose(values_of(found), least.x, atol=2e-2, rtol=1e-2)


def test_of_two_labels_and_hardly_a_penalty_vector_scaling_is_logistic_regression():
    parts = draw(3, n=200, labels=2)
    found: Any = calibrate(parts, method="vector scaling", penalty=1e-7)
    z = parts.model_logits.values.astype(float)
    known: Any = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000)
    known.fit((z[:, 1] - z[:, 0])[:, None], parts.targets)
    assert float(found.weights.mean()) == pytest.approx(known.coef_[0, 0], abs=1e-3)
    intercept = float(found.biases[1] - found.biases[0])
    assert intercept == pytest.approx(known.intercept_[0], abs=1e-3)
    scores = softmax(found.scores(parts).values, axis=1)
    expected = known.predict_proba((z[:, 1] - z[:, 0])[:, None])
    np.testing.assert_allclose(scores, expected, atol=1e-3)


def test_the_script_stops_far_from_the_minimum_that_convergence_reaches():
    """On the script's own loss, and where the model is right on all labelled prompts it stays."""
    for seed in range(5):
        parts = draw(seed)
        script = calibrate(parts)
        for penalty in PENALTIES:
            found = calibrate(parts, method="converged", penalty=penalty)
            reached, theirs = (
                float(objective("converged", parts, penalty, values_of(each)))
                for each in (found, script)
            )
            assert reached <= theirs + 1e-9
    targets = np.tile([0, 1], 10)
    right = parts_of(np.eye(2)[targets] * [[1.0, 3.0]], targets)
    assert np.abs(calibrate(right).weights - 1).max() < 1e-6
    assert np.abs(calibrate(right, method="converged").weights - 1).max() > 1


@pytest.mark.parametrize("method", FITTED)
def test_the_penalty_is_chosen_on_the_folds_of_reweighting(method):
    parts = planted().take(range(26))
    folds = example_folds(parts.targets, 4, seed=5)
    assert sorted(np.bincount(folds)) == [6, 6, 7, 7]
    for label in range(2):
        counts = np.bincount(folds[parts.targets == label], minlength=4)
        assert counts.max() - counts.min() <= 1
    # Fitted fold by fold through the public function, which gets its penalty then.
    found = calibrate(parts, method=method, seed=5)
    losses = []
    for penalty in PENALTIES:
        each = np.empty(26)
        for fold in range(4):
            fit = calibrate(
                parts.take(np.flatnonzero(folds != fold)), method=method, penalty=penalty
            )
            held = np.flatnonzero(folds == fold)
            logits = torch.tensor(fit.scores(parts.take(held)).values)
            targets = torch.tensor(parts.targets[held])
            each[held] = nn.functional.cross_entropy(logits, targets, reduction="none").numpy()
        losses.append(each.mean())
    np.testing.assert_allclose(found.frame["cross_entropy"], losses, atol=1e-5)
    assert found.penalty == PENALTIES[int(np.argmin(losses))]
    # And reweighting's frame is what the same folds give.
    kinds = parts.data["kind"].values
    writers = np.isin(kinds, ("head", "mlp"))
    values = parts.logits.transpose("prompt", "label", "component").values
    examples = Examples.of([values[..., writers]], [values[..., ~writers].sum(-1)], [parts.targets])
    theirs = []
    for penalty in THEIRS:
        total = 0.0
        for fold in range(4):
            kept = torch.tensor(folds != fold).float()
            shares = (kept / kept.sum())[None, :, None]
            fit = sparse_fits(examples, shares, torch.tensor([[penalty]]), tolerance=1e-3)
            loss = examples.losses(examples.logits(fit.weights))[0, :, 0]
            total += float((loss * (1 - kept)).sum())
        theirs.append(total / 26)
    np.testing.assert_allclose(reweight(parts, seed=5).frame["cross_entropy"], theirs, atol=1e-4)


@pytest.mark.parametrize("method", FITTED)
def test_a_bias_is_calibrated_away_and_shuffled_labels_teach_nothing(method):
    plain, true, shuffled = [], [], []
    for seed in range(20):
        few, rest = draw(seed, n=24), draw(seed + 100, n=600)
        plain.append(rest.model_accuracy)
        true.append(calibrate(few, method=method).accuracy(rest))
        order = np.random.default_rng(seed).permutation(few.targets)
        wrong = parts_of(few.model_logits.values, order)
        shuffled.append(calibrate(wrong, method=method).accuracy(rest))
    assert np.mean(true) > np.mean(plain) + 0.05
    assert np.mean(true) > np.mean(shuffled) + 0.05


@pytest.mark.parametrize("method", METHODS)
def test_many_are_each_by_itself_and_the_logits_constant_does_not_matter(method):
    parts = [draw(seed, n=20 + seed, labels=2 + seed) for seed in range(3)]
    for together, each in zip(calibrate_many(parts, method=method), parts, strict=True):
        alone = calibrate(each, method=method)
        np.testing.assert_allclose(together.weights, alone.weights, atol=1e-5)
        lifted = each.model_logits.values + np.arange(len(each.targets))[:, None]
        moved = calibrate(parts_of(lifted, each.targets), method=method)
        np.testing.assert_allclose(moved.weights, alone.weights, atol=1e-2)
        assert moved.predict(each).tolist() == alone.predict(each).tolist()


def test_bad_options_are_refused_in_one_line():
    parts = draw(0)
    calls: dict[str, Any] = {
        "method='platt', expected one of": {"method": "platt"},
        "method='script' has no penalty": {"penalty": 0.1},
        "penalty=0, expected a number above 0": {"method": "converged", "penalty": 0},
        "folds=1, expected at least 2": {"method": "vector scaling", "folds": 1},
        "folds=41, expected at most 40": {"method": "converged", "folds": 41},
    }
    for words, options in calls.items():
        with pytest.raises(InputError) as caught:
            calibrate(parts, **options)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
