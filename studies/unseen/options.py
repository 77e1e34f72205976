"""Options of the study `unseen`, and the names in its tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from studies.study import Study

if TYPE_CHECKING:
    pass


ANSWER, INSTRUCTION = "answer", "instruction_end"
MEANS = "means of dealt labels"
SUBSPACE, REASSIGNED = "random subspace", "reassigned labels"


@dataclass(frozen=True)
class Options(Study):
    """Predict and change the answers to unseen instances by the clusters of their states.

    On the synthetic task, at every checkpoint: clustering, the nearest training centroid and
    accuracy on four splits. After training: states moved between clusters and clusters erased,
    layer by layer, at the answering token and at the end of the instruction. Then the moves in
    a pretrained model with few-shot prompts of word tasks.

    Attributes:
        model: native preset to train.
        n_tasks: tasks to learn.
        n_inputs: inputs shared by the tasks.
        mappings_per_task: inputs each task answers.
        regexes_per_task: regular expressions each task's instructions come from.
        held_out_regexes: expressions of each task that are never trained on: the control.
        rows_per_mapping: prompts of each task and input in each split.
        steps: training steps.
        batch_size: prompts a step.
        lr: peak learning rate.
        n_checkpoints: log-spaced checkpoints, the untrained model included; at least 4, for a
            rank correlation over them.
        permutations: permuted labellings per clustering score.
        rounds: other tasks that each prompt is moved to.
        pretrained: model of the few-shot part, anything `lensclust.load` takes; "none" to skip it.
        tasks: word tasks of the natural set.
        shots: demonstrations in a prompt.
        draws: sets of demonstrations per query, at least two to form a cluster.
        layer_stride: stride of the layers of the pretrained model at which states are moved.
    """

    title: ClassVar[str] = "task clusters and unseen instances: prediction and cause"
    paper: ClassVar[str] = "Wu & Varshney 2402.12151 (reconstruction and extension)"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {
            "n_tasks": 4,
            "n_inputs": 5,
            "mappings_per_task": 4,
            "regexes_per_task": 2,
            "held_out_regexes": 2,
            "steps": 150,
            "n_checkpoints": 4,
            "permutations": 10,
            "pretrained": "none",
        },
        "default": {},
        "paper": {
            "n_tasks": 20,
            "n_inputs": 20,
            "mappings_per_task": 10,
            "steps": 4000,
            "rounds": 4,
            "draws": 6,
            "layer_stride": 1,
        },
    }
    cost: ClassVar[Mapping[str, str]] = {
        "smoke": "half a minute",
        "default": "six minutes on two cores, after a download of 93 MB",
        "paper": "an hour on a GPU",
    }
    default_seeds: ClassVar[int] = 5

    model: str = "sif-small"
    n_tasks: int = 10
    n_inputs: int = 10
    mappings_per_task: int = 5
    regexes_per_task: int = 3
    held_out_regexes: int = 10
    rows_per_mapping: int = 8
    steps: int = 800
    batch_size: int = 64
    lr: float = 4e-3
    n_checkpoints: int = 8
    permutations: int = 20
    rounds: int = 1
    pretrained: str = "smollm2-135m-instruct"
    tasks: tuple[str, ...] = ("plural", "past", "upper_case", "first_letter")
    shots: int = 6
    draws: int = 2
    layer_stride: int = 2

    def sizes(self) -> dict[str, Any]:
        """Sizes of the synthetic task."""
        names = ("n_tasks", "n_inputs", "mappings_per_task", "regexes_per_task")
        names += ("held_out_regexes", "rows_per_mapping")
        return {name: getattr(self, name) for name in names}
