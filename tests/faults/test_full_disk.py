"""A disk that is full or read-only: one line that says where, and the work goes on afterwards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lensclust.cli.command import main
from tests.lensclust.report.test_report import make_run

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX limits")


def program(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tests.faults.filling", *arguments]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


def messages(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr[-3000:]
    return [said for said in json.loads(done.stdout.splitlines()[-1]) if said]


def mounted(size: str, flags: str, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run with a file system of its own at a folder, seen by this command alone."""
    folder.mkdir(exist_ok=True)
    mount = f"mount -t tmpfs -o size={size}{flags} tmpfs {folder}"
    if shutil.which("unshare") is None or run("unshare", "-rm", "sh", "-c", mount).returncode:
        pytest.skip("this system lets no user mount a file system")
    return run("unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh", *command)


@pytest.mark.slow
@pytest.mark.parametrize("work", ["extract", "train", "run"])
def test_files_that_cannot_grow(work: str) -> None:
    said = messages(run(*program(work)))
    assert said
    assert all("cannot be written: File too large; put that right" in line for line in said), said
    assert not any("\n" in line for line in said)


@pytest.mark.slow
@pytest.mark.parametrize("work", ["extract", "train", "run"])
def test_a_full_file_system(work: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    said = messages(mounted("2m", "", disk, *program(work, str(disk))))
    assert said
    assert all("cannot be written: No space left on device" in line for line in said), said


@pytest.mark.slow
def test_a_read_only_folder(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    body = "from tests.faults.work import *; from lensclust.errors import InputError\n"
    for work in ("extract", "training", "small_study"):
        body += f"try: {work}(Path({str(disk)!r}))\nexcept InputError as e: print(e)\n"
    done = mounted("2m", ",ro", disk, sys.executable, "-c", body)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3, lines
    assert all(str(disk) in line for line in lines)
    assert all("Read-only file system" in line or "no permission" in line for line in lines), lines


def test_the_command_says_it_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A folder that is no folder: what every user meets, also one that may write anywhere."""
    (tmp_path / "file").write_text("mine")
    out = str(tmp_path / "file" / "a")
    for command in (
        ["extract", "--model", "native:sif-small", "--tasks", "sif", "--out", out],
        ["run", "emergence", "--preset", "smoke", "--out", out],
    ):
        assert main(command) == 2
        assert capsys.readouterr().err.count("\n") == 1
    run = make_run(tmp_path / "run")
    assert main(["report", str(run), "--out", f"{out}.html"]) == 2
    assert capsys.readouterr().err.startswith(f"lensclust: report {out}.html: cannot be written: ")
