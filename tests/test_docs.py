"""What the documentation says exists: commands and their options parse, exports are listed."""

from __future__ import annotations

import re
import shlex
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import tyro

import lensclust as lc
from lensclust import figures
from lensclust.cli import command as cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = re.compile(r"^ *```(?:sh|bash|console)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
REFERENCE = (ROOT / "docs" / "reference.rst").read_text(encoding="utf-8")


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


def members(module: str) -> set[str]:
    (listed,) = re.findall(rf"automodule:: {module}\n   :members: (.*)", REFERENCE)
    return set(listed.split(", "))


def test_the_reference_lists_what_is_exported() -> None:
    modules = {"figures", "report", "tasks"}
    assert members("lensclust") == set(vars(lc)["__all__"]) - modules
    assert members("lensclust.figures") <= set(vars(figures)["__all__"])
    studies = {point.value.replace(":", ".") for point in entry_points(group="lensclust.studies")}
    assert studies == set(re.findall(r"autoclass:: (studies\.\w+\.\w+)", REFERENCE))
