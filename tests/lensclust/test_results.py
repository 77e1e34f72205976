"""Claims: verdicts follow from intervals, and can go either way."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lensclust.results import decide
from lensclust.stats import mean_interval, permutation_p

WHO = {"source": "here", "origin": "extension", "control": {"none": 0.0}}
measured = st.lists(st.floats(-5, 5), min_size=2, max_size=8)


@given(measured, st.floats(-5, 5))
def test_the_verdict_is_where_the_interval_lies(values, bound):
    claim = decide("x", "x", values, at_least=bound, **WHO)
    low, high = claim.ci95
    expected = "supported" if low >= bound else "contradicted" if high < bound else "inconclusive"
    assert claim.verdict == expected
    opposite = decide("x", "x", [-v for v in values], at_most=-bound, **WHO)
    assert opposite.verdict == expected
    assert claim.estimate == pytest.approx(np.mean(values))
    assert claim.n_seeds == len(values)


@given(measured)
def test_the_interval_is_that_of_a_t_test(values):
    mean, low, high = mean_interval(np.array(values))
    if len(set(values)) > 1 and np.std(values) > 1e-6:
        expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        np.testing.assert_allclose((low, high), expected, rtol=1e-6, atol=1e-9)
    assert low <= mean + 1e-9
    assert mean <= high + 1e-9


def test_one_value_decides_nothing():
    claim = decide("x", "x", [0.99], at_least=0.1, **WHO)
    assert claim.verdict == "inconclusive"
    assert all(map(math.isnan, claim.ci95))
    assert json.loads(json.dumps(claim.to_json()))["ci95"] == [None, None]


@pytest.mark.parametrize("bounds", [{}, {"at_least": 0, "at_most": 1}])
def test_a_rule_has_one_bound(bounds):
    with pytest.raises(ValueError, match="exactly one of"):
        decide("x", "x", [1.0, 2.0], **bounds, **WHO)
    with pytest.raises(ValueError, match="no value"):
        decide("x", "x", [], at_least=0, **WHO)


@given(st.integers(0, 1000))
def test_p_values_of_noise_are_no_smaller_than_they_should_be(seed):
    null = np.random.default_rng(seed).normal(size=(200, 100))
    p = permutation_p(null[:, 0], null[:, 1:])
    assert (p >= 0.01).all()
    assert (p <= 0.05).mean() < 0.15
