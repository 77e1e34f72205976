"""Every p by simulation, few draws: small no more often than stated, and small with a task."""

from __future__ import annotations

import pytest
from scipy.stats import binom

from tests.calibration.coverage import LEAST, covered, intervals_page
from tests.calibration.layouts import LAYOUTS
from tests.calibration.measures import MEASURES
from tests.calibration.tables import LEAST_05, page, rates

DRAWS, AGAIN = 12, 250


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["nested", "crossed", "repeated inputs"])
def test_p_is_small_as_often_as_stated_and_more_often_with_a_task(layout):
    found = rates(DRAWS, powered=4, again=AGAIN, layouts=[layout])
    # At the bound itself, more than this comes up once in 10,000 cells.
    assert (found["at_05"] * found["draws"] <= binom.ppf(1 - 1e-4, found["draws"], 0.08)).all()
    able = found[found["smallest"] <= 0.02].set_index("measure")["found"]
    assert (able > LEAST_05).mean() > 0.8
    assert able["cluster, cross_wording_ari, within input"] > 0.5


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_stated():
    found = covered(150)
    # At the bound itself, fewer than this come up once in 10,000 cells.
    assert (found["covered"] * 150 >= binom.ppf(1e-4, 150, LEAST)).all()
    assert found["inside range"].all()
    assert "| ordered pairs of 3 tasks |" in intervals_page(found, 150)


def test_the_page_has_every_measure_and_says_where_a_layout_is_too_small():
    found = rates(2, powered=2, layouts=["few wordings"], measures=MEASURES[1:3])
    text = page(found, 2)
    assert "| nearest_neighbour |" in text
    assert "– (p ≥ 0.33)" in text
    assert all(layout.what in text for layout in LAYOUTS.values())
    assert page(found[:0], 2, text) == text  # what is not drawn again stays
