"""The figures and interactive views of the study of unseen instances."""

from __future__ import annotations

from typing import Any

import pandas as pd

from lensclust import figures
from lensclust.report.views import ClusterView
from studies.scales import AGREED
from studies.scores import where
from studies.synthetic_task import LABELS, UNSEEN
from studies.unseen.options import ANSWER, INSTRUCTION

# Claims that each figure shows.
SHOWS = {
    "membership": ["nearest-centroid", "membership-*", "tracks-accuracy"],
    "inside_and_outside": ["margin", "new-pairs-elsewhere", "nearest-centroid"],
    "moved": ["transport", "random-moves", "input-conditional"],
    "moved_early": ["instruction-end"],
    "erased": ["erase*"],
    "pretrained_moved": ["pretrained-*"],
    "pretrained_clusters": ["pretrained-layers"],
}


def views(scores: pd.DataFrame, states: pd.DataFrame) -> dict[str, ClusterView]:
    """The interactive views of the page, by file name."""
    agreed = where(scores, metric=AGREED, split=UNSEEN, seed=0, part="synthetic")
    return {
        "clusters": ClusterView.from_frame(
            states,
            labels=("answered", *LABELS),
            title="Unseen strings by layer and over training, and their answers after training",
            caption="Two principal components of each layer at each checkpoint (first seed), "
            "aligned to the previous ones by an orthogonal map. Answers are those after training. "
            "The score is that of k-means in all dimensions, within input, not of the picture.",
            scores=agreed,
            score_name="agreement across wordings",
        )
    }


def pictures(scores: pd.DataFrame) -> dict[str, Any]:
    """The study's figures, by file name."""
    own = where(scores, part="synthetic")
    last = where(own, step=own["step"].max())
    moved = where(last, metric="target", fold="report")
    found = {
        "moved": figures.curves(
            where(moved, position=ANSWER),
            color="method",
            band=None,
            title="States moved to another task's cluster",
            caption="Share of the other task's answers; unseen strings, answering token.",
            y_title="target answers",
        ),
        "moved_early": figures.curves(
            where(moved, position=INSTRUCTION),
            color="method",
            band=None,
            title="Moved at the end of the instruction",
            caption="Share of the other task's answers, before the input is read.",
            y_title="target answers",
        ),
        "erased": figures.curves(
            where(last, metric="accuracy left", position=ANSWER, fold="report"),
            color="method",
            band=None,
            title="Accuracy left when task identity is erased",
            caption="Accuracy on unseen strings after LEACE at one layer, answering token; the "
            "random subspace removes as much variance, reassigned labels are tasks permuted over "
            "expressions.",
            y_title="accuracy",
        ),
        "membership": figures.curves(
            where(last, metric="membership"),
            color="split",
            band=None,
            title="Is the nearest training centroid the right one?",
            caption="Share of prompts, within input, after training.",
            y_title="in own cluster",
        ),
        "inside_and_outside": figures.curves(
            where(
                where(own, split=UNSEEN, layer=own["layer"].max()),
                metric=["accuracy, right cluster", "accuracy, wrong cluster"],
            ),
            x="step",
            color="metric",
            band=None,
            title="Accuracy inside and outside the task's cluster",
            caption="Unseen strings over training, last layer.",
            y_title="accuracy",
        ),
    }
    if "pretrained" in set(scores["part"]):
        theirs = where(scores, part="pretrained")
        found["pretrained_moved"] = figures.curves(
            where(theirs, metric="target")
            .groupby(["method", "layer"], sort=False)["value"]
            .mean()
            .reset_index(),
            color="method",
            band=None,
            title="Few-shot word tasks moved into each other",
            caption="Share of the other task's answers, mean over ordered pairs.",
            y_title="target answers",
        )
        found["pretrained_clusters"] = figures.curves(
            where(theirs, metric=["ari", "1nn_accuracy"], method="model"),
            color="metric",
            title="Where few-shot prompts cluster by task",
            caption="ARI within query, and accuracy of the nearest neighbour with another query; "
            "bands: permuted labels.",
            y_title="score",
        )
    return found
