"""Options of the study `head_patterns`, and the names in its tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from studies.study import Study

if TYPE_CHECKING:
    pass


BASIC, COMPLEX, CONTROL = "basic", "complex", "control"


@dataclass(frozen=True)
class Options(Study):
    """Tune a model on basic tasks, on tasks composed of them and on controls; compare its heads.

    A model is trained on moves and maps of short sequences, then tuned on other ones, on their
    composites and on controls. The attention of a pretrained model is tuned on word tasks,
    arithmetic and compositions of the two.

    Attributes:
        pretrained: model of the second part, anything `lensclust.load` takes; "none" to skip it.
        pretrained_runs: tunings of each of its tasks: its first seeds.
        pretrained_steps: tuning steps.
        pretrained_batch: prompts a step.
        pretrained_lr: learning rate of the attention weights.
        rank: of LoRA adapters that are tuned instead, with the extra ``peft`` and about ten
            times the learning rate; 0 for none.
        measured: test prompts of each run for its patterns.
        texts: labelled texts of a control task, a name as `lensclust.tasks.classification` takes;
            "none" to skip it.
        model: native preset to train.
        n_layers: its blocks.
        n_heads: heads of a block.
        width: symbols of an input.
        n_symbols: different symbols.
        known_moves: moves that the model is trained on before tuning.
        known_maps: maps that it is trained on before tuning, and composites of moves and maps.
        complex_tasks: composites to tune on, each of a new move and a new map.
        controls: new moves and maps that are parts of no composite.
        steps: steps of the training before.
        batch_size: prompts a step, of all trainings.
        lr: peak learning rate of the training before.
        runs: tunings of each task.
        tuning_steps: steps of each.
        tuning_lr: learning rate of each.
        n_checkpoints: of each tuning, log-spaced, the model before it included.
        scarce: prompts of the complex task in the applications.
        mixed: prompts of basic tasks before them.
        permutations: draws of each null.
    """

    title: ClassVar[str] = "patterns of head activation, and their change in fine-tuning"
    paper: ClassVar[str] = "Zhao et al. 2409.15820 (reconstruction and extension)"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {
            "pretrained": "none",
            "steps": 200,
            "complex_tasks": 1,
            "tuning_steps": 24,
            "n_checkpoints": 4,
            "mixed": 320,
            "permutations": 19,
        },
        "default": {},
        "paper": {
            "pretrained_steps": 200,
            "pretrained_runs": 5,
            "measured": 64,
            "steps": 8000,
            "runs": 3,
            "complex_tasks": 3,
            "tuning_steps": 400,
            "permutations": 999,
        },
    }
    cost: ClassVar[Mapping[str, str]] = {
        "smoke": "a minute",
        "default": "twenty minutes on two cores, after downloads of 93 and 18 MB",
        "paper": "hours on a GPU; --pretrained names a model of the source's size",
    }
    default_seeds: ClassVar[int] = 5

    pretrained: str = "smollm2-135m-instruct"
    pretrained_runs: int = 2
    pretrained_steps: int = 12
    pretrained_batch: int = 8
    pretrained_lr: float = 1e-4
    rank: int = 0
    measured: int = 16
    texts: str = "sst2"
    model: str = "sif-small"
    n_layers: int = 4
    n_heads: int = 8
    width: int = 3
    n_symbols: int = 8
    known_moves: int = 2
    known_maps: int = 3
    complex_tasks: int = 2
    controls: int = 1
    steps: int = 600
    batch_size: int = 64
    lr: float = 4e-3
    runs: int = 2
    tuning_steps: int = 100
    tuning_lr: float = 3e-3
    n_checkpoints: int = 6
    scarce: int = 32
    mixed: int = 1920
    permutations: int = 199
