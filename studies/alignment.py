"""Alignment by clusters: make a model answer one task as another, from few labelled examples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import lensclust as lc
from studies.study import Context, Findings, Study

if TYPE_CHECKING:
    import pandas as pd

NOTES = (
    "The paper names alignment as an application of clusters; how it aligned is not known to us. "
    "Methods, sizes and measures are our reconstruction and extensions.",
    "A labelled example is a prompt of the task to change with the answer wanted, and a prompt of "
    "the wanted task with the same input. Layers, strengths and learning rates are chosen on "
    "validation prompts, which are not counted as examples; layers and strengths of a method for "
    "all pairs of tasks of a model together.",
    "'members' asks the means of all tasks whether a state is of the task to change, 'near' the "
    "labelled examples alone; without a gate every prompt is moved. 'task states' counts the "
    "states with a known task, and no wanted answer, that a method uses beside the examples.",
    "An answer counts by its first token. "
    "Seconds are those of fitting; choosing the layer or the learning rate is not counted.",
)
ONE_SEED = "One seed is one model of the synthetic task: its pairs leave no interval."
NO_MODEL = "No pretrained model was run (--pretrained names one)."


@dataclass(frozen=True)
class Alignment(Study):
    """Have task A answered as task B: interventions against fine-tuning, success against damage.

    Attributes:
        model: native preset to train on the synthetic task.
        n_tasks: tasks to learn.
        n_inputs: inputs shared by the tasks.
        mappings_per_task: inputs each task answers.
        regexes_per_task: regular expressions each task's instructions come from.
        rows_per_mapping: prompts of each task and input that are asked; half of the strings are
            for validation.
        steps: training steps.
        batch_size: prompts a step of the training.
        lr: peak learning rate of the training.
        pairs: ordered pairs of tasks in each seed.
        examples: numbers of labelled examples.
        strengths: of the interventions; 1 moves as far as fitted.
        finetuning_steps: steps of each fine-tuning.
        batch_examples: examples a step of a fine-tuning.
        rates: learning rates that each way of fine-tuning may choose from.
        pull_weight: of the cluster term beside the cross-entropy.
        pull_depth: where the cluster term reads the states, as a share of the layers.
        head_share: share of the heads that are trained where only heads are.
        pretrained: model for the second part, anything `lensclust.load` takes; "none" for no
            such part.
        tasks: word tasks of the natural set, in few-shot prompts under an instruction.
        shots: demonstrations in a prompt.
        pretrained_examples: numbers of labelled examples there; the last is fine-tuned on.
        depths: layers at which the pretrained model is steered, as shares of its layers.
        trained_blocks: how many of the last blocks are fine-tuned.
        pretrained_steps: steps of each fine-tuning.
        pretrained_rates: learning rates to choose from.
    """

    title: ClassVar[str] = "one task answered as another: clusters moved, or weights trained"
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

    def check(self) -> None:
        """Refuse what would leave a claim without a measurement."""
        from lensclust.tasks.natural import task_names

        least = {"n_tasks": 3, "rows_per_mapping": 2, "pairs": 1, "finetuning_steps": 1}
        least |= {"steps": 1, "batch_examples": 1, "shots": 1, "trained_blocks": 2}
        for name, number in (least | {"pretrained_steps": 1}).items():
            if getattr(self, name) < number:
                raise lc.InputError(f"{name}={getattr(self, name)}: expected at least {number}")
        for name in ("examples", "pretrained_examples"):
            given = getattr(self, name)
            if not given or min(given) < 1 or list(given) != sorted(set(given)):
                raise lc.InputError(f"{name}={given}: expected rising numbers from 1")
        for name in ("strengths", "rates", "pretrained_rates"):
            given = getattr(self, name)
            if not given or not all(math.isfinite(value) and value > 0 for value in given):
                raise lc.InputError(f"{name}={given}: expected positive numbers")
        if not (math.isfinite(self.pull_weight) and self.pull_weight > 0):
            raise lc.InputError(f"pull_weight={self.pull_weight}: expected a positive number")
        shares = {"pull_depth": (self.pull_depth,), "depths": self.depths}
        for name, given in (shares | {"head_share": (self.head_share,)}).items():
            if not given or not all(0 < share <= 1 for share in given):
                raise lc.InputError(f"{name}={given}: expected shares above 0 and up to 1")
        if self.pairs > self.n_tasks * (self.n_tasks - 1):
            raise lc.InputError(f"pairs={self.pairs}: {self.n_tasks} tasks have not as many")
        unknown = sorted(set(self.tasks) - set(task_names()))
        if unknown:
            raise lc.InputError(f"tasks: no {unknown[0]!r}: there are {', '.join(task_names())}")
        if len(set(self.tasks)) < max(3, len(self.tasks)):
            raise lc.InputError(f"tasks={self.tasks}: expected three or more, all different")
        from lensclust.native import native_config

        native_config(self.model)
        lc.tasks.sif(**self.sizes(), seed=0)

    def sizes(self) -> dict[str, Any]:
        """The knobs of the synthetic task."""
        names = ("n_tasks", "n_inputs", "mappings_per_task", "regexes_per_task")
        return {name: getattr(self, name) for name in (*names, "rows_per_mapping")}

    def run(self, context: Context) -> Findings:
        """Measure each seed and the pretrained model, then decide the claims."""
        items: list[int | str] = list(context.seeds)
        if self.pretrained != "none":
            # The longest item first, so that no core is left waiting for it.
            items.insert(0, "pretrained")
        found = context.sweep(partial(measure, self), items, "part")
        import pandas as pd

        from studies.alignment_figures import SHOWS, pictures
        from studies.alignment_findings import claims, said, table

        scores = found["scores"]
        return Findings(
            scores=pd.concat([scores, table(scores)], ignore_index=True),
            claims=claims(scores),
            figures=pictures(scores),
            shows=SHOWS,
            notes=[
                *NOTES,
                *([ONE_SEED] if len(context.seeds) == 1 else []),
                *([NO_MODEL] if self.pretrained == "none" else said(scores)),
            ],
            provenance={"weights": dict(found["weights"].itertuples(index=False))},
        )


def measure(study: Alignment, item: int | str, folder: Path) -> dict[str, pd.DataFrame]:
    """One seed of the synthetic task, or the pretrained model: the work of one process."""
    if item == "pretrained":
        from studies.alignment_pretrained import measure_pretrained

        return measure_pretrained(study)
    from studies.alignment_synthetic import measure_seed

    return measure_seed(study, int(item), folder)
