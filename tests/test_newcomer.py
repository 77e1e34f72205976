"""A newcomer's path: install the wheel, run the README's session, a probe and a study of one's own.

The environment is new and holds the project's wheel and a package that the newcomer wrote. The
libraries that they need are borrowed from the environment that runs the tests.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SESSION = next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if ">>>" in b)

PROBE = """
import lensclust as lc
from lensclust.activations.dataset import dataset_sites, site_values

def spread(acts):
    return {str(site): float(site_values(acts, site).var()) for site in dataset_sites(acts)}

prompts = lc.tasks.sif(n_tasks=3, n_inputs=4, mappings_per_task=3).where(split="new_string")
found = spread(lc.extract(lc.load("native:sif-small"), prompts, ["resid", "head"]))
print(len(found), min(found.values()) >= 0)
"""

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "spreads"
version = "1.0"

[project.entry-points."lensclust.studies"]
spreads = "spreads:Spreads"
"""

STUDY = '''
"""A study of somebody else."""

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd

import lensclust as lc
from lensclust.results.claims import decide
from studies.study import Findings, Study


@dataclass(frozen=True)
class Spreads(Study):
    """Does the residual stream grow with depth in an untrained model?

    Attributes:
        n_tasks: tasks in the prompts.
    """

    title: ClassVar[str] = "how states grow with depth"
    paper: ClassVar[str] = "none"
    n_tasks: int = 3

    def run(self, context):
        scores = context.sweep(self.measure, context.seeds, "seed")["scores"]
        grown = scores.pivot(index="seed", columns="layer", values="value")
        claim = decide("grows", "States grow", grown[6] - grown[0], source="me",
                       origin="extension", control={"layer 0": grown[0].mean()}, at_least=0)
        return Findings(scores=scores, claims=[claim], figures={})

    def measure(self, seed, folder):
        prompts = lc.tasks.sif(n_tasks=self.n_tasks, n_inputs=4, mappings_per_task=3, seed=seed)
        model = lc.load("native:sif-small", seed=seed)
        acts = lc.extract(model, prompts.where(split="new_string"), "resid", progress=False)
        value = acts.resid.var(["prompt", "position", "d_model"]).values
        return {"scores": pd.DataFrame({"layer": range(7), "value": value, "seed": seed})}
'''

Run = Callable[..., str]


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A new environment with the project's wheel, and a way to run its programs in a folder."""
    home = tmp_path_factory.mktemp("newcomer")

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=home, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    own = home / "spreads"
    own.mkdir()
    (own / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    (own / "spreads.py").write_text(STUDY, encoding="utf-8")
    try:
        for source in (ROOT, own):
            run(*pip, "wheel", "--no-deps", "--wheel-dir", home / "wheels", source)
    except AssertionError as error:
        if "ConnectionError" in str(error) or "No matching distribution" in str(error):
            pytest.skip(f"no package index to build from: {error}")
        raise
    run(sys.executable, "-m", "venv", "--without-pip", home / "env")
    python = home / "env" / "bin" / "python"
    place = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # A path in such a file is searched for modules; files like it that lie there are not read,
    # so the project's own sources, installed for editing, stay out.
    (Path(place) / "borrowed.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    wheels = sorted((home / "wheels").glob("*.whl"))
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", *wheels)
    where = run(python, "-c", "import lensclust; print(lensclust.__file__)")
    assert where.startswith(place)
    return home, run


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="programs lie in bin")
def test_the_session_of_the_readme(newcomer):
    home, run = newcomer
    (home / "session.txt").write_text(SESSION, encoding="utf-8")
    options = "doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE"
    program = (
        f"import doctest; print(doctest.testfile('session.txt', False, optionflags={options}))"
    )
    said = run(home / "env" / "bin" / "python", "-c", program)
    assert "failed=0" in said
    attempted = re.search(r"attempted=(\d+)", said)
    assert attempted is not None
    assert int(attempted[1]) > 15


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="programs lie in bin")
def test_a_probe_of_ones_own(newcomer):
    home, run = newcomer
    assert run(home / "env" / "bin" / "python", "-c", PROBE).split() == ["31", "True"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="programs lie in bin")
def test_a_study_of_ones_own_beside_ours(newcomer):
    home, run = newcomer
    command = home / "env" / "bin" / "lensclust"
    listed = run(command, "studies")
    assert "spreads" in listed
    assert "emergence" in listed
    assert "tasks in the prompts" in run(command, "run", "spreads", "--help")
    said = run(command, "run", "spreads", "--seeds", "3", "--jobs", "1", "--out", "mine")
    assert "supported" in said
    assert "States grow" in (home / "mine" / "report.html").read_text(encoding="utf-8")
