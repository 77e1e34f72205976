"""Options of the study `layer_by_layer`, and the names in its tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from studies.study import Study

if TYPE_CHECKING:
    pass


# Models compared with the first specialist of a task, on that task's prompts.
MULTI = "model of all tasks"
CEILING = "second specialist"
OTHER = "specialist of another task"
UNTRAINED = "untrained model"
PAIRS = (MULTI, CEILING, OTHER, UNTRAINED)


@dataclass(frozen=True)
class Options(Study):
    """Train one model on all tasks and two on each of some, and compare them layer by layer.

    Every seed draws separate tasks; no two models share initial weights or batches, so that what
    they share comes from the tasks.

    Attributes:
        model: native preset to train.
        n_layers: its blocks.
        n_tasks: tasks of the model of all tasks.
        specialists: number of tasks with two specialist models each.
        n_inputs: inputs shared by the tasks.
        mappings_per_task: inputs each task answers.
        regexes_per_task: regular expressions each task's instructions come from.
        rows_per_mapping: unseen strings of each task and input to compare models on.
        steps: training steps of the model of all tasks.
        specialist_steps: training steps of a specialist.
        batch_size: prompts a step.
        lr: peak learning rate.
    """

    title: ClassVar[str] = "a model of many tasks against models of one task, layer by layer"
    paper: ClassVar[str] = "Zhao, Ziser & Cohen 2410.20008 (MOSSA, reconstruction)"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {
            "n_layers": 6,
            "n_tasks": 3,
            "specialists": 2,
            "n_inputs": 5,
            "mappings_per_task": 4,
            "regexes_per_task": 2,
            "rows_per_mapping": 8,
            "steps": 100,
            "specialist_steps": 40,
        },
        "default": {},
        "paper": {"n_layers": 32, "n_tasks": 12, "specialists": 12, "steps": 4000},
    }
    cost: ClassVar[Mapping[str, str]] = {
        "smoke": "half a minute",
        "default": "ten minutes on two cores",
        "paper": "hours on a GPU (not measured)",
    }
    default_seeds: ClassVar[int] = 5

    model: str = "sif-small"
    n_layers: int = 12
    n_tasks: int = 6
    specialists: int = 3
    n_inputs: int = 10
    mappings_per_task: int = 5
    regexes_per_task: int = 3
    rows_per_mapping: int = 16
    steps: int = 800
    specialist_steps: int = 200
    batch_size: int = 64
    lr: float = 4e-3
