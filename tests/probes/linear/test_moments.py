"""Probes from moments: scikit-learn's coefficients and predictions, whatever the data look like."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import ortho_group
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.neighbors import NearestCentroid

from probes.linear.logistic import logistic
from probes.linear.moments import SOLVERS, Moments, Readout

WORLD = st.fixed_dictionaries(
    {
        "n": st.integers(12, 60),
        "d": st.integers(2, 80),
        "classes": st.integers(2, 5),
        "penalty": st.sampled_from([1e-3, 0.1, 1.0]),
        "mean": st.sampled_from([0.0, 1e3]),
        "seed": st.integers(0, 999),
    }
)


def world(n, d, classes, mean, seed, penalty=0.1):
    """Rows of unequal features around class means, one feature constant; every class occurs."""
    rng = np.random.default_rng(seed)
    codes = rng.permutation(np.arange(n) % classes)
    x = rng.normal(size=(n, d)) + rng.normal(size=(classes, d))[codes]
    x = x * np.geomspace(3, 0.3, d) + mean
    x[:, 0] = 7.3
    return x, codes


def gather(x, codes, *, fold=None, cuts=(), classes=None) -> Moments:
    codes = codes if codes.ndim == 2 else codes[:, None]
    fold = np.zeros(len(x), dtype=int) if fold is None else fold
    moments = Moments(n_folds=int(fold.max()) + 1, n_classes=classes or int(codes.max()) + 1)
    for part in np.split(np.arange(len(x)), cuts):
        if len(part):
            moments.update(x[part], codes[part], fold[part])
    return moments


def alpha(x, penalty) -> float:
    return penalty * float(np.square(x - x.mean(0)).sum()) / x.shape[1]


def per_class(coefficients, intercepts):
    """Scores are only compared with each other: take away what all classes share."""
    weights, offsets = np.atleast_2d(coefficients), np.atleast_1d(intercepts)
    if len(weights) == 1:
        weights, offsets = np.vstack([-weights, weights]) / 2, np.array([-1, 1]) * offsets / 2
    return weights - weights.mean(0), offsets - offsets.mean()


def sklearn_ridge(x, codes, penalty):
    return RidgeClassifier(alpha=alpha(x, penalty), solver="svd").fit(x, codes)


def sklearn_lda(x, codes, penalty):
    shrinkage = penalty / (1 + penalty)
    return LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x, codes)


def sklearn_nearest(x, codes, penalty):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a feature is constant
        return NearestCentroid().fit(x, codes)


ORACLES = {"ridge": sklearn_ridge, "lda": sklearn_lda, "mass_mean": sklearn_nearest}


def same_weights(readout: Readout, fitted, *, halved: bool) -> None:
    """With two classes scikit-learn's ridge keeps one row, ours the same row with both signs."""
    weights, offsets = readout.affine()
    expected, constants = per_class(fitted.coef_, fitted.intercept_)
    factor = 2 if halved and len(fitted.classes_) == 2 else 1
    scale = np.abs(expected).max()
    centred, shifts = per_class(weights, offsets)
    np.testing.assert_allclose(centred, factor * expected, rtol=1e-4, atol=1e-7 * scale)
    np.testing.assert_allclose(shifts, factor * constants, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", SOLVERS)
@settings(max_examples=60, deadline=None)
@given(drawn=WORLD)
def test_equal_to_scikit_learn(kind, drawn):
    x, codes = world(**drawn)
    readout = SOLVERS[kind](gather(x, codes).training(), drawn["penalty"])
    fitted = ORACLES[kind](x, codes, drawn["penalty"])
    if kind != "mass_mean":
        same_weights(readout, fitted, halved=kind == "ridge")
    new, _ = world(**(drawn | {"seed": drawn["seed"] + 1}))
    assert (readout(new)[:, 0] == fitted.predict(new)).all()


@settings(max_examples=15, deadline=None)
@given(drawn=WORLD)
def test_logistic_equals_scikit_learn(drawn):
    x, codes = world(**(drawn | {"mean": 0.0, "d": min(drawn["d"], 20)}))
    readout, converged = logistic(x, codes, drawn["penalty"], n_classes=drawn["classes"])
    fitted = LogisticRegression(
        C=1 / alpha(x, drawn["penalty"]), solver="newton-cg", tol=1e-10, max_iter=1000
    ).fit(x, codes)
    assert converged
    weights, offsets = per_class(*readout.affine())
    expected, constants = per_class(fitted.coef_, fitted.intercept_)
    np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(offsets, constants, rtol=1e-3, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(drawn=WORLD, cuts=st.lists(st.integers(1, 59), max_size=4))
def test_batches_folds_and_labellings_do_not_matter(drawn, cuts):
    """However rows arrive, a training set's moments are those of its rows and labels alone."""
    x, codes = world(**drawn)
    rng = np.random.default_rng(drawn["seed"])
    several = np.stack([codes, rng.permutation(codes), rng.permutation(codes)], axis=1)
    fold = rng.permutation(np.arange(len(x)) % 3)
    together = gather(x, several, fold=fold, cuts=sorted(cut for cut in cuts if cut < len(x)))
    for solve in SOLVERS.values():
        readout = solve(together.training(held_out=1), drawn["penalty"])
        for labelling in range(3):
            kept = fold != 1
            alone = gather(x[kept], several[kept, labelling], classes=drawn["classes"])
            expected = solve(alone.training(), drawn["penalty"])
            scale = np.abs(expected.weights).max()
            np.testing.assert_allclose(
                readout.weights[:, :, labelling],
                expected.weights[:, :, 0],
                rtol=1e-6,
                atol=1e-8 * scale,
            )


@pytest.mark.parametrize("kind", SOLVERS)
@settings(max_examples=10, deadline=None)
@given(drawn=WORLD)
def test_rotations_units_and_names_of_classes_do_not_matter(kind, drawn):
    x, codes = world(**(drawn | {"mean": 0.0}))
    turn = ortho_group.rvs(x.shape[1], random_state=drawn["seed"])
    rename = np.random.default_rng(drawn["seed"]).permutation(drawn["classes"])
    plain = SOLVERS[kind](gather(x, codes).training(), drawn["penalty"])
    turned = SOLVERS[kind](gather(100 * x @ turn, rename[codes]).training(), drawn["penalty"])
    new, _ = world(**(drawn | {"mean": 0.0, "seed": drawn["seed"] + 1}))
    assert (rename[plain(new)] == turned(100 * new @ turn)).all()


@pytest.mark.parametrize("kind", SOLVERS)
def test_a_class_that_training_never_saw_is_never_predicted(kind):
    x, codes = world(60, 6, 4, 0.0, seed=1)
    for missing in (0, 2, 3):
        seen = codes != missing
        fold = np.where(seen, 0, 1)
        readout = SOLVERS[kind](gather(x, codes, fold=fold).training(held_out=1), 0.1)
        expected = ORACLES[kind](x[seen], codes[seen], 0.1).predict(x)
        assert (readout(x)[:, 0] == expected).all()
        by_hand, _ = logistic(x[seen], codes[seen], 0.1, n_classes=4)
        assert missing not in by_hand(x)


@pytest.mark.parametrize("kind", SOLVERS)
def test_constant_activations_and_collapsed_classes(kind):
    codes = np.array([0] * 5 + [1] * 9 + [2] * 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nothing = SOLVERS[kind](gather(np.full((20, 4), 0.1), codes).training(), 0.1)
        points = np.random.default_rng(0).normal(size=(3, 8))[codes]
        collapsed = SOLVERS[kind](gather(points, codes).training(), 0.1)
    assert not nothing.weights.any()
    if kind != "mass_mean":  # which knows no frequencies, and takes the first of equals
        assert (nothing(np.full((2, 4), 0.1)) == 1).all()
    assert np.isfinite(collapsed.weights).all()
    assert (collapsed(points)[:, 0] == codes).all()


def test_constant_activations_leave_logistic_the_frequencies():
    readout, converged = logistic(np.full((5, 3), 0.1), np.array([0, 1, 1, 1, 2]), 0.1, n_classes=3)
    assert converged
    assert (readout(np.full((2, 3), 0.1)) == 1).all()


def test_half_precision_rows_are_added_in_full_precision():
    x, codes = world(50, 5, 3, 100.0, seed=2)
    half = x.astype(np.float16)
    readout = SOLVERS["ridge"](gather(half, codes).training(), 0.1)
    same_weights(readout, sklearn_ridge(half.astype(np.float64), codes, 0.1), halved=True)
