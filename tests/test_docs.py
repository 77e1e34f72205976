"""What the documentation says exists: commands parse, public names have a page."""

from __future__ import annotations

import importlib
import re
import shlex
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import tyro

import lensclust as lc
import probes
from lensclust.cli import command as cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = re.compile(r"^ *```(?:sh|bash|console)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Every ``lensclust`` command of a block of shell, without its prompt."""
    lines = [
        line.strip().removeprefix("$ ").removeprefix(".venv/bin/")
        for page in PAGES
        for block in BLOCKS.findall(page.read_text(encoding="utf-8"))
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return sorted({line for line in lines if line.startswith("lensclust ")})


def test_there_are_commands_of_every_kind_to_read() -> None:
    said = {shlex.split(command, comments=True)[1] for command in commands()}
    assert said >= {"run", "report", "serve", "extract", "doctor", "studies"}


@pytest.mark.parametrize("command", commands())
def test_every_command_in_the_documentation_is_understood(command: str) -> None:
    _, name, *given = shlex.split(command, comments=True)
    assert name in cli.COMMANDS
    if name == "run" and given:
        study = entry_points(group="lensclust.studies")[given[0]].load()
        cli._run_options(study, given[1:])
    elif options := cli.OPTIONS[name]:
        tyro.cli(options, args=given)


@pytest.fixture(scope="module")
def site_pages() -> Any:
    """The module that writes the site's reference."""
    spec = spec_from_file_location("site_pages", ROOT / "docs" / "site_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_a_page_for_every_public_name(site_pages: Any, tmp_path: Path) -> None:
    site_pages.write_reference(tmp_path)
    pages = "".join(page.read_text(encoding="utf-8") for page in tmp_path.glob("*.rst"))
    documented = set(re.findall(r"^\.\. auto\w+:: (\S+)$", pages, re.MULTILINE))
    modules = {"figures", "report", "tasks"}
    for face in (lc, lc.tasks, probes):
        assert documented >= {
            f"{face.__name__}.{name}" for name in set(vars(face)["__all__"]) - modules
        }
    studies = {point.value.replace(":", ".") for point in entry_points(group="lensclust.studies")}
    assert documented >= studies
    for name in documented:
        package, _, short = name.rpartition(".")
        assert getattr(importlib.import_module(package), short)


def test_the_index_of_the_reference_names_every_page_once(site_pages: Any, tmp_path: Path) -> None:
    site_pages.write_reference(tmp_path)
    index = (tmp_path / "index.rst").read_text(encoding="utf-8")
    listed = re.findall(r"^   \S+ <(\S+)>$", index, re.MULTILINE)
    assert sorted([*listed, "index"]) == sorted(page.stem for page in tmp_path.glob("*.rst"))


def test_the_glossary_has_the_words_of_the_field() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    words = (
        "site, layer, head, span, template, within input, null, interchange, transport, claim, "
        "verdict, run directory, ARI, AMI, exchangeable unit, residual stream"
    )
    for word in words.split(", "):
        assert f"\n{word}\n  " in text


def test_the_architecture_names_files_that_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    places = re.findall(r"^\| [^|]+ \| `([^`]+/[^`]+)`", text, re.MULTILINE)
    assert len(places) >= 10
    for place in places:
        assert (ROOT / place).exists(), place
