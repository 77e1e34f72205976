"""Does learning to name tasks first help to learn the tasks?

The default sizes were chosen on seeds 100 and 101, which no run with fewer seeds reports: a model
trained from scratch learns these tasks slowly and never perfectly, in a quarter of an hour.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import lensclust as lc
from studies.identity_pretraining.options import ARMS, COMPARED, Options, Part, task_set
from studies.study import Context, Findings

# Those of the search of conditions.
SEARCHED = ("identity", "scratch")


class IdentityPretraining(Options):
    def check(self) -> None:
        """Raise InputError for options that cannot be trained or leave a claim unmeasured."""
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
        """Train every arm of every seed, the sweep and the search, then decide the claims."""
        import pandas as pd

        from studies.identity_pretraining.arms import measure
        from studies.identity_pretraining.claims import claims, notes, summary
        from studies.identity_pretraining.figures import SHOWS, pictures

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


def parts(study: Options, seeds: tuple[int, ...]) -> list[Part]:
    """All trainings, the longest first."""
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
