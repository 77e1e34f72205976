"""A few of the calls that ``python -m tests.attack.values`` makes many of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_wrong_values_are_results_or_one_line() -> None:
    """Without the types that tests check: as users call them."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.attack.values", "--tries", "150"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert " 0 foreign, 0 longer" in done.stdout
