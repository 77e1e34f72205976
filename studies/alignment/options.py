"""Options of the study `alignment`, and the names in its tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from studies.study import Study

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Options(Study):
    """Make a model answer task A as task B: interventions against fine-tuning.

    Attributes:
        model: native preset to train on the synthetic task.
        n_tasks: tasks to learn.
        n_inputs: inputs shared by the tasks.
        mappings_per_task: inputs each task answers.
        regexes_per_task: regular expressions each task's instructions come from.
        rows_per_mapping: evaluated prompts of each task and input; half of the strings are for
            validation.
        steps: training steps.
        batch_size: prompts a step of the training.
        lr: peak learning rate of the training.
        pairs: ordered pairs of tasks in each seed.
        examples: numbers of labelled examples.
        strengths: of the interventions; 1 is the fitted one.
        finetuning_steps: steps of each fine-tuning.
        batch_examples: examples a step of a fine-tuning.
        rates: candidate learning rates of each way of fine-tuning.
        pull_weight: of the cluster term beside the cross-entropy.
        pull_depth: where the cluster term reads the states, as a share of the layers.
        head_share: share of the heads that are trained where only heads are.
        pretrained: model of the second part, anything `lensclust.load` takes; "none" to skip it.
        tasks: word tasks of the natural set, in few-shot prompts under an instruction.
        shots: demonstrations in a prompt.
        pretrained_examples: numbers of labelled examples there; the last is fine-tuned on.
        depths: layers at which the pretrained model is steered, as shares of its layers.
        trained_blocks: how many of the last blocks are fine-tuned.
        pretrained_steps: steps of each fine-tuning.
        pretrained_rates: learning rates to choose from.
    """

    title: ClassVar[str] = "one task answered as another: move clusters, or train weights"
    paper: ClassVar[str] = "Wu & Varshney 2402.12151 (reconstruction and extension)"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {
            "n_tasks": 4,
            "n_inputs": 5,
            "mappings_per_task": 4,
            "regexes_per_task": 2,
            "rows_per_mapping": 4,
            "steps": 150,
            "pairs": 2,
            "examples": (1, 4),
            "strengths": (1.0,),
            "finetuning_steps": 5,
            "rates": (1e-3, 3e-3),
            "pretrained": "none",
        },
        "default": {},
        "paper": {
            "n_tasks": 20,
            "n_inputs": 20,
            "mappings_per_task": 16,
            "steps": 4000,
            "pairs": 6,
            "examples": (1, 2, 4, 8, 16, 32, 64),
            "pretrained_examples": (1, 4, 16),
            "trained_blocks": 10,
            "pretrained_steps": 30,
        },
    }
    cost: ClassVar[Mapping[str, str]] = {
        "smoke": "a minute",
        "default": "fourteen minutes on two cores, after a download of 93 MB",
        "paper": "two hours on a GPU",
    }
    default_seeds: ClassVar[int] = 5

    model: str = "sif-small"
    n_tasks: int = 10
    n_inputs: int = 10
    mappings_per_task: int = 8
    regexes_per_task: int = 3
    rows_per_mapping: int = 12
    steps: int = 1200
    batch_size: int = 64
    lr: float = 4e-3
    pairs: int = 2
    examples: tuple[int, ...] = (1, 4, 16, 64)
    strengths: tuple[float, ...] = (1.0, 1.5)
    finetuning_steps: int = 30
    batch_examples: int = 16
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    pull_weight: float = 1.0
    pull_depth: float = 0.67
    head_share: float = 0.25
    pretrained: str = "smollm2-135m-instruct"
    tasks: tuple[str, ...] = ("plural", "past", "upper_case", "first_letter")
    shots: int = 5
    pretrained_examples: tuple[int, ...] = (4, 16)
    depths: tuple[float, ...] = (0.67, 0.73, 0.8, 0.87)
    trained_blocks: int = 6
    pretrained_steps: int = 10
    pretrained_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)

    def sizes(self) -> dict[str, Any]:
        """Sizes of the synthetic task."""
        names = ("n_tasks", "n_inputs", "mappings_per_task", "regexes_per_task")
        return {name: getattr(self, name) for name in (*names, "rows_per_mapping")}
