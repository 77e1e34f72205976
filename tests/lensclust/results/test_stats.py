"""Intervals, corrections and permutation p-values, against scipy and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import stats

from lensclust.results.statistics import (
    Scale,
    correlation,
    holm,
    mean_interval,
    mean_of,
    permutation_p,
    q_values,
    share,
)

measured = st.lists(st.floats(-5, 5), min_size=2, max_size=8)


@given(measured)
def test_the_interval_is_that_of_a_t_test(values):
    mean, low, high = mean_interval(np.array(values))
    if len(set(values)) > 1 and np.std(values) > 1e-6:
        expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        np.testing.assert_allclose((low, high), expected, rtol=1e-6, atol=1e-9)
    assert low <= mean + 1e-9
    assert mean <= high + 1e-9


@given(
    st.lists(st.integers(0, 40), min_size=2, max_size=8),
    st.sampled_from([share(of=40), Scale(-1.0, 1.0, 0.05), Scale(-3.0, 1.0, 0.1)]),
)
def test_an_interval_stays_in_the_range_and_is_no_narrower_than_a_step(steps, scale):
    values = scale.low + np.array(steps) * (scale.high - scale.low) / 40
    found = mean_of(values, scale=scale)
    assert scale.low <= found.low <= found.value <= found.high <= scale.high
    assert found.low <= max(scale.low, found.value - scale.step) + 1e-12
    assert found.high >= min(scale.high, found.value + scale.step) - 1e-12


def test_values_outside_their_range_are_refused():
    with pytest.raises(ValueError, match="expected 0 to 1"):
        mean_of([0.5, 1.2], scale=share(of=10))
    with pytest.raises(ValueError, match="no value"):
        mean_of([])


@given(st.permutations(list(range(12))), st.integers(0, 50))
def test_units_of_one_kind_count_once(order, seed):
    rng = np.random.default_rng(seed)
    units = np.repeat(list("abcd"), 3)
    values = rng.normal(size=12)
    expected = mean_of(values.reshape(4, 3).mean(1))
    found = mean_of(values[order], units={"seed": units[order]})
    assert (found.n, found.value) == (4, pytest.approx(expected.value))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_crossed_units_are_not_taken_for_independent_values():
    rng = np.random.default_rng(0)
    task, word = np.divmod(np.arange(60), 6)
    values = rng.normal(size=10)[task] + rng.normal(size=6)[word] + 0.1 * rng.normal(size=60)
    alone = mean_of(values)
    crossed = mean_of(values, units={"input": task, "wording": word})
    assert crossed.n == 6
    assert crossed.high - crossed.low > 2 * (alone.high - alone.low)


def covered(draw, truth: float, *, tries: int = 400, **options) -> float:
    """Share of intervals that hold the truth; ``draw`` gives values, and units if shared."""
    found = []
    for _ in range(tries):
        values, units = draw()
        found.append(mean_of(values, units=units, draws=400, **options))
    return float(np.mean([each.low <= truth <= each.high for each in found]))


@pytest.mark.parametrize("level", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("n", [3, 5])
def test_intervals_of_shares_cover_near_floor_middle_and_ceiling(n, level):
    rng = np.random.default_rng(n)

    def chances(size: int) -> np.ndarray:
        return 1 / (1 + (1 - level) / level * np.exp(-0.8 * rng.normal(size=size)))

    def draw():
        return rng.binomial(200, chances(n)) / 200, None

    assert covered(draw, chances(200_000).mean(), scale=share(of=200)) >= 0.9


@pytest.mark.parametrize("spread", [(1, 1, 1), (0, 1, 1), (1, 0, 1), (0, 0, 1)])
def test_intervals_over_crossed_units_cover(spread):
    rng = np.random.default_rng(0)
    first, second = np.divmod(np.arange(48), 6)

    def draw():
        effects = spread[0] * rng.normal(size=8)[first] + spread[1] * rng.normal(size=6)[second]
        return effects + spread[2] * rng.normal(size=48), {"input": first, "wording": second}

    assert covered(draw, 0.0) >= 0.9


@pytest.mark.parametrize("tasks", [4, 6])
@pytest.mark.parametrize("spread", [(1, 1, 1), (1, 0, 0.2), (0, 0, 1)])
def test_intervals_over_ordered_pairs_cover(tasks, spread):
    rng = np.random.default_rng(0)
    pairs = np.array([(a, b) for a in range(tasks) for b in range(tasks) if a != b])

    def draw():
        source, target = spread[0] * rng.normal(size=tasks), spread[1] * rng.normal(size=tasks)
        noise = spread[2] * rng.normal(size=len(pairs))
        return source[pairs[:, 0]] + target[pairs[:, 1]] + noise, {"task": pairs}

    assert covered(draw, 0.0) >= 0.9


def test_rank_correlations_of_few_points_have_coarse_steps():
    for n in (3, 5, 8):
        swapped = [1, 0, *range(2, n)]
        rho = np.corrcoef(range(n), swapped)[0, 1]
        assert correlation(of=n).step == pytest.approx(1 - rho)


# -- corrections and p --------------------------------------------------------------------

p_values = st.lists(st.floats(0.0001, 1), min_size=1, max_size=12)


@given(p_values)
def test_q_is_scipys_and_what_was_not_tested_counts_for_nothing(p):
    np.testing.assert_allclose(q_values(p), stats.false_discovery_control(p))
    np.testing.assert_array_equal(q_values([*p, np.nan])[:-1], q_values(p))
    np.testing.assert_array_equal(holm([*p, np.nan])[:-1], holm(p))
    assert np.isnan(holm([*p, np.nan])[-1])


@given(p_values)
def test_holm_rejects_what_its_steps_reject(p):
    rejected, order = set(), np.argsort(p)
    for rank, index in enumerate(order):
        if p[index] > 0.05 / (len(p) - rank):
            break
        rejected.add(int(index))
    found = holm(p)
    clear = [i for i in range(len(p)) if abs(found[i] - 0.05) > 1e-9]
    assert {i for i in clear if found[i] <= 0.05} == rejected & set(clear)


def test_no_effect_is_seldom_found_among_many():
    rng = np.random.default_rng(0)
    found = [holm(rng.uniform(size=20)).min() <= 0.05 for _ in range(400)]
    assert np.mean(found) < 0.09


@given(st.integers(0, 1000))
def test_p_values_of_noise_are_no_smaller_than_they_should_be(seed):
    null = np.random.default_rng(seed).normal(size=(200, 100))
    p = permutation_p(null[:, 0], null[:, 1:])
    assert (p >= 0.01).all()
    assert (p <= 0.05).mean() < 0.15
