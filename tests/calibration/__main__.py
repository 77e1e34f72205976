"""``make calibrate``: how often each p is small without a task effect, and with one.

The table goes into ``docs/calibration.md``. ``--draws N`` takes another number of draws.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lensclust.run_directory import write_atomically
from tests.calibration.tables import DRAWS, page, rates

PAGE = Path(__file__).parents[2] / "docs" / "calibration.md"


def main() -> None:
    """Simulate, print what is above its bound, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=DRAWS)
    draws = parser.parse_args().draws
    found = rates(draws, powered=max(10, draws // 4), told=print)
    write_atomically(PAGE, page(found, draws))
    wrong = found[found["wrong"]]
    print(f"{len(found)} cells, {len(wrong)} outside their bounds; {PAGE}")
    for row in wrong.itertuples():
        print(f"  {row.measure}, {row.layout}: {row.at_05:.3f} at .05, {row.at_01:.3f} at .01")
    raise SystemExit(int(len(wrong) > 0))


if __name__ == "__main__":
    main()
