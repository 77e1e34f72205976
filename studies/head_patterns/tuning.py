"""Tune a model on one task and follow its pattern of head activation over samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from transformer_lens.model_bridge import TransformerBridge

import lensclust as lc
import probes

# Separates the names of a composite task's parts in the column ``parts``.
AND = " & "


@dataclass(frozen=True)
class Task:
    """Training prompts of a task, and test prompts for each run.

    Attributes:
        kind: ``basic``, ``complex`` or ``control``.
        parts: names of the tasks that a complex one is composed of.
        train: prompts to tune on.
        tests: prompts to measure each run on; no two runs share one.
    """

    name: str
    kind: str
    parts: tuple[str, ...]
    train: lc.Prompts
    tests: tuple[lc.Prompts, ...]

    @property
    def labels(self) -> dict[str, str]:
        """Label columns of this task's rows."""
        return {"task": self.name, "kind": self.kind, "parts": AND.join(self.parts)}


def split_tests(prompts: lc.Prompts, runs: int, most: int) -> tuple[lc.Prompts, ...]:
    """Disjoint test prompts for each run, at most ``most``, balanced over templates."""
    nth = prompts.rows.groupby("template").cumcount().to_numpy()
    places = [np.flatnonzero(nth % runs == run) for run in range(runs)]
    # Strided, since the prompts of a template are consecutive.
    spread = [own[np.linspace(0, len(own) - 1, min(most, len(own))).astype(int)] for own in places]
    return tuple(prompts.take(own) for own in spread)


def tuned_patterns(
    model: TransformerBridge, task: Task, *, seed: int, **options: Any
) -> pd.DataFrame:
    """Patterns, loss and accuracy of a task at each checkpoint of each run, as tidy rows.

    The model is unchanged afterwards.

    Args:
        seed: of the batches, with the index of the run.
        options: of `lensclust.finetune`.
    """
    tables: list[pd.DataFrame] = []
    seen: dict[int, int] = {}
    for number, test in enumerate(task.tests):
        run = lc.finetune(
            model,
            task.train,
            seed=_seed(seed, number),
            evaluate=test,
            progress=False,
            **options,
        )
        tables += [measured(tuned, test).assign(run=number, step=s) for s, tuned in run.series()]
        learned = run.frame.melt(["step"], ["accuracy", "loss"], "metric")
        tables.append(learned.assign(run=number))
        seen = {checkpoint.step: checkpoint.samples for checkpoint in run.checkpoints}
    found = pd.concat(tables, ignore_index=True)
    return found.assign(samples=found["step"].map(seen), **task.labels)


def measured(model: TransformerBridge, prompts: lc.Prompts) -> pd.DataFrame:
    """Activation of each head by these prompts, one row per head."""
    found = probes.head_activation(model, prompts)
    return found.frame[["block", "head", "value"]].assign(metric="activation")


def pattern_change(
    model: TransformerBridge, prompts: lc.Prompts, **options: Any
) -> Float[np.ndarray, "block head"]:
    """Pattern of prompts after tuning on them minus that before."""
    before = probes.head_activation(model, prompts).pattern.values
    with lc.finetune(model, prompts, checkpoints=2, progress=False, **options).at() as tuned:
        return probes.head_activation(tuned, prompts).pattern.values - before


def _seed(seed: int, run: int) -> int:
    return int(np.random.default_rng([seed, run]).integers(2**31))


def changes(scores: pd.DataFrame, *, run: int | None = None) -> dict[str, np.ndarray]:
    """Task -> last minus first pattern, mean over runs or of one run."""
    found = stack(scores)
    ends = found.isel(step=-1) - found.isel(step=0)
    ends = ends.mean("run") if run is None else ends.sel(run=run)
    return {str(task): ends.sel(task=task).values for task in ends["task"].values}


def stack(scores: pd.DataFrame) -> Any:
    """Activations as one array ``(task, run, step, block, head)``."""
    rows = scores[scores["metric"] == "activation"]
    keys = ["task", "run", "step", "block", "head"]
    numbers = {name: rows[name].astype(int) for name in keys[1:]}
    return rows.assign(**numbers).set_index(keys)["value"].to_xarray()


def spread_counts(shares: Sequence[float], n: int) -> list[int]:
    """Integers that sum to ``n`` and are as near to its shares as possible.

    >>> spread_counts([0.5, 0.25, 0.25], 6)
    [3, 2, 1]
    """
    wanted = np.asarray(shares, dtype=float) / np.sum(shares) * n
    counts = np.floor(wanted).astype(int)
    short = np.argsort(counts - wanted, kind="stable")[: n - counts.sum()]
    counts[short] += 1
    return counts.tolist()
