"""One process at a time: the second is refused in one line, and a dead one holds nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import lensclust as lc
from lensclust.storage.atomic import locked
from studies.study import _once
from tests.faults.work import Small, extract, small_study, training

ROOT = Path(__file__).parents[2]


@contextmanager
def another_process(body: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that says "ready" inside the work it does, and waits there."""
    program = f"""
        import sys, time
        from pathlib import Path
        folder = Path(sys.argv[1])
        def wait(*arguments, **keywords):
            print("ready", flush=True)
            time.sleep(60)
        {body}
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(folder)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()


def held(file: Path) -> str:
    return (
        "from lensclust.storage.atomic import locked\n"
        f"        with locked(Path({str(file)!r}), 'x'): wait()"
    )


@pytest.mark.parametrize(
    ("work", "lock", "said"),
    [
        (extract, ".a.lensclust.lock", "store"),
        (training, "t/.lensclust.lock", "train:"),
        (small_study, "r/.lensclust.lock", "output"),
    ],
)
def test_the_second_is_refused_and_the_dead_hold_nothing(
    work: Any, lock: str, said: str, tmp_path: Path
) -> None:
    file = tmp_path / lock
    file.parent.mkdir(parents=True, exist_ok=True)
    with another_process(held(file), tmp_path) as other:
        with pytest.raises(lc.InputError, match=rf"^{said}.*another process is writing to it") as e:
            work(tmp_path)
        assert "\n" not in str(e.value)
        assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {file.name}
        other.send_signal(signal.SIGKILL)
        other.wait()
        work(tmp_path)
    assert not file.exists()


@pytest.mark.slow
def test_a_real_run_is_refused_while_another_is_at_it(tmp_path: Path) -> None:
    body = """
        from tests.faults import work
        class Waiting(work.Small):
            run = wait
        Waiting().execute(folder, seeds=2, progress=False)
    """
    # The class only waits: its name is that of the study it stands for.
    body = body.replace("class Waiting", "class Small").replace("Waiting()", "Small()")
    with another_process(body.strip(), tmp_path / "r"):
        for resume in (False, True):
            with pytest.raises(lc.InputError, match="another process is writing to it"):
                Small().execute(tmp_path / "r", seeds=2, resume=resume, progress=False)
    assert not (tmp_path / "r" / "parts").exists()


def test_a_part_that_outlives_its_run_is_waited_for(tmp_path: Path) -> None:
    """A worker process goes on after its run was killed; the resumed run takes what it made."""
    body = """
        import pandas as pd
        from studies.study import _once
        def slow(item, folder):
            print("ready", flush=True)
            time.sleep(0.7)
            return {"a": pd.DataFrame({"made by": ["the first"]})}
        _once(slow, 0, folder)
    """
    started = time.monotonic()
    with another_process(body.strip(), tmp_path / "part"):
        frames = _once(lambda *_: {"a": pd.DataFrame({"made by": ["me"]})}, 0, tmp_path / "part")
    assert frames["a"]["made by"].tolist() == ["the first"]
    assert time.monotonic() - started > 0.7


def test_a_lock_that_comes_and_goes_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    """Its file is removed each time: one who waits for a file that is gone must not hold it."""
    program = """
        import os, sys, time
        from pathlib import Path
        from lensclust.storage.atomic import locked
        folder = Path(sys.argv[1])
        until = float(sys.argv[2])
        while time.time() < until:
            with locked(folder / ".lock", "x", wait=True):
                os.close(os.open(folder / "mine", os.O_CREAT | os.O_EXCL))
                time.sleep(0.001)
                (folder / "mine").unlink()
    """
    until = str(time.time() + 2)
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path), until]
    crowd = [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]
    assert [process.wait() for process in crowd] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_free_again_after_an_error(tmp_path: Path) -> None:
    def work() -> None:
        with locked(tmp_path / ".lock", "store a"):
            raise RuntimeError("in between")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="in between"):
            work()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with (
        pytest.raises(lc.InputError, match=r"store a: cannot be written: .*file/\.lock"),
        locked(tmp_path / "file" / ".lock", "store a"),
    ):
        pass
