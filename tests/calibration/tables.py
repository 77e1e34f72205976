"""Rates of small p, by measure and layout, and the page that shows them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from joblib import delayed

from lensclust.parallel import in_parallel, one_thread
from tests.calibration.layouts import INPUT, LAYOUTS, NOISE, STRING, WIDTH, WORDING, Layout
from tests.calibration.measures import MEASURES, PERMUTATIONS, Measure

DRAWS, AGAIN = 200, 1000
MOST_05, MOST_01, LEAST_05 = 0.08, 0.03, 0.02
EFFECT = 1.5
# Seeds of a cell that is drawn again; those of the power table.
SECOND, POWERED = 1_000_000, 2_000_000

Drawn = dict[str, np.ndarray]


def draw(
    measure: Measure, layout: Layout, *, task: float, seeds: Sequence[int], jobs: int = 1
) -> Drawn:
    """p of each score of a measure, by draw."""
    calls = (delayed(_one)(measure, layout.of(seed), task, seed) for seed in seeds)
    found = list(in_parallel(calls, jobs=jobs))
    return {name: np.array([each.get(name, np.nan) for each in found]) for name in found[0]}


def _one(measure: Measure, layout: Layout, task: float, seed: int) -> dict[str, float]:
    logging.disable(logging.WARNING)  # the layouts are coarse on purpose
    try:
        with one_thread():
            return measure(layout, task, seed)
    finally:
        logging.disable(logging.NOTSET)


def rates(
    draws: int,
    *,
    powered: int,
    again: int = AGAIN,
    layouts: Sequence[str] = tuple(LAYOUTS),
    measures: Sequence[Measure] = MEASURES,
    told: Callable[[str], object] = str,
    jobs: int = 1,
) -> pd.DataFrame:
    """One row a score and layout: share of p up to .05 and .01 without and with a task effect.

    A cell outside its bounds is drawn again, ``again`` times, before it is called wrong or timid.
    """
    rows = []
    for name, measure in product(layouts, measures):
        drawn = partial(draw, measure, LAYOUTS[name], jobs=jobs)
        null = drawn(task=0, seeds=range(draws))
        with_task = drawn(task=EFFECT, seeds=range(POWERED, POWERED + powered))
        second: Drawn = {}
        for score, p in null.items():
            row = _row(p, with_task[score])
            if (row["wrong"] or row["timid"]) and draws < again:
                second = second or drawn(task=0, seeds=range(SECOND, SECOND + again))
                row = _row(second[score], with_task[score])
            rows.append(row | {"measure": score, "layout": name})
            told(
                f"{name}: {score}: {row['at_05']:.3f} at .05, {row['at_01']:.3f} at .01, "
                f"{row['found']:.2f} with a task, {row['draws']} draws"
            )
    return pd.DataFrame(rows)


def _row(null: np.ndarray, with_task: np.ndarray) -> dict[str, Any]:
    at_05, at_01 = (float((null <= level + 1e-9).mean()) for level in (0.05, 0.01))
    # Where no p reached a level even with the effect, the layout has no relabellings for it.
    able = bool(min(null.min(), with_task.min()) <= 0.02)
    timid = able and at_05 < LEAST_05
    return {
        "at_05": at_05,
        "at_01": at_01,
        "found": float((with_task <= 0.05 + 1e-9).mean()),
        "smallest": float(min(null.min(), with_task.min())),
        "timid": timid,
        "wrong": at_05 > MOST_05 or at_01 > MOST_01,
        "draws": len(null),
    }


def page(found: pd.DataFrame, draws: int, known: str = "") -> str:
    """The page of the docs; cells that were not drawn stay as they are on the known page."""
    cells = _cells(known) | {
        (row["measure"], row["layout"]): _cell(row) for _, row in found.iterrows()
    }
    lines = [
        "# Calibration of p-values",
        "",
        "Written by `make calibrate`, or layout by layout by `python -m tests.calibration --only p "
        "--layouts NAME`. States are simulated with effects of the wording (standard deviation "
        f"{WORDING}, half as much again shared by a template's tasks), the string ({STRING}), the "
        f"input ({INPUT}) and noise ({NOISE}), each drawn by itself in {WIDTH} dimensions, and "
        "with no effect of the task. A valid p is at most .05 in at most 5 % of such draws.",
        "",
        f"Each cell: share of p ≤ .05 / share of p ≤ .01 in {draws} draws without a task effect "
        f"(bounds {MOST_05} and {MOST_01}; a cell outside is drawn again, {AGAIN:,} times, and "
        f"then marked * where it still is); then the share of p ≤ .05 with a task effect of "
        f"{EFFECT}. {PERMUTATIONS} relabellings, or all there are; † less than {LEAST_05} at .05 "
        "although the layout has enough relabellings; – the layout has too few for p ≤ .05; empty: "
        "not drawn yet.",
        "",
        "Where tasks do not know all inputs (`inputs known in part`), the input alone tells some "
        "tasks apart: scores over all rows, and neighbours, which may share an input, find that, "
        "and the notes of the probes say so. Condition on the input there. The silhouette within "
        "input stays somewhat liberal in that layout: no relabelling keeps both the number of "
        "wordings a task has at each input and their company across inputs.",
        "",
        "A single layout ties the numbers of strings to tasks by chance, and relabelling cannot "
        "know that: so `unbalanced` is drawn anew each time, and `sizes by task` shows what a tie "
        "does.",
        "",
        "`patch` exchanges the signs of wordings and takes the inputs as given: where there are "
        "two (`nested`, `unbalanced`, `sizes by task`), the mean of their effects counts as one.",
        "",
        *(f"- **{name}**: {layout.what}" for name, layout in LAYOUTS.items()),
        "",
        "| p of | " + " | ".join(LAYOUTS) + " |",
        "|---|" + "---|" * len(LAYOUTS),
    ]
    for measure in dict.fromkeys(measure for measure, _ in cells):
        texts = [cells.get((measure, name), "") for name in LAYOUTS]
        lines.append(f"| {measure} | " + " | ".join(texts) + " |")
    return "\n".join([*lines, ""])


def _cells(page: str) -> dict[tuple[str, str], str]:
    """The cells of a page: (measure, layout) -> text."""
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return {
        (row[0], name): text.strip()
        for row in rows[1:]
        for name, text in zip(rows[0][1:], row[1:], strict=False)
    }


def _cell(row: pd.Series) -> str:
    if row["smallest"] > 0.05:
        return f"– (p ≥ {row['smallest']:.2g})"
    mark = "*" if row["wrong"] else "†" if row["timid"] else ""
    return f"{row['at_05']:.3f}{mark} / {row['at_01']:.3f}; {row['found']:.2f}"
