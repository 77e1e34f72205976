"""``make bench``: run the comparisons, print the tables, and put them into docs/benchmarks.md.

With names behind it (``python -m tests.benchmarks linear``) only those are run, and the others
keep the numbers they have. ``--full`` (``make bench-full``) takes the sizes that need an hour.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import torch

from lensclust.runs.directory import machine
from lensclust.storage.atomic import write_atomically
from tests.benchmarks import (
    attention,
    clustering,
    components,
    device,
    distributed,
    extraction,
    growth,
    head_activation,
    linear,
    page,
    patching,
    prefixes,
    stores,
)
from tests.benchmarks.readme import put

RESULTS = Path(__file__).parent / "results"
COMPARISONS: dict[str, Callable[[], Iterable[dict[str, object]]]] = {
    "extraction": extraction.rows,
    "prefixes": prefixes.rows,
    "growth": growth.rows,
    "stores": stores.rows,
    "device": device.rows,
    "distributed": distributed.rows,
    "linear": linear.rows,
    "patching": patching.rows,
    "clustering": clustering.rows,
    "components": components.rows,
    "head_activation": head_activation.rows,
    "attention": attention.rows,
    "page": page.rows,
}
FULL = {
    "prefixes": lambda: prefixes.rows(full=True),
    "growth": lambda: growth.rows(full=True),
    "distributed": lambda: distributed.rows(full=True),
    "attention": lambda: attention.rows(full=True),
}


def main(arguments: list[str]) -> None:
    """Measure, keep the numbers as JSON, and renew the tables of docs/benchmarks.md."""
    ways = COMPARISONS | (FULL if "--full" in arguments else {})
    for name in [each for each in arguments if each != "--full"] or ways:
        result = {
            **machine(),
            "threads": torch.get_num_threads(),
            "comparisons": list(ways[name]()),
        }
        if name == "extraction":
            result["peak memory while storing, MB by prompts"] = {
                str(n): median(extraction.memory(n) for _ in range(3)) for n in (5_000, 50_000)
            }
        write_atomically(RESULTS / f"{name}.json", json.dumps(result, indent=2) + "\n")
    text = tables(measured())
    print(text)
    put("make bench", text)


def measured() -> dict[str, dict]:
    """The results that are kept, by comparison."""
    files = {name: RESULTS / f"{name}.json" for name in COMPARISONS}
    return {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name, file in files.items()
        if file.exists()
    }


def tables(results: dict[str, dict]) -> str:
    """What was compared, then how time and memory grow, as Markdown."""
    compared = ["| what | peer | ours / peer | share of the limit | largest difference |"]
    compared.append("|---|---|---|---|---|")
    grown = ["| time of `extract` | sizes | exponent | steepest step | at most |"]
    grown.append("|---|---|---|---|---|")
    for row in (row for result in results.values() for row in result["comparisons"]):
        if "skipped" in row:
            compared.append(f"| {row['what']} | not run: {row['skipped']} | | | |")
        elif "exponent" in row:
            most = row["at most"] or ""
            steps = f"{row['exponent']:.2f} | {row['steepest step']:.2f}"
            grown.append(f"| {row['what']} | {row['sizes']} | {steps} | {most} |")
        else:
            limit = f"{row['share of limit']:.2f} of {row['limit']:.3g}" if "limit" in row else ""
            if seconds := row.get("load, seconds"):
                limit = f"{seconds:.2f} s, {row['slowest, seconds']:.2f} s at most"
            if share := row.get("share of the matrix rate"):
                limit = f"{share:.2f} of the matrix rate"
            difference = row["largest difference"]
            compared.append(
                f"| {row['what']} | {row['peer']} | {row['ours / peer']:.2g} | {limit} "
                f"| {'' if difference is None else f'{difference:.0e}'} |"
            )
    peaks = results["extraction"]["peak memory while storing, MB by prompts"]
    few, many = peaks
    where = {f"{result['machine']}, {result['threads']} threads" for result in results.values()}
    memory = (
        f"Peak memory while storing: {peaks[few]:.0f} MB for {int(few):,} prompts, "
        f"{peaks[many]:.0f} MB for {int(many):,} (ratio {peaks[many] / peaks[few]:.2f}). "
        f"{'; '.join(sorted(where))}."
    )
    return "\n".join([*compared, "", *grown, "", memory])


if __name__ == "__main__":
    main(sys.argv[1:])
