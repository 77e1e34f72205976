"""Bars where somebody watches, one at a time, after a moment; nothing anywhere else."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a pseudo-terminal")


def shown(program: str, *, terminal: bool) -> str:
    """What a program leaves on its standard error, a terminal or a pipe."""
    command = [sys.executable, "-c", textwrap.dedent(program)]
    environment = os.environ | {"COLUMNS": "120", "TERM": "xterm-256color"}
    if not terminal:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stderr
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, env=environment, stderr=theirs, stdout=theirs) as process:
        os.close(theirs)
        said = b""
        while True:
            try:
                read = os.read(ours, 65536)
            except OSError:
                break
            if not read:
                break
            said += read
        assert process.wait() == 0
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.decode())


LONG = """
    import time
    from lensclust.progress import progress_bar
    with progress_bar("outer", total=30) as advance:
        for _ in range(30):
            with progress_bar("inner", total=1) as inside:
                time.sleep(0.06)
                inside()
            advance()
"""


def test_a_bar_has_a_rate_and_a_time_and_hides_those_inside_it() -> None:
    said = shown(LONG, terminal=True)
    assert re.search(r"outer .*\d+/30 .*\d/s 0:00:0\d 0:00:0\d", said)
    assert "inner" not in said


def test_a_pipe_stays_clean() -> None:
    assert shown(LONG, terminal=False) == ""


def test_short_work_shows_nothing() -> None:
    assert "outer" not in shown(LONG.replace("0.06", "0.001"), terminal=True)


def test_work_that_raises_gives_the_terminal_back() -> None:
    said = shown(
        """
        import time
        from lensclust.progress import progress_bar
        for name in ("first", "second"):
            try:
                with progress_bar(name, total=2) as advance:
                    advance()
                    time.sleep(1.3)
                    raise KeyError
            except KeyError:
                pass
        """,
        terminal=True,
    )
    assert "first" in said
    assert "second" in said
