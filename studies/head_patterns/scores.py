"""Similarity, concentration, speed and composition, from the patterns of single runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

import probes
from probes.heads import CONCENTRATION
from studies.head_patterns.options import COMPLEX, CONTROL
from studies.head_patterns.tuning import AND, stack
from studies.scores import where

Row = dict[str, Any]
RAW, SHARES = "raw", "shares"
# "Few" samples: this share of all training samples.
FEW = 0.1


def derived(scores: pd.DataFrame, *, permutations: int) -> pd.DataFrame:
    """Derived scores by part, seed and task, one row each, from activations of all runs.

    Args:
        permutations: draws of each null.
    """
    tables = []
    for (part, seed), rows in scores[scores["task"].notna()].groupby(["part", "seed"]):
        own = where(rows, metric=["activation", "loss", "accuracy"])
        own = own[own["run"].notna()]
        found = stack(own)
        tasks = own.drop_duplicates("task").set_index("task")
        table = pd.DataFrame(
            [
                *learned(own),
                *separation(found, permutations),
                *concentration(found),
                *speed(found, own),
                *composition(found, tasks[["kind", "parts"]], permutations),
            ]
        )
        labels = tasks.loc[table["task"], ["kind", "parts"]].reset_index(drop=True)
        tables.append(table.assign(part=part, seed=seed, **labels))
    return pd.concat(tables, ignore_index=True)


def learned(rows: pd.DataFrame) -> Iterator[Row]:
    """Accuracy on test prompts before and after, mean over runs."""
    table = where(rows, metric="accuracy").pivot_table("value", "task", "step")
    for stage, place in (("before", 0), ("after", -1)):
        for name, value in table.iloc[:, place].items():
            yield _row(name, "learned", "model", value, stage=stage)


def separation(found: xr.DataArray, permutations: int) -> Iterator[Row]:
    """Correlation over heads of patterns of different runs, of one task and of two tasks.

    Each pair of tasks also has a row (``other`` names the second). The null ``dealt``, before
    and after tuning, is 'one task' with the tasks permuted within each run; ``identified`` is
    the share of runs whose most similar pattern of another run is of the same task.
    """
    tasks, runs = found.sizes["task"], found.sizes["run"]
    same = np.tile(np.eye(tasks, dtype=bool), (runs, runs))
    apart = ~np.kron(np.eye(runs, dtype=bool), np.ones((tasks, tasks), dtype=bool))
    rng = np.random.default_rng(0)
    for stage, place in (("before", 0), ("after", -1)):
        patterns = found.isel(step=place).transpose("run", "task", "block", "head").values
        alike = np.corrcoef(patterns.reshape(runs * tasks, -1))
        permuted = [alike[:, order] for order in _permuted(tasks, runs, permutations, rng)]
        nearest = np.where(apart, alike, -np.inf).argmax(1) % tasks
        for task, name in enumerate(found["task"].values):
            own = np.arange(task, runs * tasks, tasks)
            means = {
                "same task": alike[own][(same & apart)[own]].mean(),
                "other tasks": alike[own][(~same & apart)[own]].mean(),
                "dealt": np.mean([other[own][(same & apart)[own]].mean() for other in permuted]),
            }
            for method, value in means.items():
                yield _row(name, "similarity", method, value, stage=stage)
            for other, its in enumerate(found["task"].values):
                if other != task:
                    value = alike[own][:, other::tasks][apart[own][:, other::tasks]].mean()
                    yield _row(name, "similarity", "pair", value, stage=stage) | {"other": str(its)}
            yield _row(name, "identified", "model", (nearest[own] == task).mean(), stage=stage)


def _permuted(
    tasks: int, runs: int, permutations: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Indices of runs and tasks, with the tasks permuted within each run."""
    for _ in range(permutations):
        yield np.concatenate([run * tasks + rng.permutation(tasks) for run in range(runs)])


def concentration(found: xr.DataArray) -> Iterator[Row]:
    """Gini coefficient and other concentrations before and after tuning, mean over runs.

    ``noise`` is the difference of two runs before tuning, which differ in prompts alone.
    """
    ends = found.isel(step=[0, -1]).transpose("task", "step", "run", "block", "head")
    values = ends.values.reshape(*ends.shape[:3], -1)
    for metric, (measure, _) in CONCENTRATION.items():
        measured = measure(values)
        for name, (before, after) in zip(found["task"].values, measured, strict=True):
            yield _row(name, metric, "model", before.mean(), stage="before")
            yield _row(name, metric, "model", after.mean(), stage="after")
            yield _row(name, metric, "noise", float(np.ptp(before)), stage="before")


def speed(found: xr.DataArray, rows: pd.DataFrame) -> Iterator[Row]:
    """Share of the total change after a tenth of the samples, mean over runs.

    Of a pattern: 1 - d(t) / d(0), with d the distance to the last, Euclidean ('pattern') or one
    minus the correlation ('correlation'); of the loss: the share of its decrease.
    """
    loss = where(rows, metric="loss").set_index(["task", "run", "step"])["value"].sort_index()
    samples = where(rows, metric="loss").groupby("step")["samples"].first().sort_index()
    at = samples.to_numpy(dtype=float)
    for name in found["task"].values:
        ways: dict[str, list[np.ndarray]] = {"pattern": [], "correlation": [], "loss": []}
        for run in found["run"].values:
            series = found.sel(task=name, run=run).values.reshape(len(at), -1)
            fall = loss.loc[name, run].reindex(samples.index).to_numpy()
            ways["pattern"].append(_way(np.linalg.norm(series - series[-1], axis=1)))
            ways["correlation"].append(_way(1 - np.corrcoef(series)[-1]))
            ways["loss"].append(_way(fall - fall[-1]))
        for method, each in ways.items():
            few = [np.interp(FEW * at[-1], at, way) for way in each]
            yield _row(name, "way", method, float(np.mean(few)))
            for place, seen in enumerate(at):
                value = float(np.mean([way[place] for way in each]))
                yield _row(name, "way so far", method, value) | {"samples": seen}


def _way(distance: np.ndarray) -> np.ndarray:
    """Share of the total change; NaN where there is no change."""
    return 1 - distance / distance[0] if distance[0] > 0 else np.full(len(distance), np.nan)


def composition(found: xr.DataArray, tasks: pd.DataFrame, permutations: int) -> Iterator[Row]:
    """R² of each complex task's change by its parts' changes, and by the nulls."""
    shares = found / found.sum(["block", "head"])
    controls = [str(name) for name in tasks.index[tasks["kind"] == CONTROL]]
    parts = {
        str(name): text.split(AND)
        for name, text in tasks.loc[tasks["kind"] == COMPLEX, "parts"].items()
    }
    for form, values in ((RAW, found), (SHARES, shares)):
        ends = values.isel(step=-1) - values.isel(step=0)
        for run in found["run"].values:
            change = {str(n): ends.sel(task=n, run=run).values for n in found["task"].values}
            for name, own in parts.items():
                other = [part for task, some in parts.items() if task != name for part in some]
                bases = {"parts": own, "parts of other tasks": other[:2], "controls": controls}
                # The change shared by all tasks leaves out the parts.
                rest = [values for task, values in change.items() if task not in (name, *own)]
                shared = np.mean(rest, axis=0)
                yield from _fits(name, change, bases, shared, form, permutations, int(run))


def _fits(
    name: str,
    change: Mapping[str, np.ndarray],
    bases: Mapping[str, Sequence[str]],
    shared: np.ndarray,
    form: str,
    permutations: int,
    run: int,
) -> Iterator[Row]:
    labels = {"form": form, "run": run}
    for method, names in bases.items():
        if not names:
            continue
        fit = probes.compose(
            change[name],
            {task: change[task] for task in names},
            shared=shared,
            nulls=permutations if method == "parts" else 2,
            seed=run,
        )
        yield _row(name, "r2", method, fit.r2) | labels
        yield _row(name, "r2_out", method, fit.r2_out) | labels
        if method == "parts":
            for null in fit.frame.to_dict("records"):
                metric, method = str(null["metric"]), str(null["null"])
                yield _row(name, metric, method, null["null_mean"]) | labels
                yield _row(name, f"{metric} p", method, null["p"]) | labels


def _row(task: Any, metric: str, method: str, value: float, **labels: Any) -> Row:
    return {"task": str(task), "metric": metric, "method": method, "value": float(value), **labels}
