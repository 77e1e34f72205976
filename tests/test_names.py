"""A user's own `probes` and `studies` beside ours, found by Python first."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import probes
from lensclust.cli import command as cli

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "probes.py").write_text("MINE = 'my probes'\n")
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "__init__.py").write_text("MINE = 'my studies'\n")
    (tmp_path / "studies" / "unrelated.py").write_text("MINE = 'a module of mine'\n")
    return tmp_path


def run(folder: Path, *command: str, path: str = "") -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, [path, str(ROOT)]))
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_commands_find_our_studies_and_name_the_files_in_the_way(folder: Path) -> None:
    command = str(Path(sys.executable).with_name("lensclust"))
    for done in (
        run(folder, sys.executable, "-m", "lensclust", "studies"),
        run(folder, command, "studies", path=str(folder)),
    ):
        assert done.returncode == 0, done.stderr
        assert "emergence" in done.stdout
        lines = done.stderr.splitlines()
        assert len(lines) == 2, done.stderr
        assert str(folder / "probes.py") in lines[0]
        assert str(folder / "studies" / "__init__.py") in lines[1]


@pytest.mark.parametrize("beside", [False, True])
def test_probes_are_found_below_lensclust(folder: Path, tmp_path: Path, beside: bool) -> None:
    program = (
        "from lensclust.probes import steer, shift\n"
        "import lensclust as lc, lensclust.probes\n"
        "from lensclust import probes\n"
        "assert probes.steer is lc.probes.steer is steer\n"
        "try: from lensclust.probes import stear\n"
        "except ImportError: print('missing')\n"
    )
    place = folder if beside else ROOT
    done = run(place, sys.executable, "-c", program)
    assert done.stdout == "missing\n", done.stderr


@pytest.mark.slow
def test_from_lensclust_gives_ours_and_leaves_theirs(folder: Path) -> None:
    (folder / "script.py").write_text(
        "import probes\n"
        "import lensclust as lc\n"
        "from lensclust import probes as ours, studies as our_studies\n"
        "import studies, studies.unrelated, pickle\n"
        "assert (probes.MINE, studies.MINE) == ('my probes', 'my studies')\n"
        "assert studies.unrelated.MINE == 'a module of mine'\n"
        "names = [name for name in ours.__all__ if not callable(getattr(ours, name))]\n"
        "assert not names, names\n"
        "assert our_studies.study.Study.presets\n"
        "rows = [{'task': 'ab'[i % 2]} for i in range(12)]\n"
        "import pandas as pd\n"
        "lists = [[i, 2 * i, 5] for i in range(12)]\n"
        "prompts = lc.Prompts.from_token_lists(lists, pd.DataFrame(rows))\n"
        "acts = lc.extract(lc.load('native:sif-small'), prompts, 'resid 2', progress=False)\n"
        "print(len(ours.cluster(acts, given=None, permutations=3, jobs=2).frame))\n"
    )
    for command in (["script.py"], ["-m", "script"], ["-c", (folder / "script.py").read_text()]):
        done = run(folder, sys.executable, *command)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) >= 1
        assert str(folder / "probes.py") in done.stderr


def test_without_a_study_that_can_be_loaded_the_command_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        name, value = "broken", "nowhere:Broken"

        def load(self) -> None:
            raise ModuleNotFoundError("No module named 'nowhere'")

    for points in ([], [Broken(), Broken()]):
        monkeypatch.setattr(cli, "entry_points", lambda points=points, **_: points)
        for command in (["studies"], ["run", "emergence"]):
            assert cli.main(command) == cli.UNUSABLE
            said = capsys.readouterr().err
            assert said.count("\n") == 1
            assert "no study can be loaded" in said


def test_modules_do_nothing_when_they_are_imported():
    """Tools that read documentation, or look for names, import every module."""
    script = (
        "import importlib, pkgutil, lensclust, probes, studies\n"
        "for package in (lensclust, probes, studies):\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(module.name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr[-500:]


@pytest.mark.parametrize(
    ("package", "old", "new"),
    [
        ("heads", "change", "pattern_change"),
        ("heads", "compose", "compose_patterns"),
        ("similarity", "combined", "combine_hypotheses"),
        ("patching", "rank", "rank_sites"),
        ("linear", "decode", "decodability"),
        ("steering", "dealt", "with_shuffled_labels"),
    ],
)
def test_old_and_clear_names_are_the_same_function(package: str, old: str, new: str) -> None:
    below = importlib.import_module(f"probes.{package}")
    assert getattr(below, old) is getattr(below, new) is getattr(probes, old)
    assert getattr(probes, new) is getattr(probes, old)
