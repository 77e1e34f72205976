"""Alignment by clusters: make a model answer one task as another, from few labelled examples."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import lensclust as lc
from studies.study import Context, Findings

if TYPE_CHECKING:
    import pandas as pd

from studies.alignment.options import Options

NOTES = (
    "The paper names alignment as an application of clusters; its method is not known to us. "
    "Methods, sizes and measures are our reconstruction and extensions.",
    "A labelled example is a prompt of the source task with the wanted answer, and a prompt of "
    "the target task with the same input. Layers, strengths and learning rates are chosen on "
    "validation prompts, which do not count as examples; a method's layer and strength are the "
    "same for all pairs of tasks of a model.",
    "The gate 'members' moves a state if the nearest of all tasks' means is the source's, 'near' "
    "uses the labelled examples alone; without a gate every prompt is moved. 'task states' is the "
    "number of states with a known task but no wanted answer that a method uses beside the "
    "examples.",
    "An answer counts by its first token. "
    "Seconds are those of fitting; choosing the layer or the learning rate is not counted.",
)
ONE_SEED = "One seed is one model of the synthetic task: its pairs leave no interval."
NO_MODEL = "No pretrained model was run (--pretrained names one)."


class Alignment(Options):
    def check(self) -> None:
        """Raise InputError for options that leave a claim without a measurement."""
        from lensclust.tasks.words import task_names

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
            raise lc.InputError(f"pairs={self.pairs}: {self.n_tasks} tasks have fewer pairs")
        unknown = sorted(set(self.tasks) - set(task_names()))
        if unknown:
            raise lc.InputError(f"tasks: no {unknown[0]!r}: there are {', '.join(task_names())}")
        if len(set(self.tasks)) < max(3, len(self.tasks)):
            raise lc.InputError(f"tasks={self.tasks}: expected three or more, all different")
        from lensclust.models import native_config

        native_config(self.model)
        lc.tasks.sif(**self.sizes(), seed=0)

    def run(self, context: Context) -> Findings:
        """Measure each seed and the pretrained model, then decide the claims."""
        items: list[int | str] = list(context.seeds)
        if self.pretrained != "none":
            # The longest item first, so that no core waits for it.
            items.insert(0, "pretrained")
        found = context.sweep(partial(measure, self), items, "part")
        import pandas as pd

        from studies.alignment.claims import claims, generated_texts, table
        from studies.alignment.figures import SHOWS, pictures

        scores = found["scores"]
        return Findings(
            scores=pd.concat([scores, table(scores)], ignore_index=True),
            claims=claims(scores),
            figures=pictures(scores),
            shows=SHOWS,
            notes=[
                *NOTES,
                *([ONE_SEED] if len(context.seeds) == 1 else []),
                *([NO_MODEL] if self.pretrained == "none" else generated_texts(scores)),
            ],
            provenance={"weights": dict(found["weights"].itertuples(index=False))},
        )


def measure(study: Options, item: int | str, folder: Path) -> dict[str, pd.DataFrame]:
    """Measure one seed of the synthetic task, or the pretrained model, in one process."""
    if item == "pretrained":
        from studies.alignment.pretrained import measure_pretrained

        return measure_pretrained(study)
    from studies.alignment.synthetic import measure_seed

    return measure_seed(study, int(item), folder)
