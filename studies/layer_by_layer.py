"""Which layers of a model of many tasks hold what a model of one task learned?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import lensclust as lc
import probes
from studies.small_models import trained
from studies.study import Context, Findings, Study, silenced

if TYPE_CHECKING:
    import pandas as pd

# What is held against the first specialist of a task, over that task's prompts.
MULTI = "model of all tasks"
CEILING = "second specialist"
OTHER = "specialist of another task"
UNTRAINED = "untrained model"
PAIRS = (MULTI, CEILING, OTHER, UNTRAINED)
METRICS = {"cka_debiased": True, "cka": False}
UNSEEN = "new_string"


@dataclass(frozen=True)
class LayerByLayer(Study):
    """Train one model on all tasks and two on each of some, and compare them layer by layer.

    Every seed draws its own tasks; no two models begin with the same weights or see the same
    batches, so what they share is what the tasks make of them.

    Attributes:
        model: native preset to train.
        n_layers: its blocks.
        n_tasks: tasks of the model of all tasks.
        specialists: tasks that get two models of their own.
        n_inputs: inputs shared by the tasks.
        mappings_per_task: inputs each task answers.
        regexes_per_task: regular expressions each task's instructions come from.
        rows_per_mapping: unseen strings of each task and input to compare models on.
        steps: training steps of the model of all tasks.
        specialist_steps: training steps of a specialist.
        batch_size: prompts a step.
        lr: peak learning rate.
    """

    title: ClassVar[str] = "a model of many tasks against models of one, layer by layer"
    paper: ClassVar[str] = "Zhao, Ziser & Cohen 2410.20008 (MOSSA, reconstruction)"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {
            "n_layers": 6,
            "n_tasks": 3,
            "specialists": 2,
            "n_inputs": 5,
            "mappings_per_task": 4,
            "regexes_per_task": 2,
            "rows_per_mapping": 8,
            "steps": 100,
            "specialist_steps": 40,
        },
        "default": {},
        "paper": {"n_layers": 32, "n_tasks": 12, "specialists": 12, "steps": 4000},
    }
    cost: ClassVar[Mapping[str, str]] = {
        "smoke": "half a minute",
        "default": "ten minutes on two cores",
        "paper": "hours on a GPU (not measured)",
    }
    default_seeds: ClassVar[int] = 5

    model: str = "sif-small"
    n_layers: int = 12
    n_tasks: int = 6
    specialists: int = 3
    n_inputs: int = 10
    mappings_per_task: int = 5
    regexes_per_task: int = 3
    rows_per_mapping: int = 16
    steps: int = 800
    specialist_steps: int = 200
    batch_size: int = 64
    lr: float = 4e-3

    def check(self) -> None:
        """Refuse what would leave a claim without a measurement."""
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
        from studies.layer_by_layer_findings import SHOWS, claims, pictures, transitions

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
                "models trained from nothing on a synthetic task. Directions are tested, not "
                "layers, and what is said of the paper's ranges of layers is at second hand.",
                "Claims are decided from debiased CKA, 0 on average for unrelated states; plain "
                "CKA, the paper's, is in the figures and scores.",
                "A task has few expressions here, so the p of CKA over their relabellings cannot "
                "be small: no claim rests on it.",
                "Within one task the input alone gives the answer, so specialists need not read "
                "instructions: what they share with the model of all tasks is a code of inputs "
                "and answers.",
            ],
            provenance={"weights": dict(found["weights"].itertuples(index=False))},
        )


def measure(study: LayerByLayer, seed: int, folder: Path) -> dict[str, pd.DataFrame]:
    """Train the models of one seed and compare them: the work of one process."""
    import pandas as pd

    from lensclust.threads import one_thread

    prompts = task_set(study, seed)
    tasks = range(study.specialists)
    # Two specialists a task, and the model of all tasks: each with a seed of its own.
    first = seed * (2 * study.specialists + 1)
    with one_thread():
        run = _train(study, prompts, first, folder / "all")
        multi, untrained = run.model(), run.checkpoints[0].model()
        single = replace(study, steps=study.specialist_steps)
        specialists = {
            (task, copy): _train(
                single,
                prompts.where(task=task, split=["train", UNSEEN]),
                first + 1 + 2 * task + copy,
                folder / f"task-{task}-{copy}",
            ).model()
            for task in tasks
            for copy in (0, 1)
        }
        tables = []
        for task in tasks:
            asked = prompts.where(task=task, split=UNSEEN)
            others = {
                MULTI: multi,
                CEILING: specialists[task, 1],
                OTHER: specialists[(task + 1) % study.specialists, 1],
                UNTRAINED: untrained,
            }
            found = compare(specialists[task, 0], others, asked)
            tables.append(found.assign(task=task))
    scores = pd.concat(tables, ignore_index=True).assign(seed=seed)
    weights = pd.DataFrame({"seed": [seed], "fingerprint": [lc.fingerprint(multi)]})
    return {"scores": scores, "weights": weights}


def task_set(study: LayerByLayer, seed: int) -> lc.Prompts:
    """The tasks of one seed."""
    return lc.tasks.sif(
        n_tasks=study.n_tasks,
        n_inputs=study.n_inputs,
        mappings_per_task=study.mappings_per_task,
        regexes_per_task=study.regexes_per_task,
        held_out_regexes=0,
        rows_per_mapping=study.rows_per_mapping,
        seed=seed,
    )


def compare(specialist: Any, others: Mapping[str, Any], prompts: lc.Prompts) -> pd.DataFrame:
    """CKA of each model with the specialist, layer with the same layer, and all accuracies."""
    import pandas as pd

    from probes.interchanges import first_token
    from probes.pairing import first_answers
    from probes.replay import answers

    own = lc.extract(specialist, prompts, "resid", progress=False)
    tables = []
    for pair, model in {"specialist": specialist, **others}.items():
        right = answers(model, prompts, first_token).numpy() == first_answers(prompts)
        tables.append(pd.DataFrame([{"metric": "accuracy", "pair": pair, "value": right.mean()}]))
        if pair == "specialist":
            continue
        acts = lc.extract(model, prompts, "resid", progress=False)
        for debiased in METRICS.values():
            with silenced("probes.kernel_alignment"):  # the notes say it once
                frame = probes.cka(own, acts, debiased=debiased).frame
            same = frame[frame["layer_a"] == frame["layer_b"]].rename(columns={"layer_a": "layer"})
            kept = same[["layer", "metric", "value", "null_mean", "null_std", "p"]]
            tables.append(kept.assign(pair=pair))
    return pd.concat(tables, ignore_index=True)


def _train(study: LayerByLayer, prompts: lc.Prompts, seed: int, folder: Path) -> Any:
    sizes = {"n_layers": study.n_layers}
    return trained(study, prompts, seed, folder, n_checkpoints=2, sizes=sizes)
