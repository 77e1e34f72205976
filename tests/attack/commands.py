"""Command lines with wrong values: each ends with status 2 and one line, and writes nothing.

``python -m tests.attack.commands --tries 500`` draws so many and prints what became of them. The
sub-commands and their options are those that the command line itself has; at least one value is
wrong, so that no line may begin any work.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import traceback
import typing
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from lensclust.cli.command import COMMANDS, OPTIONS, UNUSABLE, main
from tests.attack import give_many, tries_and_seed

# Values that no option takes, and those that an option of its kind does not.
NUMBERS = ["", "x", "2.5", "nan", "inf", "1e3", "0x10", "--", "-", "1 2", "\0", "\u2028", "\udc80"]
CHOICES = ["", "no such", "SMOKE", "smoke ", "\0", "\udc80", "a\nb", "ray,local"]
PLACES = ["", "/", ".", "taken", "taken/file", "taken/file/x", "a\0b", "\udc80", "/dev/null"]
PLACES += [
    "s3://",
    "no-such://a/b",
    "memory://a",
    "reference://x",
    "file:x",
    "/proc/x/y",
    "x" * 300,
]
MODELS = ["", "nowhere", "./nowhere", "taken", "taken/file", "native:", "native:no", "\0", "\udc80"]
TASKS = ["", "no such", "classification:", "classification:no", "instruction_induction:", "sif:x"]
TASKS += ["instruction_induction:nowhere", "\0", "\udc80", "natural "]
SITES = ["", "no", "resid -1", "resid 99", "head x", "head 1.99", "\0", "resid 1.1", "mlp_out nan"]
UNKNOWN = ["--no-such-option", "--presett", "-x", "\0", "--out=", "\udc80", "--seeds=x"]


@dataclass
class Report:
    """What became of the command lines that were tried."""

    tries: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    commands: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        said = ", ".join(f"{name} {count}" for name, count in sorted(self.commands.items()))
        first = (
            f"{self.tries} command lines ({said}): {self.refused} refused in one line with status "
            f"{UNUSABLE}, {len(self.wrong)} otherwise"
        )
        return "\n".join([first, *self.wrong])


def wrong_values(name: str, kind: Any) -> list[str]:
    """Values that an option cannot have, by its name and its type."""
    by_name = {"model": MODELS, "tasks": TASKS, "sites": SITES, "at": ["", "no such", "x_start"]}
    if name in ("out", "run", "runs"):
        return PLACES
    if name in by_name:
        return by_name[name]
    if "Literal" in str(kind) or name in ("preset", "device", "kind"):
        return CHOICES
    return NUMBERS


def option_kinds(command: str) -> dict[str, Any]:
    kind = OPTIONS[command]
    return {} if kind is None else typing.get_type_hints(kind)


def drawn() -> st.SearchStrategy[list[str]]:
    """A command line in which something is wrong."""
    from lensclust.cli.command import _load_studies

    studies = _load_studies()

    def flag(name: str, value: str) -> list[str]:
        return [f"--{name.replace('_', '-')}", value]

    @st.composite
    def line(draw: Any) -> list[str]:
        command = draw(st.sampled_from([*COMMANDS, "run", "extract", "run", "extract"]))
        kinds = option_kinds(command)
        said = [command]
        mistakes = 0
        if command == "run":
            name = draw(st.sampled_from([*studies, "no such", "", "\0"]))
            mistakes += name not in studies
            said.append(name)
            if name in studies:
                kinds |= {each.name: each.type for each in fields(studies[name])}
                # Whatever is drawn, nothing begins: the folder holds what is not ours.
                said += ["--preset", "smoke", "--out", "taken"]
                mistakes += 1
        elif command == "extract":
            good = {"model": "native:sif-small", "tasks": "sif", "out": "taken"}
            for name, value in good.items():
                said += flag(name, value)
            mistakes += 1
        elif command in ("report", "serve"):
            said += draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=2))
            mistakes += 1
        elif command == "completion":
            said += draw(st.lists(st.sampled_from(CHOICES), min_size=1, max_size=2))
            mistakes += 1
        elif command == "doctor":
            said += flag("model", draw(st.sampled_from(MODELS)))
            mistakes += 1
        wrong = {n: wrong_values(n, kind) for n, kind in kinds.items() if n not in ("json", "port")}
        for _ in range(draw(st.integers(int(mistakes == 0), 2))):
            if wrong and draw(st.booleans()):
                name = draw(st.sampled_from(sorted(wrong)))
                said += flag(name, draw(st.sampled_from(wrong[name])))
            else:
                said.append(draw(st.sampled_from(UNKNOWN)))
        return said

    return line()


def attack(tries: int, *, seed: int = 0) -> Report:
    """Draw command lines and give them to the command, in a folder that nothing may change."""
    report = Report()
    with tempfile.TemporaryDirectory() as top, inside(top):
        taken = Path(top) / "taken"
        taken.mkdir()
        (taken / "file").write_text("mine")
        held = contents(Path(top))

        def left() -> bool:
            """Whether anything was written, which is not held against the next line."""
            nonlocal held
            before, held = held, contents(Path(top))
            return held != before

        def make(line: list[str]) -> None:
            report.tries += 1
            report.commands[line[0]] += 1
            out, said = io.StringIO(), io.StringIO()
            try:
                with redirect_stdout(out), redirect_stderr(said):
                    status: Any = main(line)
                reason = ""
            except SystemExit as end:
                status, reason = end.code, "SystemExit"
            except BaseException as error:
                at = traceback.extract_tb(error.__traceback__)[-1]
                status, reason = 1, f"{type(error).__name__}: {error!s:.100} ({at.filename})"
            lines = said.getvalue().splitlines()
            if left():
                reason += " wrote something"
            if status == UNUSABLE and len(lines) == 1 and not out.getvalue() and not reason:
                report.refused += 1
                return
            report.wrong.append(f"{line!r:.300}: status {status}, {reason} {lines[:3]!r:.300}")

        give_many(drawn(), make, tries=tries, seed=seed)
    return report


@contextmanager
def inside(folder: str) -> Iterator[None]:
    """Work in a folder for a while."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def contents(folder: Path) -> dict[str, Any]:
    """Every file below a folder, with its bytes."""
    found = {}
    for path, _, names in os.walk(folder):
        found[path] = None
        for name in names:
            found[os.path.join(path, name)] = Path(path, name).read_bytes()
    return found


def run() -> int:
    options = tries_and_seed(__doc__)
    warnings.simplefilter("ignore")
    report = attack(**options)
    print(str(report).encode("ascii", "backslashreplace").decode())
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(run())
