"""The README is short; its sessions, and the docs', are doctests; the others are executed here."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

import lensclust as lc
from tests.benchmarks import readme

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
PRETRAINED = ROOT / "docs" / "how_to" / "pretrained.md"


def executed_blocks(page: Path) -> list[str]:
    """Python of a page that is no doctest."""
    return [b for b in BLOCK.findall(page.read_text(encoding="utf-8")) if ">>>" not in b]


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= 9_000


def test_the_readme_is_shown_with_what_it_prints() -> None:
    sessions = [b for b in BLOCK.findall((ROOT / "README.md").read_text("utf-8")) if ">>>" in b]
    assert sessions
    assert not re.search(r"^\(?(True|False)\b", "".join(sessions), re.MULTILINE)


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in PAGES:
        links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
        for link in (each for each in links if "://" not in each):
            made = page.parent.name == "docs" and link == "reference/index.rst"
            assert made or (page.parent / link).exists(), f"{page.name}: {link}"


def test_python_that_is_no_doctest_is_on_one_page() -> None:
    """And that page is executed below."""
    assert [page for page in PAGES if executed_blocks(page)] == [PRETRAINED]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("index", "says"),
    [(0, "best ARI"), (1, "AttentionRatio("), (2, "weights.accuracy(asked)=0.")],
)
def test_the_pretrained_sessions(module, capsys, index, says):
    try:
        model = lc.load("smollm2-135m-instruct", progress=False)
        lc.tasks.classification("sst2", model.tokenizer, queries=1)
    except lc.InputError as error:
        pytest.skip(f"the model or the texts cannot be downloaded: {error}")
    blocks = executed_blocks(PRETRAINED)
    assert len(blocks) == 3
    module(blocks[index], f"session_{index}")
    assert says in capsys.readouterr().out


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Import a block as the module a reader would put it into."""

    def load(block: str, name: str) -> ModuleType:
        (tmp_path / f"{name}.py").write_text(block, encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        return importlib.import_module(name)

    return load


@pytest.fixture
def run(tmp_path) -> Path:
    """A run directory as far as the tables read it."""
    claim = {
        "id": readme.HEADLINES["unseen"][0],
        "statement": "A move moves answers",
        "estimate": 0.5,
        "ci95": [0.25, 0.75],
        "control": {"random": 0.125, "none": None},
        "n": 3,
        "unit": "seed",
        "verdict": "supported",
        "holds_corrected": True,
    }
    (tmp_path / "config.json").write_text(json.dumps({"study": "unseen"}), encoding="utf-8")
    (tmp_path / "claims.json").write_text(json.dumps([claim]), encoding="utf-8")
    return tmp_path


def test_a_run_replaces_the_claims_of_its_study_alone(run):
    head = "\n".join(readme.HEADS["claims"])
    known = f"{head}\n| unseen | old | 1 | 2 | 3 |\n| alignment | kept | 1 | 2 | 3 |"
    table = readme.claims_table([run], known)
    assert "| alignment | kept | 1 | 2 | 3 |" in table
    assert "| unseen | old" not in table
    assert (
        "| unseen | A move moves answers | 0.50 [0.25, 0.75] (3, seed) "
        "| random 0.12, none – | **supported** |" in table
    )


def test_every_study_has_one_line_in_the_readme(run):
    table = readme.studies_table([run])
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == list(readme.HEADLINES)
    assert "| 0.50 [0.25, 0.75] | **supported** |" in table


@pytest.mark.parametrize("section", readme.PAGES)
def test_every_section_has_its_marks(section):
    text = readme.PAGES[section].read_text(encoding="utf-8")
    marks = [f"<!-- {section}: {end} -->" for end in ("begin", "end")]
    assert [text.count(mark) for mark in marks] == [1, 1]
    assert text.index(marks[0]) < text.index(marks[1])


def test_the_headlines_are_claims_of_their_studies():
    for study, (id, _) in readme.HEADLINES.items():
        sources = "".join(
            path.read_text(encoding="utf-8") for path in (ROOT / "studies" / study).glob("*.py")
        )
        assert f'"{id}' in sources, (study, id)
