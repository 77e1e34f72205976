"""Killed at any moment, every piece of work goes on and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# More of them: LENSCLUST_KILLS=50 make test-slow.
KILLS = int(os.environ.get("LENSCLUST_KILLS", "10"))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, and kills with SIGKILL")


def killed(work: str, kills: int, seed: int) -> dict[str, int]:
    """Counts by way of dying; the program itself checks what must hold after each."""
    command = [sys.executable, "-m", "tests.faults.killing", work]
    command += ["--kills", str(kills), "--seed", str(seed)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["clock"] + found["change"] >= kills
    assert found["write"] >= kills // 5
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "kills"), [("extract", KILLS), ("train", KILLS), ("run", KILLS), ("emergence", 2)]
)
def test_work_survives_many_kills(work: str, kills: int) -> None:
    killed(work, kills, seed=0)


@pytest.mark.slow
def test_the_command_itself_survives_kills(tmp_path: Path) -> None:
    """Real processes, killed while they start, read the model or write."""

    def command(out: Path) -> list[str]:
        said = [sys.executable, "-m", "lensclust", "extract", "--model", "native:sif-small"]
        return [*said, "--tasks", "sif", "--sites", "resid", "--out", str(out), "--resume"]

    def run(out: Path, **options: float) -> int | None:
        process = subprocess.Popen(
            command(out), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL
        )
        try:
            return process.wait(**options)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return None

    began = time.monotonic()
    assert run(tmp_path / "whole") == 0
    lasts = time.monotonic() - began
    rng, deaths = random.Random(0), 0
    for _ in range(20):
        # The last third: before it Python is still importing.
        began = time.monotonic()
        if run(tmp_path / "killed", timeout=rng.uniform(2 / 3, 1) * lasts) is None:
            deaths += 1
            if deaths == 2:
                break
        else:  # it was faster than before, and what is left has nothing more to do
            lasts = time.monotonic() - began
            shutil.rmtree(tmp_path / "killed")
    assert deaths == 2
    assert run(tmp_path / "killed") == 0
    from tests.faults.killing import snapshot

    assert snapshot(tmp_path / "killed") == snapshot(tmp_path / "whole")
