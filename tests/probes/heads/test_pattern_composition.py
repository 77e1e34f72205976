"""Planted combinations are found, noise is not, and R² is scikit-learn's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from sklearn.dummy import DummyRegressor
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict

from lensclust.errors import InputError
from probes.heads.composition import compose

BLOCKS, HEADS = 8, 6


def changes(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, BLOCKS, HEADS))


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    planted=st.lists(st.floats(0.1, 3), min_size=1, max_size=3),
    nonnegative=st.booleans(),
    unit=st.sampled_from([1e-8, 1.0, 1e6]),
)
def test_planted_coefficients_come_back(
    seed: int, planted: list[float], nonnegative: bool, unit: float
) -> None:
    basis = unit * changes(len(planted), seed)
    change = np.tensordot(planted, basis, 1) + 0.5 * unit
    found = compose(change, list(basis), nonnegative=nonnegative, nulls=19)
    np.testing.assert_allclose(found.coefficients["value"], planted, rtol=1e-6)
    np.testing.assert_allclose(found.shares(), np.divide(planted, sum(planted)), rtol=1e-6)
    assert found.intercept == pytest.approx(0.5 * unit)
    assert found.r2 == pytest.approx(1)
    assert found.r2_out == pytest.approx(1)
    random = found.frame.query("null == 'random'")
    assert (random["p"] == 0.05).all()


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("folds", [None, 3])
def test_fits_and_scores_are_those_of_scikit_learn(nonnegative: bool, folds: int | None) -> None:
    basis, noise = changes(3, 1), changes(1, 2)[0]
    change = basis[0] - 0.7 * basis[1] + 0.4 * basis[2] + noise
    found = compose(change, list(basis), nonnegative=nonnegative, folds=folds, nulls=2)
    rows, target = basis.reshape(3, -1).T, change.ravel()
    model = LinearRegression(positive=nonnegative).fit(rows, target)
    np.testing.assert_allclose(found.coefficients["value"], model.coef_, atol=1e-9)
    assert found.intercept == pytest.approx(float(model.intercept_))
    assert found.r2 == pytest.approx(model.score(rows, target))
    held = np.concatenate(
        [np.full(len(p), i) for i, p in enumerate(np.array_split(range(BLOCKS), folds or BLOCKS))]
    )
    options: dict[str, Any] = {"groups": np.repeat(held, HEADS), "cv": LeaveOneGroupOut()}
    predicted = cross_val_predict(LinearRegression(positive=nonnegative), rows, target, **options)
    plain = cross_val_predict(DummyRegressor(), rows, target, **options)
    error = ((target - predicted) ** 2).sum()
    assert found.r2_out == pytest.approx(1 - error / ((target - plain) ** 2).sum())
    assert found.r2_out < r2_score(target, model.predict(rows))
    assert found.folds["fold"].tolist() == held.tolist()
    assert found.folds["error"].sum() == pytest.approx(error)


@pytest.mark.slow
def test_in_noise_p_is_small_no_more_often_than_it_says() -> None:
    """A change that has nothing to do with its bases, whatever they have to do with each other."""
    small = dict.fromkeys(["random", "permuted"], 0)
    outside = 0
    for seed in range(40):
        basis = changes(3, seed)
        basis[2] += basis[1]
        found = compose(changes(1, seed + 10_000)[0], list(basis), nulls=39, seed=seed)
        p = found.frame.query("metric == 'r2_out'").set_index("null")["p"]
        small = {null: count + bool(p[null] <= 0.05) for null, count in small.items()}
        outside += found.r2_out > 0.1
    # Binomial(40, 0.05): more than 9 has a probability below 1 in 10,000.
    assert stats.binom.sf(9, 40, 0.05) < 1e-4
    assert max(small.values()) <= 9
    assert outside <= 2


def test_a_change_that_all_share_is_no_composition() -> None:
    """What fine-tuning does anyway gives a high R² with any bases, and does not pass `shared`."""
    rng = np.random.default_rng(0)
    common = rng.standard_normal((BLOCKS, HEADS))
    others = common + 0.3 * changes(6, 1)
    own = others[0] + 0.3 * changes(1, 2)[0]
    unrelated = compose(own, list(others[4:]), shared=others[1:].mean(0)).frame
    unrelated = unrelated.set_index(["null", "metric"])
    assert unrelated.loc[("random", "r2_out"), "value"] > 0.5
    assert unrelated.loc[("random", "r2_out"), "p"] <= 0.05
    assert unrelated.loc[("shared", "r2_out"), "p"] > 0.05
    mixed = 0.8 * others[4] + 0.2 * others[5]
    related = compose(mixed, list(others[4:]), shared=others[:4].mean(0)).frame
    related = related.set_index(["null", "metric"])
    assert related.loc[("shared", "r2_out"), "p"] <= 0.05


def test_a_profile_over_layers_alone_does_not_pass_permuted_heads() -> None:
    profile = np.linspace(0, 5, BLOCKS)[:, None]
    basis, change = profile + changes(2, 3), profile + changes(1, 4)[0]
    found = compose(change, list(basis)).frame.set_index(["null", "metric"])
    assert found.loc[("random", "r2_out"), "p"] <= 0.05
    assert found.loc[("permuted", "r2_out"), "p"] > 0.05


def test_coefficients_that_would_fall_below_zero_stay_there() -> None:
    basis = changes(2, 5)
    free = compose(basis[0] - basis[1], list(basis), nulls=2)
    bound = compose(basis[0] - basis[1], list(basis), nulls=2, nonnegative=True)
    assert free.coefficients["value"].tolist() == pytest.approx([1, -1])
    assert bound.coefficients["value"].tolist()[1] == 0
    assert bound.r2 < free.r2
    assert bound.shares().tolist() == [1, 0]
    with pytest.raises(InputError, match="expected none below 0"):
        free.shares()
    with pytest.raises(InputError, match="expected none below 0 and one above"):
        compose(-basis[0], list(basis[:1]), nulls=2, nonnegative=True).shares()


def test_a_single_basis_is_its_own_shared_change() -> None:
    basis = changes(1, 6)
    found = compose(basis[0] + changes(1, 7)[0], {"only": basis[0]}, nulls=2)
    shared = found.frame.query("null == 'shared' and metric == 'r2_out'").iloc[0]
    assert shared["null_mean"] == pytest.approx(found.r2_out)
    assert shared["p"] == 1
    assert "only" in repr(found)


def test_wrong_input_is_one_clear_line() -> None:
    change, basis = changes(1, 8)[0], list(changes(2, 9))
    hole = change.copy()
    hole[3, 1] = np.nan
    for given_change, given_basis, options, message in [
        (change, [], {}, "no basis given"),
        (change, [basis[0][:, :2]], {}, r"'0' has \(8, 2\) blocks and heads, the change \(8, 6\)"),
        (change.ravel(), basis, {}, "the change has 1 axes"),
        (hole, basis, {}, "the change is not finite at head 3.1"),
        (change, {"a": basis[0], "b": hole}, {}, "basis 'b' is not finite at head 3.1"),
        (change, {"a": 0 * change}, {}, "basis 'a' is the same at every head"),
        (0 * change, basis, {}, "the change is the same at every head"),
        (change, basis, {"names": ["a"]}, "2 bases, but 1 names"),
        (change, basis, {"names": ["a", "a"]}, "2 bases, but 1 names"),
        (change, {"a": basis[0]}, {"names": ["a"]}, "names given twice"),
        (change, basis, {"folds": 1}, "1 folds of 8 layers"),
        (change, basis, {"folds": 9}, "9 folds of 8 layers"),
        (change, basis, {"nulls": 1}, "nulls=1, expected at least 2"),
        (change[:2, :2], [b[:2, :2] for b in basis], {}, "2 bases and an intercept, but only 2"),
    ]:
        with pytest.raises(InputError, match=message) as raised:
            compose(given_change, given_basis, **options)
        assert "\n" not in str(raised.value)
