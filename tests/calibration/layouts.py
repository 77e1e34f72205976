"""Simulated states with planted wording, string and input effects, with a task effect or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import xarray as xr

WIDTH = 6
NOISE, STRING, INPUT, WORDING = 0.5, 0.5, 1.0, 1.0


@dataclass(frozen=True)
class Layout:
    """Rows of a data set, and what a reader of its name should know.

    Attributes:
        rows: ``task, template, instruction, input`` of each row.
        what: one line.
        again: rows of another draw, from a seed, where the layout is drawn too.
    """

    rows: pd.DataFrame
    what: str
    again: Callable[[int], pd.DataFrame] | None = None

    def of(self, seed: int) -> Layout:
        """The layout of one draw."""
        return self if self.again is None else replace(self, rows=self.again(seed))


def _rows(rows: list[tuple[int, str, str, int]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["task", "template", "instruction", "input"])
    return frame.astype({"task": str, "input": str})


def _nested(
    wordings: list[int], inputs: int, strings: int, known: list[list[int]] | None = None
) -> pd.DataFrame:
    """Each task has wordings of its own, each wording some strings, each string all inputs."""
    return _rows(
        [
            (task, f"{task}.{w}", f"{task}.{w}.{s}", x)
            for task, n in enumerate(wordings)
            for w in range(n)
            for s in range(strings)
            for x in (range(inputs) if known is None else known[task])
        ]
    )


def _crossed(tasks: int, templates: int, inputs: int) -> pd.DataFrame:
    """Each template words each task in one instruction, which stands with every input."""
    return _rows(
        [
            (task, f"t{w}", f"{task}/t{w}", x)
            for task in range(tasks)
            for w in range(templates)
            for x in range(inputs)
        ]
    )


def _unbalanced(seed: int = 0) -> pd.DataFrame:
    """Two to five wordings a task, of two to six strings each.

    In one such layout the numbers of strings are tied to tasks by chance, as in `_sizes_by_task`.
    """
    rng = np.random.default_rng([seed, 1])
    return _rows(
        [
            (task, f"{task}.{w}", f"{task}.{w}.{s}", x)
            for task, n in enumerate([2, 3, 4, 5])
            for w in range(n)
            for s in range(rng.integers(2, 7))
            for x in range(2)
        ]
    )


def _sizes_by_task() -> pd.DataFrame:
    """Tasks with few and with many rows a wording."""
    return _rows(
        [
            (task, f"{task}.{w}", f"{task}.{w}.{s}", x)
            for task, strings in enumerate([2, 2, 8, 8])
            for w in range(3)
            for s in range(strings)
            for x in range(2)
        ]
    )


LAYOUTS: dict[str, Layout] = {
    "nested": Layout(_nested([3] * 5, 2, 2), "5 tasks, 3 wordings each, 2 strings each, 2 inputs"),
    "crossed": Layout(_crossed(5, 4, 3), "5 tasks, 4 templates shared by all, 3 inputs"),
    "repeated inputs": Layout(
        _nested([3] * 4, 12, 1), "4 tasks, 3 wordings each, the same 12 inputs for all"
    ),
    "inputs known in part": Layout(
        _nested([3] * 6, 6, 1, [[t, (t + 1) % 6, (t + 2) % 6, (t + 4) % 6] for t in range(6)]),
        "6 tasks, 3 wordings each, each task with 4 of 6 inputs",
    ),
    "unbalanced": Layout(
        _unbalanced(),
        "4 tasks of 2 to 5 wordings, 2 to 6 strings each, drawn each time",
        _unbalanced,
    ),
    "sizes by task": Layout(
        _sizes_by_task(), "4 tasks, 3 wordings each, of 2 strings in two tasks and 8 in the others"
    ),
    "few wordings": Layout(_nested([2] * 2, 3, 3), "2 tasks, 2 wordings each: 3 relabellings"),
}


def states(layout: Layout, *, task: float, seed: int | Sequence[int], sites: int = 1) -> xr.Dataset:
    """Sums of effects of wording and task, string, input and task, each drawn by itself."""
    rng = np.random.default_rng(seed)
    rows = layout.rows
    names = {
        "task": (rows["task"], task),
        "wording": (rows["template"] + "|" + rows["task"], WORDING),
        "style": (rows["template"], WORDING / 2),
        "string": (rows["instruction"], STRING),
        "input": (rows["input"], INPUT),
    }
    x = NOISE * rng.normal(size=(len(rows), 1, sites, WIDTH))
    for labels, size in names.values():
        codes = pd.factorize(labels)[0]
        x += size * rng.normal(size=(codes.max() + 1, 1, sites, WIDTH))[codes]
    return xr.Dataset(
        {"resid": (("prompt", "position", "layer", "d_model"), x.astype(np.float32))},
        {"layer": range(sites), "position": ["answer"]}
        | {name: ("prompt", rows[name].to_numpy(dtype=str)) for name in rows},
    )
