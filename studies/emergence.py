"""When and where do task clusters appear while a model learns to follow instructions?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import lensclust as lc
import probes
from studies.study import Context, Findings, Study

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

PAPER = "Wu & Varshney, arXiv 2402.12151"
SPLITS = ("train", "new_string", "new_pair", "both", "new_regex")
UNSEEN = "new_string"
# Heads are chosen on one split and reported on another: the best of many is biased upwards.
CHOOSING = "train"
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
        rows_per_mapping: prompts of each task and input in each split.
        steps: training steps.
        batch_size: prompts a step.
        lr: peak learning rate.
        n_checkpoints: log-spaced checkpoints, the untrained model included.
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
            "steps": 150,
            "n_checkpoints": 4,
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
    rows_per_mapping: int = 8
    steps: int = 800
    batch_size: int = 64
    lr: float = 4e-3
    n_checkpoints: int = 8
    permutations: int = 100

    def run(self, context: Context) -> Findings:
        """Train and measure each seed, then decide the claims over seeds."""
        found = context.sweep(partial(measure, self), context.seeds, "seed")
        scores, states = found["scores"], found["states"]
        return Findings(
            scores=scores,
            claims=claims(scores, self),
            figures=pictures(scores, states),
            notes=[
                "The paper's sizes and hyper-parameters are not known to us: tasks, model and "
                "training are a reconstruction, so directions are tested, not values.",
                *([] if self.n_outputs else [SAME_OUTPUT]),
            ],
            provenance={"weights": dict(found["weights"].itertuples(index=False))},
        )


def measure(study: Emergence, seed: int, folder: Path) -> dict[str, pd.DataFrame]:
    """Train one seed and score every checkpoint: the work of one process."""
    import pandas as pd

    from lensclust.native import native_config
    from lensclust.threads import one_thread
    from lensclust.training import required_sizes

    prompts = lc.tasks.sif(
        n_tasks=study.n_tasks,
        n_inputs=study.n_inputs,
        mappings_per_task=study.mappings_per_task,
        n_outputs=study.n_outputs,
        regexes_per_task=study.regexes_per_task,
        rows_per_mapping=study.rows_per_mapping,
        seed=seed,
    )
    config = native_config(study.model, **required_sizes(prompts))
    # A tiny model gains nothing from a second thread, and one thread is always reproducible.
    with one_thread():
        run = lc.train(
            config,
            prompts,
            steps=study.steps,
            batch_size=study.batch_size,
            lr=study.lr,
            n_checkpoints=study.n_checkpoints,
            out=folder / "checkpoints",
            seed=seed,
            resume=True,
            progress=False,
        )
        held_out = clustered_prompts(prompts, study.rows_per_mapping)
        tables, states = [training_scores(run.frame, prompts)], pd.DataFrame()
        for step, model in run.models():
            acts = lc.extract(model, held_out, ["resid", "head"], progress=False)
            tables.append(cluster_scores(acts, study).assign(step=step))
            states = plane(acts).assign(step=step)
        weights = pd.DataFrame({"seed": [seed], "fingerprint": [lc.fingerprint(model)]})
    scores = pd.concat(tables, ignore_index=True).assign(seed=seed)
    return {"scores": scores, "states": states.assign(seed=seed), "weights": weights}


def clustered_prompts(prompts: lc.Prompts, per_mapping: int) -> lc.Prompts:
    """The prompts to cluster: every split, the training split cut to the others' size."""
    import numpy as np

    rows = prompts.rows
    nth = rows.groupby(["split", "task", "input"]).cumcount()
    return prompts.take(np.flatnonzero((nth < per_mapping).to_numpy()))


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


def cluster_scores(acts: Any, study: Emergence) -> pd.DataFrame:
    """Clusters by task at every layer on every split, and at every head on two of them."""
    import numpy as np
    import pandas as pd

    tables = []
    for split in SPLITS:
        part = acts.isel(prompt=np.flatnonzero(acts["split"].values == split))
        if part.sizes["prompt"] == 0:
            continue
        options: dict[str, Any] = {"permutations": study.permutations, "jobs": 1}
        kinds = ["resid", "head"] if split in (UNSEEN, CHOOSING) else ["resid"]
        against = [] if study.n_outputs is None else ["output"]
        inside = probes.cluster(part, kinds=kinds, score_against=against, **options)
        tables.append(inside.frame.assign(split=split))
        if split == UNSEEN:
            everything = probes.cluster(
                part, given=None, score_against=["input"], kinds="resid", **options
            )
            tables.append(everything.frame.assign(split=split))
    return pd.concat(tables, ignore_index=True)


def plane(acts: Any) -> pd.DataFrame:
    """Two principal components by layer of the states that share one input."""
    import numpy as np
    import pandas as pd
    from sklearn.decomposition import PCA

    part = acts.isel(prompt=np.flatnonzero(acts["split"].values == UNSEEN))
    tasks = pd.Series(part["task"].values).groupby(part["input"].values).nunique()
    part = part.isel(prompt=np.flatnonzero(part["input"].values == tasks.idxmax()))
    labels = {name: part[name].values for name in ("instruction", "template", "input")}
    labels["task"] = [f"task {number}" for number in part["task"].values]
    tables = []
    for layer in part["layer"].values:
        points = PCA(2, svd_solver="full").fit_transform(part.resid.sel(layer=layer)[:, 0].values)
        tables.append(
            pd.DataFrame({"layer": layer, "x": points[:, 0], "y": points[:, 1], **labels})
        )
    return pd.concat(tables, ignore_index=True)


def claims(scores: pd.DataFrame, study: Emergence) -> list[lc.Claim]:
    """Decide the claims; every value is one seed's."""
    from lensclust.results import decide

    ari = Curves(scores)
    top, first, last = ari.layers[-1], ari.steps[0], ari.steps[-1]
    middle = min(ari.steps[1:-1] or [first], key=lambda step: abs(step - last / 2))
    final, untrained = ari.of(UNSEEN, top, last), ari.of(UNSEEN, top, first)
    null = ari.null(UNSEEN, top, last)
    rise = final - untrained
    accuracy = {split: ari.accuracy(split, last) for split in (UNSEEN, "new_regex")}
    chance = {split: ari.chance(split) for split in (UNSEEN, "new_regex")}
    head, typical, untrained_head = ari.heads()
    paper = {"source": PAPER, "origin": "reconstruction"}
    return [
        decide(
            "rises",
            "Clustering by task rises with training (last layer, unseen strings, given the input)",
            rise,
            control={"untrained model": _mean(untrained), "permuted labels": _mean(null)},
            at_least=0.0,
            **paper,
        ),
        decide(
            "saturates",
            "and saturates: the share of the rise that comes in the second half is small",
            (final - ari.of(UNSEEN, top, middle)) / rise,
            control={"share of a steady rise": 0.5},
            at_most=0.25,
            **paper,
        ),
        decide(
            "clusters",
            "At the end the last layer clusters unseen strings by task (ARI given the input)",
            final,
            control={"permuted labels": _mean(null), "untrained model": _mean(untrained)},
            at_least=0.85,
            **paper,
        ),
        decide(
            "deeper",
            "Deeper layers cluster more (rank correlation of ARI with layer)",
            ari.depth_correlation(last),
            control={"untrained model": _mean(ari.depth_correlation(first))},
            at_least=0.0,
            **paper,
        ),
        decide(
            "embedding-flat",
            "The embedding layer stays flat (largest ARI of layer 0 at any checkpoint)",
            ari.largest(UNSEEN, ari.layers[0]),
            control={"permuted labels": _mean(ari.null(UNSEEN, ari.layers[0], last))},
            at_most=0.05,
            **paper,
        ),
        decide(
            "unseen-strings",
            "The model answers unseen strings of known expressions (accuracy)",
            accuracy[UNSEEN],
            control={"best answer from the input alone": _mean(chance[UNSEEN])},
            at_least=0.97,
            **paper,
        ),
        decide(
            "unseen-expressions",
            "and fails on expressions never trained on (accuracy above the input alone)",
            accuracy["new_regex"] - chance["new_regex"],
            control={
                "accuracy": _mean(accuracy["new_regex"]),
                "best answer from the input alone": _mean(chance["new_regex"]),
            },
            at_most=0.1,
            source=PAPER,
            origin="extension",
        ),
        decide(
            "unclustered-expressions",
            "whose states do not cluster by task as those of unseen strings do (ARI lost)",
            final - ari.of("new_regex", top, last),
            control={
                "unseen strings": _mean(final),
                "unseen expressions": _mean(ari.of("new_regex", top, last)),
                "permuted labels": _mean(ari.null("new_regex", top, last)),
            },
            at_least=0.5,
            source=PAPER,
            origin="extension",
        ),
        decide(
            "tracks-accuracy",
            "Clustering and accuracy move together over checkpoints (rank correlation)",
            ari.accuracy_correlation(top),
            control={"layer 0": _mean(ari.accuracy_correlation(ari.layers[0]))},
            at_least=0.0,
            **paper,
        ),
        decide(
            "heads",
            "Few heads carry it: the best head (chosen on other prompts) above the median head",
            head - typical,
            control={"median head": _mean(typical), "same head untrained": _mean(untrained_head)},
            at_least=0.0,
            source="this project",
            origin="extension",
        ),
    ]


class Curves:
    """The scores as arrays over seeds."""

    def __init__(self, scores: pd.DataFrame) -> None:
        clusters = scores[(scores["metric"] == "ari") & (scores["given"] == "input")]
        clusters = clusters[clusters["by"] == "task"]
        self.resid = clusters[clusters["kind"] == "resid"]
        self.head = clusters[clusters["kind"] == "head"]
        self.model = scores[(scores["kind"] == "model") & (scores["metric"] == "accuracy")]
        self.layers = [int(layer) for layer in sorted(self.resid["layer"].unique())]
        self.steps = [int(step) for step in sorted(self.resid["step"].unique())]

    def of(self, split: str, layer: int, step: int) -> np.ndarray:
        return self._resid(split, layer, step)["value"].to_numpy()

    def null(self, split: str, layer: int, step: int) -> np.ndarray:
        return self._resid(split, layer, step)["null_mean"].to_numpy()

    def largest(self, split: str, layer: int) -> np.ndarray:
        rows = self.resid[(self.resid["split"] == split) & (self.resid["layer"] == layer)]
        return rows.groupby("seed")["value"].max().to_numpy()

    def accuracy(self, split: str, step: int) -> np.ndarray:
        rows = self.model[(self.model["split"] == split) & (self.model["step"] == step)]
        return rows.sort_values("seed")["value"].to_numpy()

    def chance(self, split: str) -> np.ndarray:
        rows = self.model[self.model["split"] == split]
        return rows.groupby("seed")["null_mean"].first().to_numpy()

    def depth_correlation(self, step: int) -> np.ndarray:
        rows = self.resid[(self.resid["split"] == UNSEEN) & (self.resid["step"] == step)]
        return _rank_correlations(rows, "layer", "value")

    def accuracy_correlation(self, layer: int) -> np.ndarray:
        rows = self.resid[(self.resid["split"] == UNSEEN) & (self.resid["layer"] == layer)]
        accuracy = self.model[self.model["split"] == UNSEEN][["seed", "step", "value"]]
        both = rows.merge(accuracy, on=["seed", "step"], suffixes=("", "_accuracy"))
        return _rank_correlations(both, "value", "value_accuracy")

    def heads(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ARI on unseen strings by seed: best head, median head, best head before training."""
        import numpy as np

        found = []
        for _, rows in self.head.groupby("seed"):
            scores = rows.pivot_table("value", "site", ["split", "step"])
            best = scores[CHOOSING, self.steps[-1]].idxmax()
            final = scores[UNSEEN, self.steps[-1]]
            found.append((final[best], final.median(), scores[UNSEEN, self.steps[0]][best]))
        best, median, untrained = np.array(found).T
        return best, median, untrained

    def _resid(self, split: str, layer: int, step: int) -> pd.DataFrame:
        rows = self.resid[(self.resid["split"] == split) & (self.resid["layer"] == layer)]
        return rows[rows["step"] == step].sort_values("seed")


def pictures(scores: pd.DataFrame, states: pd.DataFrame) -> dict[str, Any]:
    """The study's figures, by file name."""
    from lensclust import figures

    clusters = scores[(scores["metric"] == "ari") & (scores["kind"] == "resid")]
    given = clusters[(clusters["given"] == "input") & (clusters["by"] == "task")]
    unseen = given[given["split"] == UNSEEN]
    last = unseen["step"].max()
    heads = scores[(scores["metric"] == "ari") & (scores["kind"] == "head")]
    heads = heads[(heads["split"] == UNSEEN) & (heads["step"] == last) & (heads["by"] == "task")]
    top = given[given["layer"] == given["layer"].max()]
    together = clusters[(clusters["given"] == "none") & (clusters["step"] == last)]
    accuracy = scores[(scores["kind"] == "model") & (scores["metric"] == "accuracy")]
    return {
        "ari_by_layer": figures.curves(
            unseen,
            color="step",
            title="Clustering by task, layer by layer over training",
            caption="ARI on unseen strings.",
            y_title="ARI",
        ),
        "ari_over_training": figures.curves(
            unseen,
            x="step",
            color="layer",
            title="Clustering by task over training",
            caption="ARI on unseen strings.",
            y_title="ARI",
        ),
        "splits": figures.curves(
            top,
            x="step",
            color="split",
            title="The last layer on each split",
            caption="ARI at the last layer.",
            y_title="ARI",
        ),
        "accuracy": figures.curves(
            accuracy,
            x="step",
            color="split",
            band=None,
            title="Accuracy on each split",
            caption="Exact match of the answer; new_regex cannot be known and is the control.",
            y_title="accuracy",
        ),
        "heads": figures.head_map(
            heads,
            title="Which heads carry the task",
            caption="ARI of each head's contribution to the residual stream, unseen strings, "
            "given the input, after training.",
        ),
        "task_and_input": figures.curves(
            together,
            color="by",
            title="All prompts together: task against input",
            caption="k-means over all unseen strings with as many clusters as tasks, after "
            "training. At the answering token the state is a code of both.",
            y_title="ARI",
        ),
        "clusters": figures.scatter(
            states[states["seed"] == states["seed"].min()],
            title="The states of one input, by layer",
            caption="Two principal components of each layer after training, unseen strings.",
            tooltip=("instruction", "template", "input"),
        ),
    }


def _rank_correlations(rows: pd.DataFrame, a: str, b: str) -> np.ndarray:
    """Spearman's rho in each seed; 0 where one side does not vary."""
    import numpy as np
    from scipy.stats import spearmanr

    found = []
    for _, seed in rows.groupby("seed"):
        varies = seed[a].nunique() > 1 and seed[b].nunique() > 1
        found.append(float(spearmanr(seed[a], seed[b]).statistic) if varies else 0.0)
    return np.array(found)


def _mean(values: np.ndarray) -> float:
    return float(values.mean())
