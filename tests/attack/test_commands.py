"""A few of the lines that ``python -m tests.attack.commands`` gives to the command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_wrong_command_lines_are_one_line_and_write_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.attack.commands", "--tries", "100"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert " 0 otherwise" in done.stdout
