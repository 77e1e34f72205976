"""A run with real workers, ended by signals: nothing outlives it, and it goes on to the same end.

``python -m tests.attack.signals --tries 25`` ends a run of a study that often with each of KILL,
TERM and INT, at random moments after its workers began, and lets it go on each time.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.attack import tries_and_seed
from tests.faults.killing import snapshot

ROOT = Path(__file__).parents[2]
STATUS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
# A shell that starts a command in the background has it ignore ctrl-C.
START = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from lensclust.cli import main; sys.exit(main(sys.argv[1:]))"
)
OPTIONS = ["--preset", "smoke", "--steps", "20", "--n-checkpoints", "2", "--permutations", "2"]
OPTIONS += ["--n-tasks", "2", "--seeds", "4", "--jobs", "2", "--quiet", "--resume"]


@dataclass
class Report:
    """What became of a run under one signal."""

    number: signal.Signals
    ended: int = 0
    runs: int = 0
    wrong: list[str] = field(default_factory=list)

    def add(self, wrong: str) -> None:
        self.wrong += [wrong] if wrong else []

    def __str__(self) -> str:
        said = (
            f"{self.number.name}: {self.ended} ended in {self.runs} runs, {len(self.wrong)} wrong"
        )
        return "\n".join([said, *self.wrong])


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def below(pid: int) -> set[int]:
    """A process's children and theirs."""
    found: dict[int, set[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        found.setdefault(parent, set()).add(int(stat.parent.name))
    known, new = set(), found.get(pid, set())
    while new:
        known |= new
        new = {child for each in new for child in found.get(each, ())} - known
    return known


def wait_for(what: Callable[[], object], seconds: float) -> bool:
    ends = time.monotonic() + seconds
    while not what() and time.monotonic() < ends:
        time.sleep(0.05)
    return bool(what())


def end(pids: set[int]) -> None:
    for pid in filter(lives, pids):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def changes(out: Path) -> list[int]:
    """When each file of a run's parts was written: it changes when its workers are at work."""
    found = []
    for path in sorted(out.glob("parts/**/*")):
        with suppress(FileNotFoundError):
            found.append(path.stat().st_mtime_ns)
    return found


def started(out: Path, *, engine: str = "local") -> subprocess.Popen[str]:
    """The smallest run, going on from what is there."""
    command = [sys.executable, "-c", START, "run", "emergence", *OPTIONS]
    return subprocess.Popen(
        [*command, "--engine", engine, "--out", str(out)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(out: Path, *, engine: str = "local") -> str:
    """Let a run end; what is wrong."""
    return _unexpected(started(out, engine=engine), 0)


def _unexpected(process: subprocess.Popen[str], status: int) -> str:
    _, said = process.communicate(timeout=300)
    if process.returncode == status:
        return ""
    return f"status {process.returncode}, expected {status}: {said[-500:]}"


def ended(
    out: Path, number: signal.Signals, after: float, *, engine: str = "local", patience: float = 10
) -> tuple[bool, str]:
    """Start a run, signal it some seconds after its workers began to write.

    Returns:
        Whether the signal came before the run's own end, and what was wrong.
    """
    before = changes(out)
    process = started(out, engine=engine)
    children: set[int] = set()
    try:
        wait_for(lambda: process.poll() is not None or changes(out) != before, 200)
        with suppress(subprocess.TimeoutExpired):
            process.wait(after)
        if process.poll() is not None:
            return False, _unexpected(process, 0)
        children = below(process.pid)
        process.send_signal(number)
        wrong = _unexpected(process, STATUS[number])
        if process.returncode == 0:  # it was done as the signal came
            return False, ""
        if not wait_for(lambda: not any(map(lives, children)), patience):
            wrong += f"{sum(map(lives, children))} processes outlived it by {patience} s"
        return True, wrong
    finally:
        process.kill()
        process.communicate()
        end(children)


def attack(number: signal.Signals, tries: int, *, seed: int = 0) -> Report:
    """End runs by a signal so many times; each is let to its end before the next begins."""
    rng, report = random.Random(seed), Report(number)
    with tempfile.TemporaryDirectory() as top:
        out = Path(top) / "run"
        report.add(finished(out))
        expected = snapshot(out)
        while report.ended < tries and not report.wrong:
            shutil.rmtree(out)
            report.runs += 1
            going = True
            while going and report.ended < tries and not report.wrong:
                going, wrong = ended(out, number, rng.uniform(0, 3))
                report.ended += going
                report.add(wrong)
            report.add(finished(out))
            if snapshot(out) != expected:
                report.add("ended otherwise than an undisturbed run")
    return report


def main() -> int:
    options = tries_and_seed(__doc__, tries=25, kinds=[number.name for number in STATUS])
    chosen, held = options.pop("kind"), True
    for number in STATUS if chosen is None else [signal.Signals[chosen]]:
        report = attack(number, **options)
        print(report, flush=True)
        held &= not report.wrong
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
