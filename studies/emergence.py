"""When and where do task clusters appear while a model learns to follow instructions?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import lensclust as lc
import probes
from studies.frames import plane
from studies.opened_heads import one_group, opened_heads, sample_prompts
from studies.scales import AGREED
from studies.study import Context, Findings, Study, check_clusters, silenced

if TYPE_CHECKING:
    import pandas as pd

    from lensclust.views import HeadView

SPLITS = ("train", "new_string", "new_pair", "both", "new_regex")
UNSEEN = "new_string"
# What the page's points can be coloured by.
LABELS = ("task", "input", "output", "template")
# Heads are chosen on one split and reported on another: the best of many is biased upwards.
CHOOSING = "train"
LAYER_0 = (
    "At layer 0 the state that is read holds the input and its position, nothing else: where it "
    "takes fewer distinct values than there are tasks, no clustering is possible and it scores 0."
)
SAME_OUTPUT = (
    "Tasks that share an input answer it differently here, so given the input a cluster of one "
    "task is also a cluster of one answer; --n-outputs 4 makes tasks share answers."
)


@dataclass(frozen=True)
class Emergence(Study):
    """Train on simplified instruction following and cluster the states at every checkpoint.

    Every seed draws its own tasks, its own model and its own order of batches.

    Attributes:
        model: native preset to train.
        n_tasks: tasks to learn.
        n_inputs: inputs shared by the tasks.
        mappings_per_task: inputs each task answers.
        n_outputs: output tokens, by default as many as inputs: then tasks that share an input
            answer it differently. With fewer, states are scored against the output too.
        regexes_per_task: regular expressions each task's instructions come from.
        held_out_regexes: further expressions of each task, never trained on: the control.
        rows_per_mapping: prompts of each task and input in each split.
        steps: training steps.
        batch_size: prompts a step.
        lr: peak learning rate.
        n_checkpoints: log-spaced checkpoints, the untrained model included.
        k: clusters; default as many as tasks are present.
        permutations: permuted labellings behind each score.
    """

    title: ClassVar[str] = "task clusters over training, by layer and head"
    paper: ClassVar[str] = "Wu & Varshney 2402.12151 (reconstruction)"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {
            "n_tasks": 4,
            "n_inputs": 5,
            "mappings_per_task": 4,
            "regexes_per_task": 2,
            "held_out_regexes": 2,
            "steps": 150,
            "n_checkpoints": 3,
            "permutations": 20,
        },
        "default": {},
        "paper": {"n_tasks": 20, "n_inputs": 20, "mappings_per_task": 10, "steps": 4000},
    }
    cost: ClassVar[Mapping[str, str]] = {
        "smoke": "half a minute",
        "default": "five minutes on two cores",
        "paper": "an hour on a GPU",
    }
    default_seeds: ClassVar[int] = 3

    model: str = "sif-small"
    n_tasks: int = 10
    n_inputs: int = 10
    mappings_per_task: int = 5
    n_outputs: int | None = None
    regexes_per_task: int = 3
    held_out_regexes: int = 10
    rows_per_mapping: int = 8
    steps: int = 800
    batch_size: int = 64
    lr: float = 4e-3
    n_checkpoints: int = 8
    k: int | None = None
    permutations: int = 100

    def check(self) -> None:
        """Refuse what would leave a claim without a measurement."""
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
        from studies.emergence_findings import SHOWS, claims, pictures, views

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


def measure(study: Emergence, seed: int, folder: Path) -> dict[str, pd.DataFrame]:
    """Train one seed and score every checkpoint: the work of one process."""
    import numpy as np
    import pandas as pd

    from lensclust.threads import one_thread
    from studies.small_models import trained

    prompts = task_set(study, seed)
    # A tiny model gains nothing from a second thread, and one thread is always reproducible.
    with one_thread():
        run = trained(study, prompts, seed, folder, n_checkpoints=study.n_checkpoints)
        held_out = clustered_prompts(prompts, study.rows_per_mapping)
        tables, states = [training_scores(run.frame, prompts)], pd.DataFrame()
        heads = pd.DataFrame({"view": []}, dtype=object)
        unseen = held_out.where(split=UNSEEN)
        followed: list[tuple[int, Any]] = []
        for step, model in run.models():
            acts = lc.extract(model, held_out, ["resid", "head"], progress=False)
            is_last = step == study.steps
            if seed == 0:
                rows = np.flatnonzero(acts["split"].values == UNSEEN)
                followed.append((step, acts[["resid"]].isel(prompt=rows)))
            with silenced("probes.clustering"):  # the notes say what layer 0 cannot hold
                tables.append(cluster_scores(acts, study, is_last=is_last).assign(step=step))
            if is_last:
                states = plane_by_layer(acts).assign(step=step)
            if is_last and seed == 0:
                view = heads_of_last(model, acts, held_out, pd.concat(tables), study)
                heads = pd.DataFrame({"view": [json.dumps(view.to_json())]})
        weights = pd.DataFrame({"seed": [seed], "fingerprint": [lc.fingerprint(run.model())]})
    scores = pd.concat(tables, ignore_index=True).assign(seed=seed)
    found = {"scores": scores, "states": states.assign(seed=seed), "weights": weights}
    found |= {"map": states_over_training(followed, unseen) if seed == 0 else pd.DataFrame()}
    return found | {"heads": heads}


def states_over_training(followed: Sequence[tuple[int, Any]], prompts: lc.Prompts) -> pd.DataFrame:
    """The same prompts in two dimensions, by checkpoint and layer."""
    texts = [prompts.text(row) for row in range(len(prompts))]
    wanted = ["step", "layer", "x", "y", "explained", *LABELS]
    found = probes.cluster_map(followed).frame[wanted]
    return found.assign(text=texts * (len(found) // len(texts)))


def heads_of_last(
    model: Any, acts: Any, prompts: lc.Prompts, scores: pd.DataFrame, study: Emergence
) -> HeadView:
    """The heads of the last checkpoint, beside their scores at those before."""
    import numpy as np

    from lensclust.tasks.sif import vocabulary

    rows = np.flatnonzero((prompts.rows["split"] == UNSEEN).to_numpy())
    unseen = prompts.take(rows)
    samples = sample_prompts(unseen, "input")
    names = vocabulary(n_inputs=study.n_inputs, n_outputs=study.n_outputs)
    mine = scores[(scores["kind"] == "head") & (scores["split"] == UNSEEN)]
    agreed, last = mine["metric"] == AGREED, mine["step"] == study.steps
    # Agreement first, from the last checkpoint back; of other scores the last checkpoint alone.
    mine = mine[(mine["by"] == "task") & (agreed | last)]
    mine = mine.assign(other=mine["metric"] != AGREED, before=-mine["step"])
    mine = mine.sort_values(["other", "before"], kind="stable")
    return opened_heads(
        acts.isel(prompt=rows),
        unseen,
        mine.assign(score=mine["metric"] + " at step " + mine["step"].astype(int).astype(str)),
        None if samples is None else probes.sample_attention(model, samples, names=names),
        given="input",
        labels=LABELS,
        title="The heads after training, on unseen strings",
        score="score",
    )


def task_set(study: Emergence, seed: int) -> lc.Prompts:
    """The tasks of one seed."""
    return lc.tasks.sif(
        n_tasks=study.n_tasks,
        n_inputs=study.n_inputs,
        mappings_per_task=study.mappings_per_task,
        n_outputs=study.n_outputs,
        regexes_per_task=study.regexes_per_task,
        held_out_regexes=study.held_out_regexes,
        rows_per_mapping=study.rows_per_mapping,
        seed=seed,
    )


def clustered_prompts(prompts: lc.Prompts, per_mapping: int) -> lc.Prompts:
    """The prompts to cluster: every split, the training split cut to the others' size.

    What is kept of a task and input comes from all of its expressions in turn. Inputs that a
    split shows under one task only have nothing to be clustered by.
    """
    import numpy as np

    rows = prompts.rows
    cell = ["split", "task", "input"]
    turn = rows.groupby([*cell, "template"]).cumcount()
    nth = turn.groupby([rows[name] for name in cell]).rank(method="first")
    tasks = rows.groupby(["split", "input"])["task"].transform("nunique")
    return prompts.take(np.flatnonzero(((nth <= per_mapping) & (tasks > 1)).to_numpy()))


def training_scores(frame: pd.DataFrame, prompts: lc.Prompts) -> pd.DataFrame:
    """Accuracy by step and split, beside the best answer that the input alone allows."""
    chance = input_only_accuracy(prompts.rows)
    return frame.melt(["step", "split"], ["accuracy", "loss"], "metric").assign(
        site="model",
        kind="model",
        null_mean=lambda f: f["split"].map(chance).where(f["metric"] == "accuracy"),
    )


def input_only_accuracy(rows: pd.DataFrame) -> pd.Series:
    """By split: accuracy of the commonest output of each input, the instruction ignored."""
    share = rows.groupby(["split", "input"])["output"].agg(lambda o: o.value_counts().iloc[0])
    return share.groupby("split").sum() / rows.groupby("split").size()


def cluster_scores(acts: Any, study: Emergence, *, is_last: bool) -> pd.DataFrame:
    """Clusters by task at every layer on every split, and at every head on unseen strings.

    At the last checkpoint the heads are also scored on the split that the best is chosen on.
    """
    import numpy as np
    import pandas as pd

    tables = []
    for split in SPLITS:
        part = acts.isel(prompt=np.flatnonzero(acts["split"].values == split))
        if part.sizes["prompt"] == 0:
            continue
        options: dict[str, Any] = {"permutations": study.permutations, "jobs": 1}
        with_heads = split == UNSEEN or (is_last and split == CHOOSING)
        kinds = ["resid", "head"] if with_heads else ["resid"]
        against = [] if study.n_outputs is None else ["output"]
        inside = probes.cluster(part, k=study.k, kinds=kinds, score_against=against, **options)
        tables.append(inside.frame.assign(split=split))
        if split == UNSEEN:
            everything = probes.cluster(
                part, given=None, score_against=["input"], kinds="resid", **options
            )
            tables.append(everything.frame.assign(split=split))
    return pd.concat(tables, ignore_index=True)


def plane_by_layer(acts: Any) -> pd.DataFrame:
    """Two principal components by layer of the states that share one input."""
    import numpy as np
    import pandas as pd

    part = acts.isel(prompt=np.flatnonzero(acts["split"].values == UNSEEN))
    tasks = pd.DataFrame({name: part[name].values for name in ("input", "task")})
    part = part.isel(prompt=one_group(tasks, "input"))
    labels = {name: part[name].values for name in ("instruction", "template", "input")}
    labels["task"] = [f"task {number}" for number in part["task"].values]
    return pd.concat(
        [
            plane(part.resid.sel(layer=layer)[:, 0].values, layer=layer, **labels)
            for layer in part["layer"].values
        ],
        ignore_index=True,
    )
