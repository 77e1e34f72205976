"""The small model of most studies, trained on the prompts of one seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import lensclust as lc
import probes

if TYPE_CHECKING:
    import pandas as pd

    from lensclust.training import TrainingRun


@runtime_checkable
class Trains(Protocol):
    """A study with the options of a training."""

    @property
    def model(self) -> str: ...
    @property
    def steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def lr(self) -> float: ...


def trained(
    study: Trains,
    prompts: lc.Prompts,
    seed: int,
    folder: Path,
    *,
    n_checkpoints: int,
    sizes: dict[str, int] | None = None,
    **options: Any,
) -> TrainingRun:
    """Train the study's native preset on a seed's prompts, or read it from ``folder``.

    Args:
        study: names the preset, and the steps, prompts a step and learning rate.
        folder: of the seed, for checkpoints; a killed training resumes.
        sizes: changed fields of the preset, beside those that the prompts need.
        options: further ones of `lensclust.train`.
    """
    from lensclust.models import native_config
    from lensclust.training import required_sizes

    return lc.train(
        native_config(study.model, **required_sizes(prompts), **(sizes or {})),
        prompts,
        steps=study.steps,
        batch_size=study.batch_size,
        lr=study.lr,
        n_checkpoints=n_checkpoints,
        out=folder / "checkpoints",
        seed=seed,
        resume=True,
        progress=False,
        **options,
    )


SPLITS = ("train", "new_string", "new_pair", "both", "new_regex")
UNSEEN = "new_string"
# Labels that colour the page's points.
LABELS = ("task", "input", "output", "template")
LAYER_0 = (
    "At layer 0 the state encodes only the input and its position: where it takes fewer distinct "
    "values than there are tasks, no clustering is possible and its score is 0."
)


def task_set(study: Any, seed: int) -> lc.Prompts:
    """The tasks of one seed."""
    return lc.tasks.sif(
        n_tasks=study.n_tasks,
        n_inputs=study.n_inputs,
        mappings_per_task=study.mappings_per_task,
        n_outputs=study.n_outputs,
        regexes_per_task=study.regexes_per_task,
        held_out_regexes=study.held_out_regexes,
        rows_per_mapping=study.rows_per_mapping,
        seed=seed,
    )


def clustered_prompts(prompts: lc.Prompts, per_mapping: int) -> lc.Prompts:
    """The prompts to cluster: every split, the training split cut to the others' size.

    The prompts kept of a task and input cycle over its expressions. Inputs that a split has with
    one task only are left out: they have no tasks to cluster by.
    """
    import numpy as np

    rows = prompts.rows
    cell = ["split", "task", "input"]
    turn = rows.groupby([*cell, "template"]).cumcount()
    nth = turn.groupby([rows[name] for name in cell]).rank(method="first")
    tasks = rows.groupby(["split", "input"])["task"].transform("nunique")
    return prompts.take(np.flatnonzero(((nth <= per_mapping) & (tasks > 1)).to_numpy()))


def input_only_accuracy(rows: pd.DataFrame) -> pd.Series:
    """Accuracy by split of the commonest output of each input, ignoring the instruction."""
    share = rows.groupby(["split", "input"])["output"].agg(lambda o: o.value_counts().iloc[0])
    return share.groupby("split").sum() / rows.groupby("split").size()


def states_over_training(followed: Sequence[tuple[int, Any]], prompts: lc.Prompts) -> pd.DataFrame:
    """The same prompts in two dimensions, by checkpoint and layer."""
    texts = [prompts.text(row) for row in range(len(prompts))]
    wanted = ["step", "layer", "x", "y", "explained", *LABELS]
    found = probes.cluster_map(followed).frame[wanted]
    return found.assign(text=texts * (len(found) // len(texts)))
