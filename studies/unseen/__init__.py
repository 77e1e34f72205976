"""Do task clusters predict and cause the answers to unseen instances?"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import lensclust as lc
from studies.study import Context, Findings

if TYPE_CHECKING:
    import pandas as pd

from studies.unseen.options import Options

NOTES = (
    "The paper's sizes, splits and causal checks are not known to us: claims marked "
    "reconstruction are our operationalisation of its statements, extensions are ours.",
    "Layers are chosen on one half of the prompts and reported on the other; intervals of the "
    "synthetic task are over seeds, those of the pretrained model over ordered pairs of tasks.",
    "An erasure's random subspace removes as much variance from the states that both are fitted "
    "on; its reassigned labels are tasks permuted over whole expressions. For the erasure and its "
    "control, accuracy below the best answer from the input alone counts as that.",
)
ONE_SEED = "One seed leaves no interval: claims over seeds stay inconclusive."
NO_MODEL = "No pretrained model was run (--pretrained names one)."


class Unseen(Options):
    def check(self) -> None:
        """Raise InputError for options that leave a claim without a measurement."""
        from lensclust.tasks.words import task_names

        least = {"n_tasks": 3, "held_out_regexes": 1, "rows_per_mapping": 2, "permutations": 1}
        least |= {"n_checkpoints": 4, "rounds": 1, "shots": 1, "draws": 2, "layer_stride": 1}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise lc.InputError(f"{name}={getattr(self, name)}: expected at least {number}")
        unknown = sorted(set(self.tasks) - set(task_names()))
        if unknown:
            raise lc.InputError(f"tasks: no {unknown[0]!r}: there are {', '.join(task_names())}")
        if len(set(self.tasks)) < max(2, len(self.tasks)):
            raise lc.InputError(f"tasks={self.tasks}: expected two or more, all different")
        lc.tasks.sif(**self.sizes(), seed=0)

    def run(self, context: Context) -> Findings:
        """Train and measure each seed, run the pretrained model, then decide the claims."""
        items: list[int | str] = list(context.seeds)
        if self.pretrained != "none":
            # The longest item first, so that no core waits for it.
            items.insert(0, "pretrained")
        found = context.sweep(partial(measure, self), items, "part")
        from studies.unseen.claims import claims
        from studies.unseen.figures import SHOWS, pictures, views

        scores = found["scores"]
        return Findings(
            scores=scores,
            claims=claims(scores),
            figures=pictures(scores),
            shows=SHOWS,
            views=views(scores, found["map"]),
            notes=[
                *NOTES,
                *([ONE_SEED] if len(context.seeds) == 1 else []),
                *([NO_MODEL] if self.pretrained == "none" else []),
            ],
            provenance={"weights": dict(found["weights"].itertuples(index=False))},
        )


def measure(study: Options, item: int | str, folder: Path) -> dict[str, pd.DataFrame]:
    """Measure one seed of the synthetic task, or the pretrained model, in one process."""
    if item == "pretrained":
        from studies.unseen.pretrained import measure_pretrained

        return measure_pretrained(study)
    from studies.unseen.synthetic import measure_seed

    return measure_seed(study, int(item), folder)
