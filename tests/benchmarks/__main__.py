"""``make bench``: run the comparisons, print the table, and put it into the README."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import torch

from lensclust.run_directory import machine, write_atomically
from tests.benchmarks import extraction
from tests.benchmarks.readme import put

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure, keep the numbers as JSON, and renew the README's table."""
    frame = pd.DataFrame(extraction.rows())
    peaks = {n: extraction.memory(n) for n in (1000, 8000)}
    result = {
        **machine(),
        "threads": torch.get_num_threads(),
        "extraction": frame.to_dict("records"),
        "peak memory while storing, MB by prompts": peaks,
    }
    write_atomically(RESULTS / "extraction.json", json.dumps(result, indent=2) + "\n")
    text = table(frame, peaks, result)
    print(text)
    put("make bench", text)


def table(frame: pd.DataFrame, peaks: dict[int, float], result: dict[str, object]) -> str:
    """The comparisons as Markdown."""
    lines = ["| what | peer | ours / peer | largest relative difference |", "|---|---|---|---|"]
    for row in frame.to_dict("records"):
        difference = f"{row['largest difference']:.0e}"
        lines.append(f"| {row['what']} | {row['peer']} | {row['ours / peer']:.2f} | {difference} |")
    few, many = peaks
    lines += [
        "",
        f"Peak memory while storing: {peaks[few]:.0f} MB for {few} prompts, {peaks[many]:.0f} MB "
        f"for {many} (ratio {peaks[many] / peaks[few]:.2f}). {result['machine']}, "
        f"{result['threads']} threads.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
