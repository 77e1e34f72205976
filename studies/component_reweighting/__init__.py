"""Accuracy of single components, and their reweighting from a few labels."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import lensclust as lc
from studies.study import Context, Findings

if TYPE_CHECKING:
    import pandas as pd

from studies.component_reweighting.options import Options

HEADS = "heads"
NOTES = (
    "The source's data files, templates and recipe for prompt selection are not published, and "
    "its models are fifty times larger: claims marked reconstruction test its directions, not "
    "its numbers. The embedding and the biases count as parts of the model, not as components.",
    "The best or worst component is chosen on one half of the queries and scored on the other, "
    "both ways; 'same queries' is the source's procedure, biased towards the best of many.",
    "Labels of a method include the demonstrations: four, or one per class if there are more "
    "classes. Intervals of the pretrained model are over seeds of labelled "
    "examples, means over data sets and templates; queries and templates are the same for all "
    "seeds, so the intervals do not cover the choice of queries.",
    "Calib+ is the source's script, which may stop long before the minimum of its loss; Calib+ "
    "converged and vector scaling are minima, with penalties chosen on the folds of reweighting.",
    "Heads are clustered by task over prompts of different sets with one template; demonstrations "
    "and label words alone separate the sets (the ARI of the words is a control of the claim).",
)
ONE_SEED = "One seed leaves no interval: claims over seeds stay inconclusive."
NO_MODEL = "No pretrained model was run (--pretrained names one)."


class ComponentReweighting(Options):
    def check(self) -> None:
        """Raise InputError for options that leave a claim without a measurement."""
        least = {"templates": 2, "queries": 4, "cluster_queries": 2, "n_tasks": 3}
        least |= {"rows_per_mapping": 4, "n_checkpoints": 3, "permutations": 1}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise lc.InputError(f"{name}={getattr(self, name)}: expected at least {number}")
        if not self.labels or list(self.labels) != sorted(set(self.labels)):
            raise lc.InputError(f"labels={self.labels}: expected rising numbers")
        from lensclust.tasks.labelled import class_names

        known = lc.tasks.data_names()
        for name in self.data:
            if name not in known and "/" not in name and not Path(name).exists():
                raise lc.InputError(
                    f"data: no {name!r}: there are {', '.join(known)}, or a hub id or folder"
                )
        if self.pretrained != "none" and len(set(self.data)) < max(2, len(self.data)):
            raise lc.InputError(f"data={self.data}: expected two or more, all different")
        if self.labels[0] < self.n_inputs:
            raise lc.InputError(
                f"labels={self.labels}: the synthetic task needs at least {self.n_inputs}"
            )
        if self.pretrained != "none":
            for name in self.data:
                if name in known:
                    self.check_classes(name, len(class_names(name)))
        lc.tasks.sif(**self.sizes(), seed=0)

    def run(self, context: Context) -> Findings:
        """Measure each set of texts and each training, then decide the claims."""
        items: list[int | str] = list(context.seeds)
        if self.pretrained != "none":
            # Downloads happen here, once and visibly, before workers need them.
            lc.load(self.pretrained, progress=context.progress)
            for name in self.data:
                lc.tasks.labelled_texts(name, progress=context.progress)
            items = [*self.data, HEADS, *items]
        found = context.sweep(partial(measure, self, context.seeds), items, "part")
        from studies.component_reweighting.claims import claims
        from studies.component_reweighting.figures import SHOWS, pictures

        scores = found["scores"]
        return Findings(
            scores=scores,
            claims=claims(scores),
            figures=pictures(scores),
            shows=SHOWS,
            notes=[
                *NOTES,
                *([ONE_SEED] if len(context.seeds) == 1 else []),
                *([NO_MODEL] if self.pretrained == "none" else []),
            ],
            provenance={"weights": dict(found["weights"].itertuples(index=False))},
        )


def measure(
    study: Options, seeds: tuple[int, ...], item: int | str, folder: Path
) -> dict[str, pd.DataFrame]:
    """Measure one set of texts, the clusters of heads, or one training, in one process."""
    if isinstance(item, int):
        from studies.component_reweighting.synthetic import measure_seed

        return measure_seed(study, item, folder)
    from studies.component_reweighting.pretrained import measure_data, measure_heads

    return measure_heads(study, seeds) if item == HEADS else measure_data(study, item, seeds)
