"""Fill the README from measured results: never typed, always the newest run."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from lensclust.run_directory import write_atomically

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PICTURE = ROOT / "studies" / "pictures" / "ari_by_layer.svg"


def put(section: str, text: str) -> None:
    """Replace what stands between a section's two marks."""
    begin, end = f"<!-- {section}: begin -->", f"<!-- {section}: end -->"
    before, rest = README.read_text(encoding="utf-8").split(begin)
    write_atomically(README, f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def claims_table(runs: list[Path]) -> str:
    """The claims of several runs as Markdown."""
    lines = [
        "| study | claim | estimate [95 %] | control | verdict |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        study = json.loads((run / "config.json").read_text(encoding="utf-8"))["study"]
        for claim in json.loads((run / "claims.json").read_text(encoding="utf-8")):
            low, high = claim["ci95"]
            control = ", ".join(f"{name} {value:.2f}" for name, value in claim["control"].items())
            lines.append(
                f"| {study} | {claim['statement']} | {claim['estimate']:.2f} "
                f"[{low:.2f}, {high:.2f}] | {control} | {claim['verdict']} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    folders = [Path(folder) for folder in sys.argv[1:]]
    put("claims", claims_table(folders))
    PICTURE.parent.mkdir(exist_ok=True)
    shutil.copy(folders[0] / "figures" / "1_ari_by_layer.svg", PICTURE)
