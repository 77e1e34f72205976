"""Claims: verdicts follow from intervals, and can go either way."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from lensclust.results.claims import corrected, decide, decide_over_all
from lensclust.results.statistics import agreement, holm, q_values

WHO = {"source": "here", "origin": "extension", "control": {"none": 0.0}}
measured = st.lists(st.floats(-5, 5), min_size=2, max_size=8)


@given(measured, st.floats(-5, 5), st.floats(0, 2))
def test_the_verdict_is_where_the_interval_lies(values, bound, margin):
    claim = decide("x", "x", values, at_least=bound, margin=margin, **WHO)
    low, high = claim.ci95[0] - bound, claim.ci95[1] - bound
    if low >= margin:
        expected = "supported"
    elif high < -margin:
        expected = "contradicted"
    elif low >= -margin and high <= margin:
        expected = "negligible"
    else:
        expected = "inconclusive"
    assert claim.verdict == expected
    opposite = decide("x", "x", [-v for v in values], at_most=-bound, margin=margin, **WHO)
    assert opposite.verdict == expected
    assert opposite.p == pytest.approx(claim.p)
    assert claim.estimate == pytest.approx(np.mean(values))
    assert claim.n_seeds == claim.n == len(values)
    assert claim.spread == (min(values), max(values))


@given(measured, st.floats(-5, 5), st.floats(0, 2))
def test_p_and_interval_say_the_same(values, bound, margin):
    claim = decide("x", "x", values, at_least=bound, margin=margin, **WHO)
    outside = claim.ci95[0] > bound + margin or claim.ci95[1] < bound - margin
    if abs(claim.p - 0.05) > 1e-6:
        assert (claim.p < 0.05) == outside


def test_one_value_decides_nothing():
    claim = decide("x", "x", [0.99], at_least=0.1, **WHO)
    assert claim.verdict == "inconclusive"
    assert all(map(math.isnan, claim.ci95))
    said = json.loads(json.dumps(claim.to_json()))
    assert said["ci95"] == [None, None]
    assert said["p"] is None


@pytest.mark.parametrize("bounds", [{}, {"at_least": 0, "at_most": 1}])
def test_a_rule_has_one_bound(bounds):
    with pytest.raises(ValueError, match="exactly one of"):
        decide("x", "x", [1.0, 2.0], **bounds, **WHO)
    with pytest.raises(ValueError, match="no value"):
        decide("x", "x", [], at_least=0, **WHO)


# -- several nulls, several claims --------------------------------------------------------


def test_the_largest_of_equal_nulls_is_no_evidence_either_way():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(300):
        own, *nulls = rng.normal(size=(7, 5))
        named = {str(index): null for index, null in enumerate(nulls)}
        found.append(decide_over_all("x", "x", own, named, **WHO).verdict)
    assert np.mean([verdict == "supported" for verdict in found]) <= 0.05
    assert np.mean([verdict == "contradicted" for verdict in found]) <= 0.08


def test_what_lies_above_every_null_is_found_and_what_lies_below_one_is_refuted():
    rng = np.random.default_rng(0)
    nulls = {name: rng.normal(scale=0.1, size=6) for name in "abc"}
    above = decide_over_all("x", "x", 2 + rng.normal(scale=0.1, size=6), nulls, **WHO)
    assert above.verdict == "supported"
    assert {"p against a", "p against b", "p against c"} <= set(above.control)
    below = decide_over_all("x", "x", nulls["a"] - 2, nulls, **WHO)
    assert (below.verdict, below.p) == ("contradicted", 1.0)
    alone = decide_over_all("x", "x", [1.0], {"a": [0.0], "b": [0.5]}, **WHO)
    assert alone.verdict == "inconclusive"
    assert math.isnan(alone.p)
    with pytest.raises(ValueError, match="no null"):
        decide_over_all("x", "x", [1.0, 2.0], {}, **WHO)


def test_claims_of_a_run_are_corrected_together():
    claims = [
        decide(str(index), "x", np.array([1, 2, 3.0]) + index, at_least=0, **WHO)
        for index in range(4)
    ]
    claims.append(decide("alone", "x", [1.0], at_least=0, **WHO))
    found = corrected(claims)
    p = [claim.p for claim in claims]
    np.testing.assert_allclose([claim.q for claim in found], q_values(p))
    assert [claim.holds_corrected for claim in found] == (holm(p) <= 0.05).tolist()
    assert not found[-1].holds_corrected


def test_units_shared_by_values_are_named_in_the_rule():
    first, second = np.divmod(np.arange(12), 3)
    claim = decide(
        "x", "x", np.full(12, 0.5), at_least=0, scale=agreement(of=40),
        units={"input": first, "wording": second}, n_seeds=1, **WHO,
    )  # fmt: skip
    assert claim.rule == "95% interval over inputs and wordings at least 0"
    assert (claim.unit, claim.n, claim.n_seeds) == ("input and wording", 3, 1)
    assert claim.ci95[1] - claim.ci95[0] >= 2 * agreement(of=40).step
