"""Fill the README and two pages of the docs from measured results: never typed.

    python -m tests.benchmarks.readme runs/emergence runs/alignment

replaces the claims of these studies in docs/results.md, and their lines in the README; those of
other studies stay as their last run gave them. ``make bench`` writes docs/benchmarks.md.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from lensclust.storage.atomic import write_atomically

ROOT = Path(__file__).parents[2]
# Where each section stands, between a mark for its begin and one for its end.
PAGES = {
    "studies": ROOT / "README.md",
    "claims": ROOT / "docs" / "results.md",
    "make bench": ROOT / "docs" / "benchmarks.md",
}
HEADS = {
    "studies": ("| study | result | estimate [95 %] | verdict |", "|---|---|---|---|"),
    "claims": (
        "| study | claim | estimate [95 %] (n, unit) | control | verdict |",
        "|---|---|---|---|---|",
    ),
}
# The claim that the README shows of each study, and what it says in few words.
HEADLINES = {
    "emergence": (
        "clusters",
        "After training, states of unseen instructions cluster by task (agreement across wordings)",
    ),
    "realistic": ("clusters", "So do those of SmolLM2-135M for 12 word tasks, at its best layer"),
    "unseen": (
        "transport",
        "A state moved to another task's cluster is answered as that task (share of answers)",
    ),
    "alignment": (
        "moved",
        "One task answered as another by moving states "
        "(share of prompts, above that of a random move)",
    ),
    "identity_pretraining": (
        "higher-throughout",
        "Does naming the task first help to learn it (accuracy gained over training)?",
    ),
    "component_reweighting": (
        "best-component-chosen",
        "Is the best single component right more often than the model (accuracy gained)?",
    ),
    "head_patterns": (
        "task-over-seed",
        "Are head patterns after fine-tuning more alike within a task (correlation gained)?",
    ),
    "icl_representations": (
        "answers-seen",
        "Questions draw on the demonstrations' answers more than on other tokens (nats)",
    ),
    "layer_by_layer": (
        "own-task",
        "A model of many tasks resembles the task's specialist more than another specialist does "
        "(CKA)",
    ),
}
PICTURE = ROOT / "studies" / "pictures" / "task_by_layer.svg"


def put(section: str, text: str) -> None:
    """Replace what stands between a section's two marks."""
    before, _, after = _parted(section)
    write_atomically(PAGES[section], f"{before}\n{text}\n{after}")


def claims_table(runs: list[Path], known: str = "") -> str:
    """The claims of several runs as Markdown, with those of other studies that are known."""
    rows = _known(known)
    for run in runs:
        study = _study(run)
        rows[study] = [_line(study, claim) for claim in _claims(run)]
    return "\n".join([*HEADS["claims"], *(line for study in rows.values() for line in study)])


def studies_table(runs: list[Path], known: str = "") -> str:
    """One line a study as Markdown, with those of other studies that are known."""
    rows = _known(known)
    for run in runs:
        study = _study(run)
        id, words = HEADLINES[study]
        rows[study] = [
            f"| {study} | {words} | {_estimate(claim)} | {_verdict(claim)} |"
            for claim in _claims(run)
            if claim["id"] == id
        ]
    for study, (_, words) in HEADLINES.items():
        rows.setdefault(study, [f"| {study} | {words} | – | not measured yet |"])
    return "\n".join([*HEADS["studies"], *(line for study in HEADLINES for line in rows[study])])


def _known(table: str) -> dict[str, list[str]]:
    """The rows of a table by study."""
    rows: dict[str, list[str]] = {}
    for line in table.strip().splitlines()[2:]:
        rows.setdefault(line.split("|")[1].strip(), []).append(line)
    return rows


def _study(run: Path) -> str:
    return json.loads((run / "config.json").read_text(encoding="utf-8"))["study"]


def _claims(run: Path) -> list[dict]:
    return json.loads((run / "claims.json").read_text(encoding="utf-8"))


def _line(study: str, claim: dict) -> str:
    control = ", ".join(f"{name} {_number(value)}" for name, value in claim["control"].items())
    return (
        f"| {study} | {claim['statement']} | {_estimate(claim)} "
        f"({claim['n']}, {claim['unit']}) | {control} | {_verdict(claim)} |"
    )


def _estimate(claim: dict) -> str:
    return f"{_number(claim['estimate'])} [{', '.join(map(_number, claim['ci95']))}]"


def _verdict(claim: dict) -> str:
    # Claims that survive Holm's correction over their run stand out.
    mark = "**" if claim["holds_corrected"] else ""
    return f"{mark}{claim['verdict']}{mark}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _parted(section: str) -> tuple[str, str, str]:
    """A page up to a section, the section, and the rest."""
    begin, end = f"<!-- {section}: begin -->", f"<!-- {section}: end -->"
    before, rest = PAGES[section].read_text(encoding="utf-8").split(begin)
    inside, after = rest.split(end)
    return before + begin, inside, end + after


if __name__ == "__main__":
    folders = [Path(folder) for folder in sys.argv[1:]]
    put("claims", claims_table(folders, _parted("claims")[1]))
    put("studies", studies_table(folders, _parted("studies")[1]))
    for folder in folders:
        if _study(folder) == "emergence":
            PICTURE.parent.mkdir(exist_ok=True)
            shutil.copy(folder / "figures" / "1_task_by_layer.svg", PICTURE)
