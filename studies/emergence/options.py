"""Options of the study `emergence`, and the names in its tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from studies.study import Study

# Heads are chosen on one split and reported on another: the maximum of many is biased upwards.
CHOOSING = "train"


@dataclass(frozen=True)
class Options(Study):
    """Train on simplified instruction following and cluster the states at every checkpoint.

    Every seed has separate tasks, weights and batches.

    Attributes:
        model: native preset to train.
        n_tasks: tasks to learn.
        n_inputs: inputs shared by the tasks.
        mappings_per_task: inputs each task answers.
        n_outputs: output tokens, by default as many as inputs: then tasks that share an input
            answer it differently. With fewer, states are scored against the output too.
        regexes_per_task: regular expressions each task's instructions come from.
        held_out_regexes: expressions of each task that are never trained on: the control.
        rows_per_mapping: prompts of each task and input in each split.
        steps: training steps.
        batch_size: prompts a step.
        lr: peak learning rate.
        n_checkpoints: log-spaced checkpoints, the untrained model included.
        k: clusters; default as many as tasks are present.
        permutations: permuted labellings per score.
    """

    title: ClassVar[str] = "task clusters over training, by layer and head"
    paper: ClassVar[str] = "Wu & Varshney 2402.12151 (reconstruction)"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {
            "n_tasks": 4,
            "n_inputs": 5,
            "mappings_per_task": 4,
            "regexes_per_task": 2,
            "held_out_regexes": 2,
            "steps": 150,
            "n_checkpoints": 3,
            "permutations": 20,
        },
        "default": {},
        "paper": {"n_tasks": 20, "n_inputs": 20, "mappings_per_task": 10, "steps": 4000},
    }
    cost: ClassVar[Mapping[str, str]] = {
        "smoke": "half a minute",
        "default": "five minutes on two cores",
        "paper": "an hour on a GPU",
    }
    default_seeds: ClassVar[int] = 3

    model: str = "sif-small"
    n_tasks: int = 10
    n_inputs: int = 10
    mappings_per_task: int = 5
    n_outputs: int | None = None
    regexes_per_task: int = 3
    held_out_regexes: int = 10
    rows_per_mapping: int = 8
    steps: int = 800
    batch_size: int = 64
    lr: float = 4e-3
    n_checkpoints: int = 8
    k: int | None = None
    permutations: int = 100
