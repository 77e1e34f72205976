"""What single components would answer, and what a few labels make of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import lensclust as lc
from studies.study import Context, Findings, Study

if TYPE_CHECKING:
    import pandas as pd

HEADS = "heads"
NOTES = (
    "The source's data files, templates and recipe for prompt selection are not published, and "
    "its models are fifty times larger: claims marked reconstruction test its directions, not "
    "its numbers. The embedding and the biases count as parts of the model, not as components.",
    "A best or worst component is chosen on one half of the queries and scored on the other, "
    "both ways; 'same queries' is the source's way, which favours the best of many.",
    "Labels of a method include the demonstrations, of which there are four, or one a class where "
    "there are more classes. Intervals of the pretrained model are over seeds of labelled "
    "examples, means over data sets and templates; queries and templates are the same for all "
    "seeds, so the intervals do not say how other queries would do.",
    "Calib+ is the source's script, which may stop long before its loss is least; Calib+ converged "
    "and vector scaling are minima, with penalties chosen on the folds of reweighting.",
    "Heads are clustered by task over prompts of different sets under one template; demonstrations "
    "and label words alone tell the sets apart (the ARI of the words stands beside the claim).",
)
ONE_SEED = "One seed leaves no interval: claims over seeds stay inconclusive."
NO_MODEL = "No pretrained model was run (--pretrained names one)."


@dataclass(frozen=True)
class ComponentReweighting(Study):
    """Score every head and MLP alone, and weigh them anew from a few labelled prompts.

    In a pretrained model with few-shot prompts of classification tasks: how right, how biased
    and how steady components are over demonstrations and templates; reweighting from few labels
    against more demonstrations, calibration and prompt selection; whether the heads that
    cluster by task are the ones that are right. In a model trained on the synthetic task: when
    components become right, against when the model does.

    Attributes:
        pretrained: model for the first part, anything `lensclust.load` takes; "none" for no
            such part.
        data: labelled texts, names or anything else `lensclust.tasks.labelled_texts` reads.
        templates: of each set, the first so many.
        queries: texts to label, of each set.
        labels: numbers of labelled examples, demonstrations included.
        longest: leave out texts of more characters.
        cluster_queries: prompts of each set and seed that heads are clustered by task with.
        model: native preset to train for the second part.
        n_tasks: tasks to learn.
        n_inputs: inputs shared by the tasks, and answers.
        mappings_per_task: inputs each task answers.
        regexes_per_task: regular expressions each task's instructions come from.
        rows_per_mapping: prompts of each task and input that are asked.
        steps: training steps.
        batch_size: prompts a step.
        lr: peak learning rate.
        n_checkpoints: log-spaced checkpoints, the untrained model included.
        permutations: permuted labellings behind each clustering score.
    """

    title: ClassVar[str] = "what heads and MLPs would answer alone, and weighing them anew"
    paper: ClassVar[str] = "Chang, Thomason & Jia 2406.13131 (reconstruction and extension)"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {
            "pretrained": "none",
            "n_tasks": 4,
            "n_inputs": 5,
            "mappings_per_task": 4,
            "regexes_per_task": 2,
            "steps": 150,
            "n_checkpoints": 4,
            "permutations": 10,
        },
        "default": {},
        "paper": {
            "data": (
                *("agnews", "subjective", "trec", "sst2", "rotten_tomatoes", "sst5"),
                *("financial_phrasebank", "tweet_eval_emotion", "tweet_eval_hate"),
            ),
            "queries": 1000,
            "longest": 1000,
            "cluster_queries": 40,
            "n_tasks": 20,
            "n_inputs": 20,
            "mappings_per_task": 10,
            "steps": 4000,
            "n_checkpoints": 16,
        },
    }
    cost: ClassVar[Mapping[str, str]] = {
        "smoke": "half a minute",
        "default": "twenty minutes on two cores, after downloads of 93 and 18 MB",
        "paper": "hours on a GPU; --pretrained names a model of the source's size",
    }
    default_seeds: ClassVar[int] = 5

    pretrained: str = "smollm2-135m-instruct"
    # The longest texts first, so that no core is left waiting for them.
    data: tuple[str, ...] = ("agnews", "subjective", "trec", "sst2")
    templates: int = 3
    queries: int = 48
    labels: tuple[int, ...] = (12, 24)
    longest: int | None = 160
    cluster_queries: int = 8
    model: str = "sif-small"
    n_tasks: int = 10
    n_inputs: int = 10
    mappings_per_task: int = 5
    regexes_per_task: int = 3
    rows_per_mapping: int = 8
    steps: int = 800
    batch_size: int = 64
    lr: float = 4e-3
    n_checkpoints: int = 8
    permutations: int = 20

    def check(self) -> None:
        """Refuse what would leave a claim without a measurement."""
        least = {"templates": 2, "queries": 4, "cluster_queries": 2, "n_tasks": 3}
        least |= {"rows_per_mapping": 4, "n_checkpoints": 3, "permutations": 1}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise lc.InputError(f"{name}={getattr(self, name)}: expected at least {number}")
        if not self.labels or list(self.labels) != sorted(set(self.labels)):
            raise lc.InputError(f"labels={self.labels}: expected rising numbers")
        from lensclust.tasks.labelled_texts import class_names

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

    def check_classes(self, name: str, n: int) -> None:
        """Refuse fewer labels or queries than a set of so many classes needs."""
        # Demonstrations and an example of each class to learn from; two queries, to choose
        # components on one and score them on the other.
        for field, given, needed in (
            ("labels", self.labels[0], max(4, n) + n),
            ("queries", self.queries, 2 * n),
        ):
            if given < needed:
                raise lc.InputError(
                    f"{field}={getattr(self, field)}: {name} has {n} classes and needs at least "
                    f"{needed}"
                )

    def sizes(self) -> dict[str, Any]:
        """The knobs of the synthetic task."""
        names = ("n_tasks", "n_inputs", "mappings_per_task", "regexes_per_task")
        return {name: getattr(self, name) for name in (*names, "rows_per_mapping")}

    def run(self, context: Context) -> Findings:
        """Measure each set of texts and each training, then decide the claims."""
        items: list[int | str] = list(context.seeds)
        if self.pretrained != "none":
            # Downloads happen here, once and in sight, before workers ask for them.
            lc.load(self.pretrained, progress=context.progress)
            for name in self.data:
                lc.tasks.labelled_texts(name, progress=context.progress)
            items = [*self.data, HEADS, *items]
        found = context.sweep(partial(measure, self, context.seeds), items, "part")
        from studies.component_reweighting_figures import SHOWS, pictures
        from studies.component_reweighting_findings import claims

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
    study: ComponentReweighting, seeds: tuple[int, ...], item: int | str, folder: Path
) -> dict[str, pd.DataFrame]:
    """One set of texts, the clusters of heads, or one training: the work of one process."""
    if isinstance(item, int):
        from studies.component_reweighting_synthetic import measure_seed

        return measure_seed(study, item, folder)
    from studies.component_reweighting_pretrained import measure_data, measure_heads

    return measure_heads(study, seeds) if item == HEADS else measure_data(study, item, seeds)
