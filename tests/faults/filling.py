"""Let a piece of work run into a full disk, give it room again, let it go on, compare.

Run as a program, in a process that has started no thread and forks for each attempt:

    python -m tests.faults.filling extract            a limit on the size of each file
    python -m tests.faults.filling extract FOLDER     a folder on a file system of 2 MB
"""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

from lensclust.errors import InputError
from tests.faults.killing import finished, snapshot
from tests.faults.work import WORK, Work

TRIES, PAGE = 3, 4096


def refused(work: Work, folder: Path) -> str:
    """What the work says when it cannot write; any other error is a fault of its own."""
    try:
        work.run(folder)
    except InputError as error:
        return str(error)
    return ""


def with_limit(work: Work, folder: Path, size: int) -> str:
    """Python ignores the signal, so a longer write is an error: file too large."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return refused(work, folder)


def with_room(work: Work, folder: Path, room: int) -> str:
    ballast = folder.with_name("ballast")
    ballast.write_bytes(b"\0" * max(0, shutil.disk_usage(folder).free - room))
    try:
        return refused(work, folder)
    finally:
        ballast.unlink()


def survive(name: str, disk: Path | None) -> list[str]:
    """What was said each time; raises where the work does not end as undisturbed."""
    work, rng, said = WORK[name], random.Random(0), []
    with tempfile.TemporaryDirectory(prefix="faults-", dir=disk) as top:
        folder = Path(top) / "here"
        folder.mkdir()
        finished(lambda: work.run(folder))
        expected = snapshot(folder)
        sizes = [(folder / path).stat().st_size for path in expected]
        # Small limits are hit first; a file system of pages has no smaller file than one.
        limits = [int(math.exp(rng.uniform(4, math.log(max(sizes))))) for _ in range(TRIES)]
        pages = sum(-(-size // PAGE) for size in sizes)
        rooms = [rng.randrange(pages) * PAGE for _ in range(TRIES)]
        for attempt in (
            [partial(with_limit, work, folder, size) for size in limits]
            if disk is None
            else [partial(with_room, work, folder, room) for room in rooms]
        ):
            shutil.rmtree(folder)
            folder.mkdir()
            said.append(finished(attempt))
            finished(lambda: [str(path) for path in work.looked_at(folder)])
            finished(lambda: work.run(folder))
            assert snapshot(folder) == expected, f"{name}: not as without the fault: {said[-1]}"
    return said


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    where = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    print(json.dumps(survive(sys.argv[1], where)))
