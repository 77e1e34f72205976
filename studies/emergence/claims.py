"""The claims and the figures of the emergence study."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd

import lensclust as lc
from lensclust import figures
from lensclust.report.views import ClusterView, HeadView
from lensclust.results import correlation, decide
from lensclust.runs import View
from studies.emergence.options import CHOOSING
from studies.scales import AGREED, AGREEMENT, SHARE, SMALL, WEAK
from studies.scores import rank_correlations, where
from studies.synthetic_task import LABELS, UNSEEN

PAPER: dict[str, Any] = {
    "source": "Wu & Varshney, arXiv 2402.12151",
    "origin": "reconstruction",
}
OURS: dict[str, Any] = {"source": "this project", "origin": "extension"}
_GIVEN = "k-means within input"


# Claims that each figure shows.
SHOWS = {
    "task_over_training": ["rises", "saturates", "embedding-flat", "tracks-accuracy"],
    "task_by_layer": ["clusters", "nearly-all", "deeper", "embedding-flat"],
    "task_or_wording": ["clusters", "deeper"],
    "splits": ["unclustered-expressions"],
    "accuracy": ["unseen-*", "tracks-accuracy"],
    "heads": ["heads"],
}


class Curves:
    """The scores: one number per seed."""

    def __init__(self, scores: pd.DataFrame) -> None:
        scored = where(scores, given="input", by="task")
        self.resid = where(scored, kind="resid", metric=AGREED)
        self.head = where(scored, kind="head", metric=AGREED)
        self.ari = where(scored, kind="resid", metric="ari")
        self.model = where(scores, kind="model", metric="accuracy")
        self.layers = [int(layer) for layer in sorted(self.resid["layer"].unique())]
        self.steps = [int(step) for step in sorted(self.resid["step"].unique())]

    def agreed(self, split: str, layer: int, step: int, column: str = "value") -> np.ndarray:
        """Agreement across wordings, or with ``null_mean`` that of permuted wordings."""
        rows = where(self.resid, split=split, layer=layer, step=step)
        return rows.sort_values(by="seed")[column].to_numpy()

    def plain(self, split: str, layer: int, step: int, column: str = "value") -> np.ndarray:
        """ARI including pairs of one wording, or with ``null_mean`` that of permuted wordings."""
        rows = where(self.ari, split=split, layer=layer, step=step)
        return rows.sort_values(by="seed")[column].to_numpy()

    def largest(self, split: str, layer: int) -> np.ndarray:
        """Largest agreement of a layer at any checkpoint."""
        return where(self.resid, split=split, layer=layer).groupby("seed")["value"].max().to_numpy()

    def accuracy(self, split: str, column: str = "value") -> np.ndarray:
        """Final accuracy, or with ``null_mean`` the best answer from the input alone."""
        rows = where(self.model, split=split, step=self.steps[-1])
        return rows.sort_values(by="seed")[column].to_numpy()

    def with_depth(self, step: int) -> np.ndarray:
        """Rank correlation of agreement with layer."""
        rows = where(self.resid, split=UNSEEN, step=step)
        return rank_correlations(rows, "layer", "value", by="seed").to_numpy()

    def with_accuracy(self, layer: int) -> np.ndarray:
        """Rank correlation of agreement with accuracy over checkpoints."""
        accuracy = where(self.model, split=UNSEEN)[["seed", "step", "value"]]
        rows = where(self.resid, split=UNSEEN, layer=layer)
        both = rows.merge(accuracy, on=["seed", "step"], suffixes=("", "_accuracy"))
        return rank_correlations(both, "value_accuracy", "value", by="seed").to_numpy()

    def heads(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Agreement on unseen strings: best head, median head, best head before training."""
        first, last = self.steps[0], self.steps[-1]
        found = []
        for _, rows in self.head.groupby("seed"):
            by_site = rows.pivot_table("value", "site", ["split", "step"])
            best = by_site[CHOOSING, last].idxmax()
            final, untrained = by_site[UNSEEN, last], by_site[UNSEEN, first]
            found.append((final.loc[best], final.median(), untrained.loc[best]))
        best_head, median, before = np.array(found, dtype=float).T
        return best_head, median, before


def claims(scores: pd.DataFrame) -> list[lc.Claim]:
    """Decide the claims; each value is one seed."""
    seen = Curves(scores)
    bottom, top, first, last = seen.layers[0], seen.layers[-1], seen.steps[0], seen.steps[-1]
    middle = min(seen.steps[:-1], key=lambda step: abs(step - last / 2))
    final, untrained = seen.agreed(UNSEEN, top, last), seen.agreed(UNSEEN, top, first)
    null = {
        "wordings relabelled": seen.agreed(UNSEEN, top, last, "null_mean").mean(),
        "ARI": seen.plain(UNSEEN, top, last).mean(),
        "ARI, wordings relabelled": seen.plain(UNSEEN, top, last, "null_mean").mean(),
    }
    rise = final - untrained
    kept, never = seen.plain(UNSEEN, top, last), seen.plain("new_regex", top, last)
    head, typical, head_before = seen.heads()
    of_layers, of_steps = correlation(of=len(seen.layers)), correlation(of=len(seen.steps))
    return [
        decide(
            "rises",
            "Clustering by task rises with training (agreement across wordings, last layer, unseen "
            "strings, within input)",
            rise,
            control={"untrained model": untrained.mean()} | null,
            at_least=0,
            margin=SMALL,
            scale=AGREEMENT.gain,
            **PAPER,
        ),
        decide(
            "saturates",
            "The rise of clustering by task saturates: its second half adds less than that of a "
            "steady rise (agreement across wordings)",
            (final - seen.agreed(UNSEEN, top, middle)) / np.where(rise == 0, np.nan, rise),
            control={"share of a steady rise": 1 - middle / last},
            at_most=1 - middle / last,
            margin=SMALL,
            **PAPER,
        ),
        decide(
            "clusters",
            "After training the last layer clusters unseen strings by task (agreement across "
            "wordings, within input)",
            final,
            control={"untrained model": untrained.mean()} | null,
            at_least=0,
            margin=SMALL,
            scale=AGREEMENT,
            **PAPER,
        ),
        decide(
            "nearly-all",
            "After training the last layer clusters nearly all unseen strings by task (agreement "
            "across wordings at least 0.85)",
            final,
            control=null,
            at_least=0.85,
            scale=AGREEMENT,
            **OURS,
        ),
        decide(
            "deeper",
            "Deeper layers cluster more by task (rank correlation of agreement across wordings "
            "with layer)",
            seen.with_depth(last),
            control={"untrained model": seen.with_depth(first).mean()},
            at_least=0,
            margin=WEAK,
            scale=of_layers,
            **PAPER,
        ),
        decide(
            "embedding-flat",
            "The embedding layer does not cluster by task (largest agreement of layer 0 at any "
            "checkpoint)",
            seen.largest(UNSEEN, bottom),
            control={"wordings relabelled": seen.agreed(UNSEEN, bottom, last, "null_mean").mean()},
            at_most=0.05,
            scale=AGREEMENT,
            **PAPER,
        ),
        decide(
            "unseen-strings",
            "The model answers unseen strings of known expressions (accuracy above the best answer "
            "from the input alone)",
            seen.accuracy(UNSEEN) - seen.accuracy(UNSEEN, "null_mean"),
            control={
                "accuracy": seen.accuracy(UNSEEN).mean(),
                "best answer from the input alone": seen.accuracy(UNSEEN, "null_mean").mean(),
            },
            at_least=0,
            margin=SMALL,
            scale=SHARE.gain,
            **PAPER,
        ),
        decide(
            "unseen-strings-all",
            "The model answers nearly all unseen strings of known expressions (accuracy at least "
            "0.97)",
            seen.accuracy(UNSEEN),
            control={"best answer from the input alone": seen.accuracy(UNSEEN, "null_mean").mean()},
            at_least=0.97,
            scale=SHARE,
            **OURS,
        ),
        decide(
            "unseen-expressions",
            "The model fails on expressions never trained on (accuracy above the best answer from "
            "the input alone)",
            seen.accuracy("new_regex") - seen.accuracy("new_regex", "null_mean"),
            control={
                "accuracy": seen.accuracy("new_regex").mean(),
                "best answer from the input alone": seen.accuracy("new_regex", "null_mean").mean(),
            },
            at_most=0.1,
            scale=SHARE.gain,
            **OURS,
        ),
        decide(
            "unclustered-expressions",
            "States of expressions never trained on cluster less by task than those of unseen "
            "strings (ARI lost; with one expression per task it includes pairs of one wording)",
            kept - never,
            control={
                "unseen strings": kept.mean(),
                "unseen expressions": never.mean(),
                "wordings relabelled": seen.plain("new_regex", top, last, "null_mean").mean(),
            },
            at_least=0.5,
            scale=AGREEMENT.gain,
            **OURS,
        ),
        decide(
            "unseen-pairs",
            "Known expressions are answered with inputs that their task showed only with another "
            "expression (accuracy above the best answer from the input alone)",
            seen.accuracy("new_pair") - seen.accuracy("new_pair", "null_mean"),
            control={
                "accuracy": seen.accuracy("new_pair").mean(),
                "best answer from the input alone": seen.accuracy("new_pair", "null_mean").mean(),
                "ARI of their states": seen.plain("new_pair", top, last).mean(),
            },
            at_least=0,
            margin=SMALL,
            scale=SHARE.gain,
            **OURS,
        ),
        decide(
            "tracks-accuracy",
            "Clustering and accuracy rise together over checkpoints (rank correlation)",
            seen.with_accuracy(top),
            control={"layer 0": seen.with_accuracy(bottom).mean()},
            at_least=0,
            margin=WEAK,
            scale=of_steps,
            **PAPER,
        ),
        decide(
            "heads",
            "Few heads carry the task: the best head, chosen on other prompts, clusters more than "
            "the median head (agreement across wordings)",
            head - typical,
            control={"median head": typical.mean(), "same head untrained": head_before.mean()},
            at_least=0,
            margin=SMALL,
            scale=AGREEMENT.gain,
            **OURS,
        ),
    ]


def pictures(scores: pd.DataFrame, states: pd.DataFrame) -> dict[str, Any]:
    """The study's figures, by file name."""
    seen = Curves(scores)
    last = seen.steps[-1]
    unseen = where(seen.resid, split=UNSEEN)
    together = where(scores, metric="ari", kind="resid", given="none", step=last)
    found = {
        "task_by_layer": figures.curves(
            unseen,
            color="step",
            title="Clustering by task, layer by layer over training",
            caption=f"Agreement across wordings on unseen strings, {_GIVEN}.",
            y_title="agreement across wordings",
        ),
        "task_over_training": figures.curves(
            unseen,
            x="step",
            color="layer",
            title="Clustering by task over training",
            caption=f"Agreement across wordings on unseen strings, {_GIVEN}.",
            y_title="agreement across wordings",
        ),
        "task_or_wording": figures.curves(
            _beside_null(unseen, where(seen.ari, split=UNSEEN)),
            color="score",
            facet="step",
            band=None,
            title="Task or wording: ARI, its null and agreement across wordings",
            caption="ARI counts rows of one expression, which recognition of the expression gives; "
            "its null permutes whole expressions over tasks. Unseen strings, within input.",
            y_title="agreement",
        ),
        "splits": figures.curves(
            where(seen.ari, layer=seen.layers[-1]),
            x="step",
            color="split",
            title="The last layer on each split",
            caption=f"ARI at the last layer, {_GIVEN}; the band permutes expressions over tasks.",
            y_title="ARI",
        ),
        "accuracy": figures.curves(
            seen.model,
            x="step",
            color="split",
            band=None,
            title="Accuracy on each split",
            caption="Exact match of the answer; new_regex cannot be known and is the control.",
            y_title="accuracy",
        ),
        "heads": figures.head_map(
            where(seen.head, split=UNSEEN, step=last),
            title="Which heads carry the task",
            caption="Agreement across wordings of each head's contribution to the residual stream, "
            "unseen strings, within input, after training.",
        ),
        "task_and_input": figures.curves(
            together,
            color="by",
            title="All prompts together: task against input",
            caption="k-means over all unseen strings with as many clusters as tasks, after "
            "training. At the answering token the state encodes both.",
            y_title="ARI",
        ),
        "clusters": figures.scatter(
            where(states, seed=states["seed"].min()),
            title="The states of one input, by layer",
            caption="Two principal components of each layer after training, unseen strings.",
            tooltip=("instruction", "template", "input"),
        ),
    }
    by_output = where(scores, metric="ari", kind="resid", given="input", split=UNSEEN, step=last)
    if by_output["by"].nunique() > 1:
        found["task_or_output"] = figures.curves(
            by_output,
            color="by",
            title="Task or answer: what do the clusters follow?",
            caption="The same partitions scored against the task and against its output.",
            y_title="ARI",
        )
    return found


def _beside_null(agreed: pd.DataFrame, ari: pd.DataFrame) -> pd.DataFrame:
    """ARI, its mean under permuted expressions, and agreement across wordings."""
    shown = ari["step"].isin(_few(sorted(ari["step"].unique())))
    ari = ari[shown]
    parts = {
        "across wordings": agreed[agreed["step"].isin(ari["step"].unique())],
        "ARI": ari,
        "ARI, permuted expressions": ari.assign(value=ari["null_mean"]),
    }
    return pd.concat([rows.assign(score=name) for name, rows in parts.items()])


def _few(steps: list[Any]) -> list[Any]:
    """The first, a middle and the last step."""
    return [steps[0], steps[len(steps) // 2], steps[-1]]


def views(scores: pd.DataFrame, states: pd.DataFrame, heads: pd.DataFrame) -> dict[str, View]:
    """The interactive views of the page, by file name."""
    agreed = Curves(scores).resid
    return {
        "clusters": ClusterView.from_frame(
            states,
            labels=LABELS,
            title="The states of unseen strings, by layer and over training",
            caption="Two principal components of each layer at each checkpoint (first seed), "
            "aligned to the previous ones by an orthogonal map. The score is that of k-means in "
            "all dimensions, within input, not of the picture.",
            scores=where(agreed, split=UNSEEN, seed=0),
            score_name="agreement across wordings",
        ),
        "heads": HeadView.from_json(json.loads(heads["view"].iloc[0]), where="emergence"),
    }
