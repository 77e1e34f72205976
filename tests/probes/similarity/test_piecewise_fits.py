"""Change points: ruptures' dynamic program, planted breaks found, noise left whole."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.interpolate import make_lsq_spline

import lensclust as lc
from probes import change_points
from probes.similarity.piecewise_fits import _placements


def noisy(curve, *, seed: int, spread: float = 0.03, curves: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    levels = 1 + 0.2 * rng.normal(size=curves)
    return np.outer(curve, levels) + spread * rng.normal(size=(len(curve), curves))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.integers(0, 2))
def test_levels_equal_the_dynamic_program_of_ruptures(seed, k):
    ruptures = pytest.importorskip("ruptures", reason="ruptures is not installed")
    curves = np.random.default_rng(seed).normal(size=(9, 2))
    search = ruptures.Dynp(model="l2", min_size=2, jump=1).fit(curves)
    expected = search.predict(n_bkps=k) if k else [9]
    edges = [0, *expected]
    squares = sum(((curves[a:b] - curves[a:b].mean(0)) ** 2).sum() for a, b in pairwise(edges))
    p = 2 * (k + 1) + k + 1
    bic = 18 * np.log(squares / 18) + p * np.log(18) * 18 / (18 - p - 2)
    fit = change_points(curves, shapes=["constant"], most=k)
    assert fit.bic <= bic + 1e-9
    if len(fit.breaks) == k:
        assert list(fit.breaks) == expected[:-1]


def test_lines_that_meet_equal_a_least_squares_spline_of_scipy():
    x, y = np.arange(10.0), np.random.default_rng(0).normal(size=(10, 2))
    y[4:] += 5 * (x[4:, None] - 4)
    fit = change_points(y, at=x, shapes=["linear"], most=1)
    assert len(fit.breaks) == 1
    spline = make_lsq_spline(x, y, [x[0], x[0], fit.breaks[0], x[-1], x[-1]], k=1)
    np.testing.assert_allclose(fit.fitted, spline(x), atol=1e-8)


@pytest.mark.parametrize(
    ("curve", "shape", "breaks"),
    [
        ([0.9] * 4 + [0.4] * 4, "constant", (5,)),
        ([0.9] * 3 + [0.5] * 2 + [0.1] * 3, "constant", (4, 6)),
        ([0.9] * 4 + [0.9, 0.7, 0.5, 0.3, 0.1], "linear", (5,)),
        ([0.6] * 8, "constant", ()),
        (np.linspace(0.1, 0.9, 8), "linear", ()),
    ],
)
def test_planted_breaks_are_found_and_others_are_not(curve, shape, breaks):
    fits = [change_points(noisy(curve, seed=s), at=range(1, len(curve) + 1)) for s in range(40)]
    right = [fit.shape == shape and fit.breaks == breaks for fit in fits]
    assert np.mean(right) > 0.8


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.floats(0.1, 10), st.floats(-5, 5))
def test_scale_and_shift_do_not_move_the_breaks(seed, scale, shift):
    curves = noisy([0.9] * 4 + [0.4] * 4, seed=seed)
    assert change_points(curves).breaks == change_points(scale * curves + shift).breaks


def test_curves_without_noise_are_fitted_by_the_fewest_pieces():
    assert change_points(np.ones((8, 2))).breaks == ()
    assert change_points(np.repeat([[1.0], [0.5]], 4, axis=0)).breaks == (4,)
    assert max(len(starts) for starts in _placements(8, 3)) == 3


@pytest.mark.parametrize(
    ("curves", "options", "message"),
    [
        (np.ones((5, 1)), {}, "5 points for most=2 breaks, expected at least 6"),
        (np.ones((8, 1)), {"most": -1}, "most=-1"),
        (np.ones((8, 1)), {"shapes": ["cubic"]}, "shapes=.'cubic'., expected some of"),
        (np.ones((8, 1)), {"at": [0] * 8}, "expected 8 rising numbers"),
        (np.full((8, 1), np.nan), {}, "a value is NaN"),
    ],
)
def test_wrong_options_are_one_clear_line(curves, options, message):
    with pytest.raises(lc.InputError, match=message):
        change_points(curves, **options)
