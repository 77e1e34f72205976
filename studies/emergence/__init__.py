"""When and at which layers do task clusters emerge while a model learns instructions?"""

from __future__ import annotations

from functools import partial

import lensclust as lc
from studies.emergence.options import Options
from studies.emergence.synthetic import measure
from studies.study import Context, Findings, check_clusters
from studies.synthetic_task import LAYER_0, clustered_prompts, task_set

SAME_OUTPUT = (
    "Tasks that share an input answer it differently here, so within an input a cluster of one "
    "task is also a cluster of one answer; --n-outputs 4 makes tasks share answers."
)


class Emergence(Options):
    def check(self) -> None:
        """Raise InputError for options that leave a claim without a measurement."""
        least = {"n_tasks": 2, "held_out_regexes": 1, "rows_per_mapping": 2, "n_checkpoints": 2}
        for name, number in (least | {"permutations": 1}).items():
            if getattr(self, name) < number:
                raise lc.InputError(f"{name}={getattr(self, name)}: expected at least {number}")
        if self.k is not None:
            rows = clustered_prompts(task_set(self, 0), self.rows_per_mapping).rows
            check_clusters(self.k, rows, ["split", "input"])

    def run(self, context: Context) -> Findings:
        """Train and measure each seed, then decide the claims over seeds."""
        found = context.sweep(partial(measure, self), context.seeds, "seed")
        from studies.emergence.claims import SHOWS, claims, pictures, views

        scores, states = found["scores"], found["states"]
        return Findings(
            scores=scores,
            claims=claims(scores),
            figures=pictures(scores, states),
            shows=SHOWS,
            views=views(scores, found["map"], found["heads"]),
            notes=[
                "The paper's sizes and hyper-parameters are not known to us: tasks, model and "
                "training are a reconstruction, so directions are tested, not values.",
                LAYER_0,
                *([] if self.n_outputs else [SAME_OUTPUT]),
            ],
            provenance={"weights": dict(found["weights"].itertuples(index=False))},
        )
