"""Kill a piece of work at random moments, look at what it left, let it go on, compare.

A process that has imported everything and started no thread forks for each attempt, so that a
kill costs the work and not the start of Python. Run as a program: its last line is JSON.

    python -m tests.faults.killing extract --kills 50 --seed 0
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.work import WORK, Work

# What Python reports of a process that changes files. Writes by other languages' libraries are
# hit by the clock and by the limit on a file's size.
_CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.truncate"}


def in_child(work: Callable[[], Any], *, kill_after: float | None = None) -> tuple[int, Any]:
    """Run in a forked process; its exit status (negative: the signal) and what it returned."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        status, said = 0, None
        try:
            said = work()
        except BaseException:
            status, said = 1, traceback.format_exc()
        with os.fdopen(write, "w") as pipe:
            json.dump(said, pipe)
        os._exit(status)
    os.close(write)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, json.loads(text) if text else None


def finished(work: Callable[[], Any]) -> Any:
    status, said = in_child(work)
    if status != 0:
        raise AssertionError(f"status {status}: {said}")
    return said


# -- ways to die ---------------------------------------------------------------------------------


def counting(folder: Path, last: int | None) -> list[int]:
    """Count changes to files below a folder; before number ``last`` the process kills itself."""
    count = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not (
                isinstance(path, (str, bytes, os.PathLike)) and flags & (os.O_WRONLY | os.O_RDWR)
            ):
                return
            if not os.fsdecode(path).startswith(str(folder)):
                return
        elif event not in _CHANGES:
            return
        count[0] += 1
        if count[0] == last:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


def counted(work: Work, folder: Path) -> int:
    count = counting(folder, None)
    work.run(folder)
    return count[0]


def killed_at_a_change(work: Work, folder: Path, last: int) -> tuple[int, Any]:
    def until() -> None:
        counting(folder, last)
        work.run(folder)

    return in_child(until)


def killed_by_the_clock(work: Work, folder: Path, after: float) -> tuple[int, Any]:
    return in_child(lambda: work.run(folder), kill_after=after)


def killed_inside_a_write(work: Work, folder: Path, size: int) -> tuple[int, Any]:
    """The system writes up to the limit and ends the process: half a file is left."""

    def until() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        work.run(folder)

    return in_child(until)


# -- what is left ----------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, str]:
    """Digest of every file by its name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def identities(paths: list[str]) -> dict[str, tuple[int, int]]:
    """A file that is written anew is another inode, or was changed at another time."""
    return {path: ((s := os.stat(path)).st_ino, s.st_mtime_ns) for path in paths}


def survive(name: str, kills: int, seed: int) -> dict[str, Any]:
    """Kill one piece of work again and again; raises where anything does not hold."""
    work, rng, began = WORK[name], random.Random(seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as top:
        # Always the same place: a store knows the path of the checkpoint that it was read from.
        folder = Path(top) / "here"
        folder.mkdir()
        started = time.monotonic()
        changes = finished(lambda: counted(work, folder))
        lasts = time.monotonic() - started
        expected = snapshot(folder)
        largest = max((folder / path).stat().st_size for path in expected)
        ways: list[Callable[[Path], tuple[int, Any]]] = [
            lambda f: killed_by_the_clock(work, f, rng.uniform(0, lasts)),
            lambda f: killed_at_a_change(work, f, rng.randint(1, changes)),
            lambda f: killed_inside_a_write(work, f, rng.randint(1, largest - 1)),
        ]
        deaths = dict.fromkeys(("clock", "change", "write"), 0)
        rounds = 0
        while deaths["clock"] + deaths["change"] < kills or deaths["write"] < kills // 5:
            shutil.rmtree(folder)
            folder.mkdir()
            rounds += 1
            done: list[str] = []
            before = identities(done)
            # Now and then the work is killed again while it makes up for the kill before.
            for _ in range(rng.choice([1, 1, 1, 2, 3])):
                enough = deaths["clock"] + deaths["change"] >= kills
                way = 2 if enough else rng.choices([0, 1, 2], [5, 5, 1])[0]
                status, said = ways[way](folder)
                if status > 0:
                    raise AssertionError(f"{name}: did not go on after a kill: {said}")
                deaths[list(deaths)[way]] += status < 0
                done = finished(lambda: [str(p) for p in work.looked_at(folder)])
                before = identities(done)
            finished(lambda: work.run(folder))
            assert identities(done) == before, f"{name}: what was done was written again"
            found = snapshot(folder)
            assert found == expected, f"{name}: {_difference(found, expected)}"
    return {"work": name, **deaths, "rounds": rounds, "seconds": round(time.monotonic() - began, 1)}


def _difference(found: dict[str, str], expected: dict[str, str]) -> str:
    return f"not as an undisturbed run left it: {sorted(dict(found.items() ^ expected.items()))}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=sorted(WORK))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(json.dumps(survive(given.work, given.kills, given.seed)))
