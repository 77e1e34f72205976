"""Fill the README from measured results: never typed, always the newest run.

    python -m tests.benchmarks.readme runs/emergence runs/alignment

replaces the claims of these studies, and leaves those of others as their last run gave them.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from lensclust.storage.atomic import write_atomically

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
HEAD = (
    "| study | claim | estimate [95 %] (n, unit) | control | verdict |",
    "|---|---|---|---|---|",
)
PICTURE = ROOT / "studies" / "pictures" / "task_by_layer.svg"


def put(section: str, text: str) -> None:
    """Replace what stands between a section's two marks."""
    before, _, after = _parted(section)
    write_atomically(README, f"{before}\n{text}\n{after}")


def claims_table(runs: list[Path], known: str = "") -> str:
    """The claims of several runs as Markdown, with those of other studies that are known."""
    lines: dict[str, list[str]] = {}
    for line in known.strip().splitlines()[len(HEAD) :]:
        lines.setdefault(line.split("|")[1].strip(), []).append(line)
    for run in runs:
        study = _study(run)
        claims = json.loads((run / "claims.json").read_text(encoding="utf-8"))
        lines[study] = [_line(study, claim) for claim in claims]
    return "\n".join([*HEAD, *(line for study in lines.values() for line in study)])


def _study(run: Path) -> str:
    return json.loads((run / "config.json").read_text(encoding="utf-8"))["study"]


def _line(study: str, claim: dict) -> str:
    control = ", ".join(f"{name} {_number(value)}" for name, value in claim["control"].items())
    ends = ", ".join(map(_number, claim["ci95"]))
    # Claims that survive Holm's correction over their run stand out.
    mark = "**" if claim["holds_corrected"] else ""
    return (
        f"| {study} | {claim['statement']} | {_number(claim['estimate'])} [{ends}] "
        f"({claim['n']}, {claim['unit']}) | {control} | {mark}{claim['verdict']}{mark} |"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _parted(section: str) -> tuple[str, str, str]:
    """The README up to a section, the section, and the rest."""
    begin, end = f"<!-- {section}: begin -->", f"<!-- {section}: end -->"
    before, rest = README.read_text(encoding="utf-8").split(begin)
    inside, after = rest.split(end)
    return before + begin, inside, end + after


if __name__ == "__main__":
    folders = [Path(folder) for folder in sys.argv[1:]]
    put("claims", claims_table(folders, _parted("claims")[1]))
    for folder in folders:
        if _study(folder) == "emergence":
            PICTURE.parent.mkdir(exist_ok=True)
            shutil.copy(folder / "figures" / "1_task_by_layer.svg", PICTURE)
