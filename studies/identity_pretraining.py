"""Does it help to learn the names of tasks before the tasks?

The sizes of the default follow trials on seeds 100 and 101, which no run with fewer seeds reports:
tasks that a model trained from scratch learns slowly and never perfectly, in a quarter of an hour.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import lensclust as lc
from studies.study import Context, Findings, Study

ARMS = ("identity", "instruction", "auxiliary", "own clusters", "regrouped", "shuffled", "scratch")
# Those of the sweep of examples, and those of the search of conditions.
COMPARED, SEARCHED = ("identity", "shuffled", "scratch"), ("identity", "scratch")


@dataclass(frozen=True)
class IdentityPretraining(Study):
    """Train models that first learn to name the task, and models that do not, on the same tasks.

    The learning rate is constant after its warm-up, so that a run read at a step is the run that
    was ended there: one run from scratch is the control at equal total steps and, read earlier,
    at equal steps of the task.

    Attributes:
        n_layers: blocks of the model, which is otherwise the preset "sif-small".
        n_tasks: tasks to learn.
        n_inputs: inputs shared by the tasks.
        mappings_per_task: inputs each task answers.
        regexes_per_task: regular expressions each task's instructions come from.
        held_out_regexes: further expressions of each task, never trained on: the control.
        strings_per_regex: training instructions of an expression.
        rows_per_mapping: prompts of each task and input in each split that is not trained on.
        naming_steps: steps of phase 1, in which the task is named.
        task_steps: steps of phase 2, in which it is done.
        batch_size: prompts a step.
        lr: learning rate.
        warmup: steps at the start of each phase in which it rises.
        evaluate_every: steps between two accuracies; "steps to reach" are as exact as this.
        layer: blocks behind the state that the auxiliary head names the task from.
        weight: of the auxiliary head's loss beside that of the language model.
        shares: of the examples of phase 2, beside all of them; at least one example of each task
            and input is left. Phase 1 names all instructions in any case.
        search_layers: depths of the models in the search for conditions.
        search_tasks: numbers of tasks in it.
        search_shares: shares of the examples in it.
        search_seeds: the first so many of the seeds repeat it.
        n_checkpoints: checkpoints of each phase that are clustered.
        permutations: permuted labellings behind each clustering.
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

    def check(self) -> None:
        """Refuse what cannot be trained, or would leave a claim without a measurement."""
        least = {"n_layers": 1, "n_tasks": 2, "regexes_per_task": 2, "held_out_regexes": 1}
        least |= {"rows_per_mapping": 2, "naming_steps": 1, "task_steps": 2, "batch_size": 1}
        least |= {"warmup": 1, "evaluate_every": 1, "search_seeds": 1}
        for name, number in (least | {"n_checkpoints": 2, "permutations": 1}).items():
            if getattr(self, name) < number:
                raise lc.InputError(f"{name}={getattr(self, name)}: expected at least {number}")
        if not self.evaluate_every <= self.task_steps // 2:
            raise lc.InputError(
                f"evaluate_every={self.evaluate_every}: expected at most half of "
                f"task_steps={self.task_steps}, or no curve is left to read"
            )
        if not self.lr > 0:
            raise lc.InputError(f"lr={self.lr}: expected a positive number")
        if not self.weight >= 0:
            raise lc.InputError(f"weight={self.weight}: expected a number from 0")
        if not 1 <= self.layer <= self.n_layers:
            raise lc.InputError(f"layer={self.layer}: expected 1..n_layers={self.n_layers}")
        if not self.shares or max(self.shares) >= 1 or min(self.shares) <= 0:
            raise lc.InputError(f"shares={self.shares}: expected shares above 0 and below 1")
        if not self.search_shares or max(self.search_shares) > 1 or min(self.search_shares) <= 0:
            raise lc.InputError(
                f"search_shares={self.search_shares}: expected shares above 0 and up to 1"
            )
        for name, number in {"search_layers": 1, "search_tasks": 2}.items():
            if not getattr(self, name) or min(getattr(self, name)) < number:
                raise lc.InputError(f"{name}={getattr(self, name)}: expected numbers from {number}")
        for name in ("shares", "search_layers", "search_tasks", "search_shares"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise lc.InputError(f"{name}={values}: expected each value once")
        for n_tasks in {self.n_tasks, *self.search_tasks}:
            task_set(replace(self, n_tasks=n_tasks), 0)

    def run(self, context: Context) -> Findings:
        """Train every arm of every seed, sweep and search, then decide the claims over seeds."""
        import pandas as pd

        from studies.identity_pretraining_arms import measure
        from studies.identity_pretraining_figures import SHOWS, pictures
        from studies.identity_pretraining_findings import claims, notes
        from studies.identity_pretraining_tables import summary

        found = context.sweep(partial(measure, self), parts(self, context.seeds), "part")
        scores = found["scores"]
        table = summary(scores)
        decided = claims(scores, table, interval=self.evaluate_every)
        return Findings(
            scores=pd.concat([scores, table], ignore_index=True),
            claims=decided,
            figures=pictures(scores, table),
            shows=SHOWS,
            notes=notes(decided, table),
            provenance={"weights": dict(found["weights"].itertuples(index=False))},
        )


@dataclass(frozen=True)
class Part:
    """Trainings of one seed that share their tasks: the work of one process."""

    purpose: str
    seed: int
    n_layers: int
    n_tasks: int
    shares: tuple[float, ...]
    arms: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.purpose}-{self.n_layers}-layers-{self.n_tasks}-tasks-{self.seed}"


def parts(study: IdentityPretraining, seeds: tuple[int, ...]) -> list[Part]:
    """All that is to be trained, the longest first."""
    here = (study.n_layers, study.n_tasks)
    return [
        *(Part("arms", seed, *here, (1.0,), ARMS) for seed in seeds),
        *(Part("examples", seed, *here, study.shares, COMPARED) for seed in seeds),
        *(
            Part("search", seed, n_layers, n_tasks, study.search_shares, SEARCHED)
            for n_layers in sorted(study.search_layers, reverse=True)
            for n_tasks in sorted(study.search_tasks, reverse=True)
            for seed in seeds[: study.search_seeds]
        ),
    ]


def task_set(study: IdentityPretraining, seed: int) -> lc.Prompts:
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
