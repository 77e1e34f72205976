"""The page over every run in ``runs/``: how long a browser takes to open it from disk.

Each round starts a browser that has opened nothing yet. The floor is a page without a script
that holds as many bytes of text. What is timed ends with the load event; stills come in after
it, and figures are drawn when they come near.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from lensclust.report.page import write_page
from tests.browser import started, why_not

ROUNDS = 5
RUNS = Path("runs")
LOADED = (
    "const [entry] = performance.getEntriesByType('navigation');"
    "return entry.loadEventEnd > 0 && entry.loadEventEnd / 1000"
)


def rows() -> list[dict[str, object]]:
    """One row, or why there is none."""
    runs = sorted(path.parent for path in RUNS.glob("*/claims.json"))
    reason = why_not() if runs else f"no finished run in {RUNS}/"
    if reason:
        return [{"what": "page over all runs, opened from disk", "skipped": reason}]
    with tempfile.TemporaryDirectory() as folder:
        page = write_page(runs, Path(folder) / "page.html")
        size = page.stat().st_size
        floor = Path(folder) / "floor.html"
        floor.write_text(f"<!DOCTYPE html><title>.</title><template>{'a' * size}</template>")
        took = [(_opened(page), _opened(floor)) for _ in range(ROUNDS)]
    ours, floors = (np.array(each) for each in zip(*took, strict=True))
    seconds, messages, requests = ours.T
    return [
        {
            "what": f"page over {len(runs)} runs, {size / 1e6:.1f} MB, opened from disk",
            "peer": "as many bytes of text",
            "ours / peer": float(np.median(seconds / floors[:, 0])),
            "largest difference": None,
            "load, seconds": float(np.median(seconds)),
            "slowest, seconds": float(seconds.max()),
            "console messages": int(messages.sum()),
            "requests beyond the page": int(requests.sum()),
            "runs": [run.name for run in runs],
        }
    ]


def _opened(page: Path) -> tuple[float, int, int]:
    """Seconds to the load event, messages on the console, requests beyond the page itself."""
    with tempfile.TemporaryDirectory() as folder, started(Path(folder)) as browser:
        browser.open(page)
        seconds = browser.until(LOADED)
        urls = [url for url in browser.requests() if not url.startswith(("data:", "blob:"))]
        return seconds, len(browser.errors()), len(urls) - 1
