"""``make calibrate``: how often each p is small without a task effect, and with one; coverage.

The tables go into ``docs/calibration.md`` and ``docs/coverage.md``. ``--draws N`` takes another
number of draws, ``--only intervals`` (or ``p``) one of the two, ``--layouts`` and ``--measures``
some cells of p: the others stay as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lensclust.storage.atomic import write_atomically
from tests.calibration.coverage import LEAST, covered, intervals_page
from tests.calibration.layouts import LAYOUTS
from tests.calibration.measures import MEASURES, Measure
from tests.calibration.tables import DRAWS, page, rates

DOCS = Path(__file__).parents[2] / "docs"
PAGE, INTERVALS = DOCS / "calibration.md", DOCS / "coverage.md"


def main() -> None:
    """Simulate, print what is above its bound, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--only", choices=("p", "intervals"))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    names = {measure.__name__: measure for measure in MEASURES}
    parser.add_argument("--measures", nargs="+", choices=names, default=list(names))
    given = parser.parse_args()
    failed = given.only != "p" and _intervals(given.draws)
    if given.only != "intervals":
        failed |= _p(given.draws, given.layouts, [names[each] for each in given.measures])
    raise SystemExit(int(failed))


def _intervals(draws: int) -> bool:
    """Whether a kind of interval covers less than it should."""
    found = covered(draws)
    write_atomically(INTERVALS, intervals_page(found, draws))
    short = found[(found["covered"] < LEAST) | ~found["inside range"]]
    print(f"{len(found)} intervals, {len(short)} short of {LEAST}; {INTERVALS}")
    for row in short.itertuples():
        print(f"  {row.kind}, {row.level}: {row.covered:.3f}")
    return len(short) > 0


def _p(draws: int, layouts: Sequence[str], measures: Sequence[Measure]) -> bool:
    """Whether a p is small more often than it should be."""
    powered = max(10, draws // 4)
    found = rates(draws, powered=powered, layouts=layouts, measures=measures, told=print, jobs=-1)
    write_atomically(PAGE, page(found, draws, PAGE.read_text(encoding="utf-8")))
    wrong = found[found["wrong"]]
    print(f"{len(found)} cells, {len(wrong)} outside their bounds; {PAGE}")
    for row in wrong.itertuples():
        print(f"  {row.measure}, {row.layout}: {row.at_05:.3f} at .05, {row.at_01:.3f} at .01")
    return len(wrong) > 0


if __name__ == "__main__":
    main()
