"""Training in phases: naming the task and doing it, in any order.

Phase 1 trains on prompts without answers to predict a token that names the task, an additional id
of the vocabulary. Arms of `identity_pretraining` differ in these names: true ones, shuffled ones,
or those from k-means on a model's own states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Int

import lensclust as lc
from lensclust.training import Auxiliary, TrainingRun, required_sizes
from studies.synthetic_task import UNSEEN

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

NAMING, TASK = "naming", "task"
_REPORTED = 2
After = Literal["input", "instruction"]
# The prompts of a phase may depend on the model at its start.
Content = Callable[["TransformerBridge | None"], lc.Prompts]


@dataclass(frozen=True)
class Phase:
    """A phase: steps on the prompts that ``content`` gives for the current model.

    Attributes:
        name: unique among phases of one seed with the same preceding phases.
        kind: ``"naming"`` or ``"task"``.
        content: the prompts with answers and splits.
        auxiliary: a second answer beside the loss.
    """

    name: str
    kind: str
    steps: int
    content: Content
    auxiliary: Auxiliary | None = None


@dataclass(frozen=True)
class Stage:
    """A checkpoint, with the steps so far of all phases and of the task alone."""

    kind: str
    step: int
    task_step: int
    model: Callable[[], TransformerBridge]


def train_in_phases(
    config: TransformerBridgeConfig,
    phases: Sequence[Phase],
    *,
    warmup: int,
    report: Callable[[lc.Prompts], lc.Prompts],
    done: dict[tuple[str, ...], TrainingRun],
    **options: Any,
) -> tuple[pd.DataFrame, list[Stage]]:
    """Train the phases in order, each from the weights of the last, at a constant rate.

    Every phase warms up over ``warmup`` steps with a new optimizer. At a constant rate a run
    evaluated at any step equals one that ends there, so one run serves all comparisons.

    Args:
        warmup: steps.
        report: selects the prompts to report accuracy on from those of a phase.
        done: trainings by the names of the phases so far; filled, and reused by arms with the same
            first phases.
        options: of `lensclust.train`, the same in every phase.

    Returns:
        Accuracies ``kind, step, task_step, split, accuracy, loss``, counted over all phases, and
        the checkpoints.
    """
    import pandas as pd

    tables, stages = [], []
    step, task_step, last = 0, 0, None
    for number, phase in enumerate(phases, 1):
        key = tuple(earlier.name for earlier in phases[:number])
        if key not in done:
            model = None if last is None else last.model()
            prompts = phase.content(model)
            done[key] = lc.train(
                config,
                prompts,
                steps=phase.steps,
                warmup=min(1.0, warmup / phase.steps),
                schedule="constant",
                loss_on="answer",
                auxiliary=phase.auxiliary,
                start_from=model,
                evaluate=report(prompts),
                progress=False,
                **options,
            )
        run, of_task = done[key], int(phase.kind == TASK)
        counted = {
            "kind": phase.kind,
            "task_step": task_step + of_task * run.frame["step"],
            "step": step + run.frame["step"],
        }
        tables.append(run.frame.assign(**counted))
        # A later phase begins where the one before it ended.
        for checkpoint in run.checkpoints[0 if number == 1 else 1 :]:
            at = checkpoint.step
            stages.append(Stage(phase.kind, step + at, task_step + of_task * at, checkpoint.model))
        last = run
        step, task_step = step + phase.steps, task_step + of_task * phase.steps
    return pd.concat(tables, ignore_index=True), stages


# -- the prompts of phase 1 ---------------------------------------------------------------


def naming_prompts(
    prompts: lc.Prompts, names: Int[np.ndarray, " prompt"], *, after: After = "input"
) -> lc.Prompts:
    """The prompts with names as answers: numbers 0, 1, ... as ids after the vocabulary.

    With ``after="instruction"`` a prompt ends before its input. Names change only the answers, so
    that arms with different names see the same batches.

    >>> from lensclust.training import required_sizes
    >>> prompts = lc.tasks.sif(n_tasks=3, n_inputs=4, mappings_per_task=3)
    >>> named = naming_prompts(prompts, prompts.rows["task"].to_numpy())
    >>> required_sizes(named)["d_vocab"] - required_sizes(prompts)["d_vocab"]
    3
    """
    ids = first_name(prompts) + names
    answers = tuple((int(name),) for name in ids)
    if after == "input":
        return replace(prompts, answers=answers)
    lengths = prompts.position("input_start")
    tokens = prompts.tokens[:, : int(lengths.max())].clone()
    tokens[torch.arange(tokens.shape[1]) >= lengths[:, None]] = prompts.pad_id
    spans = {"instruction": (prompts.spans or {})["instruction"]}
    return replace(
        prompts, tokens=tokens, lengths=lengths, answers=answers, spans=spans, texts=None
    )


def first_name(prompts: lc.Prompts) -> int:
    """The first token id after the vocabulary of prompts and answers."""
    return required_sizes(prompts)["d_vocab"]


# -- the prompts of phase 2 ---------------------------------------------------------------


def with_share(prompts: lc.Prompts, share: float, rng: np.random.Generator) -> lc.Prompts:
    """The prompts with a share of the training rows of each task and input, at least one.

    Smaller shares are subsets of larger ones drawn with the same ``rng``.
    """
    rows = prompts.rows[["split", "task", "input"]].assign(order=rng.permutation(len(prompts)))
    places = rows.groupby(["split", "task", "input"])["order"]
    kept = places.rank() <= np.maximum(1, (share * places.transform("size")).round())
    return prompts.take(np.flatnonzero((kept | (rows["split"] != "train")).to_numpy()))


def reported(prompts: lc.Prompts) -> lc.Prompts:
    """Prompts for reported accuracy: all unseen strings, and some of each other split."""
    rows = prompts.rows
    nth = rows.groupby(["split", "task", "input"]).cumcount()
    kept = (rows["split"] == UNSEEN) | (nth < _REPORTED)
    return prompts.take(np.flatnonzero(kept.to_numpy()))


# -- names --------------------------------------------------------------------------------


def shuffled_names(rows: pd.DataFrame, rng: np.random.Generator) -> Int[np.ndarray, " prompt"]:
    """Task numbers shuffled within each split."""
    names = rows["task"].to_numpy(dtype=np.int64).copy()
    for _, index in rows.groupby("split", sort=False).indices.items():
        names[index] = rng.permutation(names[index])
    return names


def regrouped_names(rows: pd.DataFrame, rng: np.random.Generator) -> Int[np.ndarray, " prompt"]:
    """Names with whole expressions permuted over tasks: one wrong name per expression.

    Trained expressions are permuted among themselves, so that each name keeps their number.
    """
    owners = rows.drop_duplicates("template")[["template", "task", "split"]]
    trained = (owners["split"] == "train").to_numpy()
    permuted = owners["task"].to_numpy(dtype=np.int64).copy()
    for group in (trained, ~trained):
        permuted[group] = rng.permutation(permuted[group])
    names = dict(zip(owners["template"], permuted, strict=True))
    return rows["template"].map(names).to_numpy(dtype=np.int64)


def own_names(
    model: TransformerBridge, prompts: lc.Prompts, *, k: int, layer: int, seed: int
) -> Int[np.ndarray, " prompt"]:
    """Cluster of each instruction's state in the model, as numbers below ``k``.

    The state at the answering token encodes task and input: each input's mean is subtracted, and
    the residual is averaged over the prompts of one instruction. k-means is fitted on the
    training instructions, without tasks, answers or expressions.
    """
    import pandas as pd
    from sklearn.cluster import KMeans

    acts = lc.extract(model, prompts, f"resid {layer}", progress=False)
    states = pd.DataFrame(acts["resid"].values.reshape(len(prompts), -1).astype(np.float64))
    instructions, inputs = (prompts.rows[name].to_numpy() for name in ("instruction", "input"))
    is_train = (prompts.rows["split"] == "train").to_numpy()
    means = states[is_train].groupby(inputs[is_train]).mean()
    centred = states - means.loc[inputs].to_numpy()
    # States of training instructions come from their training prompts alone.
    known = centred[is_train].groupby(instructions[is_train]).mean()
    others = centred[~is_train].groupby(instructions[~is_train]).mean()
    restarts: Any = 4  # scikit-learn's annotation allows only its default
    found = KMeans(k, n_init=restarts, random_state=seed).fit(known.to_numpy())
    names = dict(zip(others.index, found.predict(others.to_numpy()), strict=True))
    names |= dict(zip(known.index, found.predict(known.to_numpy()), strict=True))
    return np.array([names[instruction] for instruction in instructions], dtype=np.int64)
