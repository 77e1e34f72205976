"""Options of the study `component_reweighting`, and the names in its tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import lensclust as lc
from studies.study import Study

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Options(Study):
    """Score every head and MLP alone, and reweight them from a few labelled prompts.

    In a pretrained model with few-shot prompts of classification tasks: accuracy, bias and
    stability of components over demonstrations and templates; reweighting from few labels
    against more demonstrations, calibration and prompt selection; whether heads that cluster by
    task are accurate. In a model trained on the synthetic task: whether components become
    accurate before the model.

    Attributes:
        pretrained: model of the first part, anything `lensclust.load` takes; "none" to skip it.
        data: labelled texts, names or anything else `lensclust.tasks.labelled_texts` reads.
        templates: number of templates of each set, from the first.
        queries: texts to label, of each set.
        labels: numbers of labelled examples, demonstrations included.
        longest: maximum number of characters of a text.
        cluster_queries: prompts of each set and seed for clustering heads by task.
        model: native preset to train for the second part.
        n_tasks: tasks to learn.
        n_inputs: inputs shared by the tasks, and answers.
        mappings_per_task: inputs each task answers.
        regexes_per_task: regular expressions each task's instructions come from.
        rows_per_mapping: evaluated prompts of each task and input.
        steps: training steps.
        batch_size: prompts a step.
        lr: peak learning rate.
        n_checkpoints: log-spaced checkpoints, the untrained model included.
        permutations: permuted labellings behind each clustering score.
    """

    title: ClassVar[str] = "accuracy of single heads and MLPs, and their reweighting"
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
    # The longest texts first, so that no core waits for them.
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

    def check_classes(self, name: str, n: int) -> None:
        """Raise InputError for fewer labels or queries than a set of ``n`` classes needs."""
        # Demonstrations and one labelled example per class; two queries, one to choose
        # components on and one to score them on.
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
        """Sizes of the synthetic task."""
        names = ("n_tasks", "n_inputs", "mappings_per_task", "regexes_per_task")
        return {name: getattr(self, name) for name in (*names, "rows_per_mapping")}
