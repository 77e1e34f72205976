"""All attacks, two at a time and bounded in time, and what each found: ``python -m tests.attack``.

Kills of a store, a training and a run while they write; signals to a run with real workers; bits
flipped in every file that is trusted; wrong values at the command line and in library calls.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from tests.attack.signals import STATUS

MINUTES = 20
ATTACKS = {
    **{
        number.name: ["-m", "tests.attack.signals", "--tries", "25", "--kind", number.name]
        for number in STATUS
    },
    "values": ["-m", "tests.attack.values", "--tries", "500"],
    "commands": ["-m", "tests.attack.commands", "--tries", "500"],
    "flips": ["-m", "pytest", "-s", "-m", "slow", "tests/faults/test_damage.py"],
    **{
        f"kills of {work}": ["-m", "tests.faults.killing", work, "--kills", "25"]
        for work in ("extract", "train", "run")
    },
}


def attack(command: list[str], seconds: float) -> tuple[bool, str]:
    """Whether nothing was found, and what an attack said."""
    try:
        done = subprocess.run(
            [sys.executable, *command],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return False, f"not done after {MINUTES} minutes"
    said = done.stdout if done.returncode == 0 else done.stdout + done.stderr[-3000:]
    return done.returncode == 0, said.strip()


def main() -> int:
    ends = time.monotonic() + 60 * MINUTES
    held = True

    def one(name: str) -> None:
        nonlocal held
        began = time.monotonic()
        good, said = attack(ATTACKS[name], ends - began)
        held &= good
        print(f"-- {name}: {time.monotonic() - began:.0f} s\n{said}", flush=True)

    with ThreadPoolExecutor(2) as lanes:
        list(lanes.map(one, ATTACKS))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
