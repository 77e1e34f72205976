"""Signals end a command with its clean-up done, and nothing that it started outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.attack.signals import STATUS, below, end, ended, finished, lives, wait_for

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


@contextmanager
def command(body: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The lensclust command with a further subcommand that does what is given."""
    program = f"""
        import signal, sys, time, os
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from pathlib import Path
        from joblib import delayed
        from lensclust.cli import command as cli
        from lensclust.storage.atomic import LOCK, created, locked, replacing
        from lensclust.models.downloads import following
        from lensclust.parallel import in_parallel
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
        end(children)


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
    # Ray's own agents look for a minute whether its killed daemon comes back.
    patience = 120 if engine == "ray" and number == signal.SIGKILL else 10
    out = tmp_path / "run"
    going, wrong = ended(out, number, 0, engine=engine, patience=patience)
    assert going
    assert not wrong
    assert not finished(out, engine=engine)
    assert (out / "report.html").exists()
