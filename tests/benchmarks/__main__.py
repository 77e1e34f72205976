"""``make bench``: run the comparisons, print the table, and put it into the README.

With names behind it (``python -m tests.benchmarks linear``) only those are run, and the others
keep the numbers they have.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from lensclust.run_directory import machine, write_atomically
from tests.benchmarks import clustering, extraction, linear, patching
from tests.benchmarks.readme import put

RESULTS = Path(__file__).parent / "results"
COMPARISONS: dict[str, Callable[[], list[dict[str, object]]]] = {
    "extraction": extraction.rows,
    "linear": linear.rows,
    "patching": patching.rows,
    "clustering": clustering.rows,
}


def main(names: list[str]) -> None:
    """Measure, keep the numbers as JSON, and renew the README's table."""
    for name in names or COMPARISONS:
        result = {
            **machine(),
            "threads": torch.get_num_threads(),
            "comparisons": COMPARISONS[name](),
        }
        if name == "extraction":
            result["peak memory while storing, MB by prompts"] = {
                str(n): extraction.memory(n) for n in (1000, 8000)
            }
        write_atomically(_result(name), json.dumps(result, indent=2) + "\n")
    text = table({name: _read(name) for name in COMPARISONS if _result(name).exists()})
    print(text)
    put("make bench", text)


def table(results: dict[str, dict]) -> str:
    """The comparisons as Markdown."""
    lines = ["| what | peer | ours / peer | largest difference |", "|---|---|---|---|"]
    for result in results.values():
        for row in result["comparisons"]:
            ratio, difference = row["ours / peer"], f"{row['largest difference']:.0e}"
            lines.append(f"| {row['what']} | {row['peer']} | {ratio:.2g} | {difference} |")
    peaks = results["extraction"]["peak memory while storing, MB by prompts"]
    few, many = peaks
    measured = results["extraction"]
    lines += [
        "",
        f"Peak memory while storing: {peaks[few]:.0f} MB for {few} prompts, {peaks[many]:.0f} MB "
        f"for {many} (ratio {peaks[many] / peaks[few]:.2f}). {measured['machine']}, "
        f"{measured['threads']} threads.",
    ]
    return "\n".join(lines)


def _result(name: str) -> Path:
    return RESULTS / f"{name}.json"


def _read(name: str) -> dict:
    return json.loads(_result(name).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(sys.argv[1:])
