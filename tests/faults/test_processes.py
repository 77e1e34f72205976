"""Signals end a command with its clean-up done, and nothing that it started outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}


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


@contextmanager
def command(body: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The lensclust command with a further subcommand that does what is given."""
    program = f"""
        import signal, sys, time, os
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from pathlib import Path
        from joblib import delayed
        from lensclust import cli
        from lensclust.disk import LOCK, created, locked, replacing
        from lensclust.downloads import following
        from lensclust.sweeping import in_parallel
        folder = Path(sys.argv[1])
        def work(given):
            {body}
        cli.COMMANDS["work"] = (work, "")
        sys.exit(cli.main(["work"]))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(folder)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    children: set[int] = set()
    try:
        yield process
        children = below(process.pid)
    finally:
        process.kill()
        process.wait()
        for child in filter(lives, children):
            os.kill(child, signal.SIGKILL)


# exec, for what a worker does must be found by its name there.
SWEEP = """
            said = f"import os, time; open(f'{folder}/{{os.getpid()}}', 'w'); time.sleep(60)"
            with created(folder / "out"), locked(folder / "out" / LOCK, "out"):
                with replacing(folder / "out" / "a"):
                    list(in_parallel((delayed(exec)(said) for _ in range(2)), jobs=3))
""".strip()
DOWNLOAD = """
            import subprocess
            sys.path.append(str(folder))
            command = following("slow")
            child = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(folder)})
            try:
                child.wait()
            finally:
                child.kill()
""".strip()


@pytest.mark.parametrize("number", STATUS)
@pytest.mark.parametrize("body", [SWEEP, DOWNLOAD], ids=["workers", "download"])
def test_nothing_outlives_the_command(tmp_path: Path, body: str, number: signal.Signals) -> None:
    said = "import os, pathlib, time; pathlib.Path(__file__).with_name(str(os.getpid())).touch()"
    (tmp_path / "slow.py").write_text(f"{said}; time.sleep(60)")
    n = 2 if body is SWEEP else 1
    with command(body, tmp_path) as process:
        assert wait_for(lambda: len(list(tmp_path.glob("[0-9]*"))) == n, 90)
        children = below(process.pid)
        assert {int(path.name) for path in tmp_path.glob("[0-9]*")} <= children
        process.send_signal(number)
        assert process.wait(timeout=30) == STATUS[number]
        assert wait_for(lambda: not any(map(lives, children)), 10), "orphans"
        if number != signal.SIGKILL:
            assert process.stderr is not None
            assert process.stderr.read() == "lensclust: interrupted\n"
            assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_inside_a_finalizer_is_not_lost(tmp_path: Path, number: signal.Signals) -> None:
    body = f"""
            class Late:
                def __del__(self):
                    os.kill(os.getpid(), {int(number)})
                    for _ in range(1000): pass
            Late()
            time.sleep(60)
    """
    with command(body.strip(), tmp_path) as process:
        assert process.wait(timeout=60) == STATUS[number]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
@pytest.mark.parametrize("number", STATUS)
def test_a_real_run_leaves_no_orphan_and_goes_on(
    tmp_path: Path, engine: str, number: signal.Signals
) -> None:
    if engine == "ray":
        pytest.importorskip("ray")
    start = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    start += "from lensclust.cli import main; sys.exit(main(sys.argv[1:]))"
    out = tmp_path / "run"
    run = [sys.executable, "-c", start, "run", "emergence", "--preset", "smoke", "--jobs", "2"]
    run += ["--steps", "40", "--n-checkpoints", "3", "--permutations", "2", "--seeds", "4"]
    run += ["--engine", engine, "--quiet", "--out", str(out), "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(run, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    children: set[int] = set()
    try:
        assert wait_for(lambda: list(out.glob("parts/*/*")), 200)
        children = below(process.pid)
        process.send_signal(number)
        assert process.wait(timeout=60) == STATUS[number], process.stderr and process.stderr.read()
        # Ray's own agents look for a minute whether its killed daemon comes back.
        patience = 120 if engine == "ray" and number == signal.SIGKILL else 10
        assert wait_for(lambda: not any(map(lives, children)), patience), "orphans"
    finally:
        process.kill()
        for child in filter(lives, children):
            os.kill(child, signal.SIGKILL)
    assert subprocess.run(run, cwd=ROOT, env=environment, capture_output=True).returncode == 0
    assert (out / "report.html").exists()
