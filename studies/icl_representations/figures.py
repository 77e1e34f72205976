"""The figures of the study of what demonstrations change."""

from __future__ import annotations

from typing import Any

import pandas as pd

from lensclust import figures
from studies.icl_representations.options import QUESTIONS, WORDS
from studies.icl_representations.prompts import KINDS
from studies.icl_representations.words import TESTED
from studies.scores import where

# Claims that each figure shows.
SHOWS = {
    "behaviour": ["behaviour-*", "right-demonstrations"],
    "alignment": ["alignment-*"],
    "decodability": ["decodability-*", "name-over-activity"],
    "attention": ["attention-*"],
    "links": ["link-*", "conditions-*"],
    "patching": ["one-position"],
    "cuts": ["answers-seen"],
    "neighbours": ["neighbours"],
    "kinds": ["one-cluster", "kinds-apart", "sharper"],
    "vectors": ["*-vector"],
}


def pictures(scores: pd.DataFrame) -> dict[str, Any]:
    """The study's figures, by file name."""
    return _questions(where(scores, part=QUESTIONS)) | _words(where(scores, part=WORDS))


def _questions(rows: pd.DataFrame) -> dict[str, Any]:
    answer = {task: kind.answer for task, kind in KINDS.items()}
    of_answer = rows[rows["hypothesis"] == rows["task"].map(answer)]
    links = where(rows, metric="link", controlled=True)
    unweighted = ["alignment", "decodability", "attention ratio"]
    return {
        "behaviour": figures.bars(
            _means(where(rows, metric="confidence"), ["task", "seed", "variant"]),
            name="variant",
            facet="task",
            title="Right answers with and without demonstrations",
            caption="Log probability of the answer (of an activity: its first token), mean over "
            "wordings and conditions; 'wrong': demonstrations with shuffled answers.",
            value_title="nats",
        ),
        "alignment": figures.curves(
            _layers(
                where(of_answer, metric="alignment", controlled=True, method="answer"), ["variant"]
            ),
            color="variant",
            facet="task",
            title="Alignment with the hypothesis of the answer",
            caption="Spearman's rho, lengths and wordings partialled out, at the last token.",
            y_title="rho",
        ),
        "decodability": figures.curves(
            _layers(where(rows, metric="decodability"), ["variant"]),
            color="variant",
            facet="task",
            title="Decodability of the answer",
            caption="Balanced accuracy of a ridge probe on held-out names (intercepts).",
            y_title="accuracy",
        ),
        "attention": figures.curves(
            _layers(where(rows, metric="log ratio", method="attention"), ["variant"]),
            color="variant",
            facet="task",
            title="Attention to the relevant part",
            caption="Log ratio to the irrelevant part, last token, within the query; the band: "
            "random spans.",
            y_title="log ratio",
        ),
        "links": figures.curves(
            where(links, method=unweighted)[["seed", "task", "layer", "method", "value"]],
            color="method",
            facet="task",
            band=None,
            title="Changes of states and attention against changes of answers",
            caption="Partial rank correlation over prompts, controlled for wording, condition and "
            "lengths.",
            y_title="correlation",
        ),
        "patching": figures.curves(
            where(rows, metric="patched")[["seed", "layer", "method", "value"]],
            color="method",
            band=None,
            title="One state patched at the last token",
            caption="Log probability of the right answer gained; 'others' is a mean over other "
            "questions, 'own, none' is patched into the prompt with demonstrations.",
            y_title="nats",
        ),
        "cuts": figures.bars(
            where(rows, metric="cut")[["seed", "method", "value"]],
            name="method",
            title="Attention knockout from the query to demonstrations",
            caption="Change of the right answer's log probability with tokens hidden.",
            value_title="nats",
        ),
    }


def _words(rows: pd.DataFrame) -> dict[str, Any]:
    vectors = where(rows, metric="vector", variant=TESTED).dropna(subset=["layer"])
    near = where(rows, metric="neighbours")
    return {
        "neighbours": figures.curves(
            _means(near, ["seed", "shots", "layer"], ["value", "null_mean"]).assign(null_std=0.0),
            color="shots",
            title="Neighbours of the same task, by number of demonstrations",
            caption="Accuracy of the vote of nearest neighbours with other words, mean over tasks.",
            y_title="accuracy",
        ),
        "kinds": figures.curves(
            where(rows, metric="nearest", controlled=False)[
                ["seed", "layer", "method", "value", "null_mean", "null_std"]
            ],
            color="method",
            title="Instructed or demonstrated: the same task in one place?",
            caption="Share of prompts nearest to their task's mean of the other kind of prompt; "
            "the band: means with permuted names.",
            y_title="share",
        ),
        "vectors": figures.curves(
            _means(vectors, ["seed", "method", "layer"]),
            color="method",
            band=None,
            title="Task and function vectors in prompts without the task",
            caption="Accuracy on words unseen by the vectors, mean over tasks.",
            y_title="accuracy",
        ),
    }


def _layers(rows: pd.DataFrame, labels: list[str]) -> pd.DataFrame:
    return rows[["seed", "task", *labels, "layer", "value", "null_mean", "null_std"]]


def _means(rows: pd.DataFrame, by: list[str], columns: list[str] | None = None) -> pd.DataFrame:
    return rows.groupby(by, sort=False)[columns or ["value"]].mean().reset_index()
