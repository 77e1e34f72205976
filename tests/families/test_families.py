"""Every feature, on a tiny model of every family: right, or refused in one line; as documented.

The page is written by ``make models``; a cell that changes has to be changed there, too, so that
nothing is refused, or comes to be accepted, unnoticed.
"""

from __future__ import annotations

import pytest

from tests.families.page import FEATURES, cells, documented
from tests.families.registry import FAMILIES
from tests.families.subjects import Subject, row

# One of each kind of block: sequential, parallel, norms behind the sums, multipliers, latent
# attention, a hybrid, and one without attention.
QUICK = ("gpt_neox", "gemma2", "deepseek_v3", "lfm2")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow, id=name)
        for name in FAMILIES
    ],
)
def test_every_feature_is_right_or_refused_in_one_line_as_documented(name: str) -> None:
    found = row(Subject.of(name), FEATURES)
    faults = {feature: verdict for feature, verdict in found.items() if not verdict.acceptable}
    assert not faults
    assert cells(found) == documented()[name]
