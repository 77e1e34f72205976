"""Options of the study `identity_pretraining`, and the names in its tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import lensclust as lc
from studies.study import Study

ARMS = ("identity", "instruction", "auxiliary", "own clusters", "regrouped", "shuffled", "scratch")
# Those of the sweep of examples.
COMPARED = ("identity", "shuffled", "scratch")


@dataclass(frozen=True)
class Options(Study):
    """Train models that learn to name the task first, and models from scratch, on the same tasks.

    The learning rate is constant after its warm-up, so that a run evaluated at a step equals one
    that ends there: one run from scratch is the control at equal total steps and, at an earlier
    step, at equal steps of the task.

    Attributes:
        n_layers: blocks of the model, which is otherwise the preset "sif-small".
        n_tasks: tasks to learn.
        n_inputs: inputs shared by the tasks.
        mappings_per_task: inputs each task answers.
        regexes_per_task: regular expressions each task's instructions come from.
        held_out_regexes: expressions of each task that are never trained on: the control.
        strings_per_regex: training instructions of an expression.
        rows_per_mapping: prompts of each task and input in each evaluation split.
        naming_steps: steps of phase 1, in which the model names the task.
        task_steps: steps of phase 2, in which it does the task.
        batch_size: prompts a step.
        lr: learning rate.
        warmup: steps at the start of each phase in which it rises.
        evaluate_every: steps between two accuracies; "steps to reach" are as exact as this.
        layer: layer whose state the auxiliary head names the task from.
        weight: of the auxiliary head's loss, added to that of the language model.
        shares: of the examples of phase 2, beside all of them; at least one example of each task
            and input is left. Phase 1 names all instructions in any case.
        search_layers: depths of the models in the search for conditions.
        search_tasks: numbers of tasks in it.
        search_shares: shares of the examples in it.
        search_seeds: number of seeds that repeat the search, from the first.
        n_checkpoints: checkpoints of each phase that are clustered.
        permutations: permuted labellings per clustering score.
    """

    title: ClassVar[str] = "learning the names of tasks before the tasks"
    paper: ClassVar[str] = "Wu & Varshney 2402.12151 (reconstruction)"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {
            "n_layers": 2,
            "n_tasks": 4,
            "n_inputs": 5,
            "mappings_per_task": 4,
            "regexes_per_task": 2,
            "strings_per_regex": 12,
            "naming_steps": 30,
            "task_steps": 60,
            "evaluate_every": 15,
            "layer": 1,
            "shares": (0.1,),
            "search_layers": (1,),
            "search_tasks": (3, 4),
            "search_shares": (0.1, 1.0),
            "n_checkpoints": 2,
            "permutations": 5,
        },
        "default": {},
        "paper": {
            "n_layers": 6,
            "n_tasks": 20,
            "naming_steps": 600,
            "task_steps": 3000,
            "evaluate_every": 100,
            "layer": 5,
            "search_layers": (3, 6, 12),
            "search_tasks": (10, 20, 40),
            "search_seeds": 5,
        },
    }
    cost: ClassVar[Mapping[str, str]] = {
        "smoke": "half a minute",
        "default": "a quarter of an hour on two cores",
        "paper": "hours on a GPU",
    }
    default_seeds: ClassVar[int] = 5

    n_layers: int = 3
    n_tasks: int = 10
    n_inputs: int = 10
    mappings_per_task: int = 5
    regexes_per_task: int = 4
    held_out_regexes: int = 1
    strings_per_regex: int = 24
    rows_per_mapping: int = 8
    naming_steps: int = 120
    task_steps: int = 380
    batch_size: int = 64
    lr: float = 2e-3
    warmup: int = 25
    evaluate_every: int = 20
    layer: int = 2
    weight: float = 1.0
    shares: tuple[float, ...] = (0.01, 0.05, 0.25)
    search_layers: tuple[int, ...] = (2, 5)
    search_tasks: tuple[int, ...] = (6, 20)
    search_shares: tuple[float, ...] = (0.05, 1.0)
    search_seeds: int = 1
    n_checkpoints: int = 4
    permutations: int = 10


@dataclass(frozen=True)
class Part:
    """Trainings of one seed that share their tasks, run in one process."""

    purpose: str
    seed: int
    n_layers: int
    n_tasks: int
    shares: tuple[float, ...]
    arms: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.purpose}-{self.n_layers}-layers-{self.n_tasks}-tasks-{self.seed}"


def task_set(study: Options, seed: int) -> lc.Prompts:
    """The tasks of one seed."""
    return lc.tasks.sif(
        n_tasks=study.n_tasks,
        n_inputs=study.n_inputs,
        mappings_per_task=study.mappings_per_task,
        regexes_per_task=study.regexes_per_task,
        held_out_regexes=study.held_out_regexes,
        strings_per_regex=study.strings_per_regex,
        rows_per_mapping=study.rows_per_mapping,
        seed=seed,
    )
