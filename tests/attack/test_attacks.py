"""A few of what ``python -m tests.attack.NAME`` tries many of, as users call: no types checked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("name", "tries", "said"),
    [
        pytest.param("commands", 50, " 0 otherwise", id="one line, and nothing written"),
        pytest.param("values", 150, " 0 foreign, 0 longer", id="results or one line"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(name: str, tries: int, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.attack.{name}", "--tries", str(tries)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert said in done.stdout
