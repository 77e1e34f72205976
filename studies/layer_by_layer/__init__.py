"""Which layers of a model of many tasks share representations with a model of one task?"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import lensclust as lc
from studies.study import Context, Findings

if TYPE_CHECKING:
    pass

from studies.layer_by_layer.options import Options
from studies.layer_by_layer.synthetic import measure


class LayerByLayer(Options):
    def check(self) -> None:
        """Raise InputError for options that leave a claim without a measurement."""
        least = {"n_layers": 6, "n_tasks": 2, "specialists": 2, "mappings_per_task": 2}
        for name, number in (least | {"rows_per_mapping": 2, "specialist_steps": 1}).items():
            if getattr(self, name) < number:
                raise lc.InputError(f"{name}={getattr(self, name)}: expected at least {number}")
        if self.specialists > self.n_tasks:
            raise lc.InputError(
                f"specialists={self.specialists}: expected at most n_tasks={self.n_tasks}"
            )

    def run(self, context: Context) -> Findings:
        """Train and compare each seed, then place the transitions and decide the claims."""
        found = context.sweep(partial(measure, self), context.seeds, "seed")
        from studies.layer_by_layer.claims import SHOWS, claims, pictures, transitions

        scores = found["scores"]
        places = transitions(scores)
        import pandas as pd

        return Findings(
            scores=pd.concat([scores, places], ignore_index=True),
            claims=claims(scores, places),
            figures=pictures(scores, places),
            shows=SHOWS,
            notes=[
                "The paper tunes one language model of 32 layers on instructions; these are small "
                "models trained from scratch on a synthetic task. Directions are tested, not "
                "layers; the paper's ranges of layers are cited at second hand.",
                "Claims are decided from debiased CKA, 0 on average for unrelated states; plain "
                "CKA, the paper's, is in the figures and scores.",
                "A task has few expressions here, so the p of CKA over their relabellings cannot "
                "be small: no claim rests on it.",
                "Within one task the input alone gives the answer, so specialists need not read "
                "instructions: they share a code of inputs and answers with the model of all "
                "tasks.",
            ],
            provenance={"weights": dict(found["weights"].itertuples(index=False))},
        )
