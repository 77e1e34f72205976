"""The figures of the study of single components and their reweighting."""

from __future__ import annotations

from typing import Any

import pandas as pd

from lensclust import figures
from studies.scales import AGREED
from studies.scores import where

# Claims that each figure shows.
SHOWS = {
    "kinds": ["kinds", "best-component", "worst-component"],
    "heads": ["best-component", "worst-component"],
    "steadiness": ["steady-*", "twins-differ"],
    "methods": ["over-*", "labels-matter", "converged", "muted"],
    "head_clusters": ["task-heads"],
    "over_training": ["none-untrained", "components-first", "reweighting-half-trained"],
    "trained_*": ["task-heads-trained"],
}


def pictures(scores: pd.DataFrame) -> dict[str, Any]:
    """The study's figures, by file name."""
    own = where(scores, part="synthetic")
    last = where(own, step=own["step"].max())
    methods = [name for name in own["method"].dropna().unique() if name.startswith("reweighting")]
    lines = ["model", "best component", "worst component", *[m for m in methods if "," not in m]]
    found = {
        "over_training": figures.curves(
            where(own, metric="accuracy", method=lines),
            x="step",
            color="method",
            band=None,
            title="Components and the model over training",
            caption="Accuracy on unseen strings; best and worst are chosen on other prompts.",
            y_title="accuracy",
        ),
        "trained_heads": figures.head_map(
            where(last, metric="component accuracy", kind="head"),
            title="Single heads of the trained models",
            caption="Accuracy on unseen strings, mean over seeds.",
            value_title="accuracy",
        ),
        "trained_clusters": figures.head_map(
            where(last, metric=AGREED),
            title="Heads of the trained models that cluster by task",
            caption="ARI within input, mean over seeds.",
            value_title="ARI",
        ),
    }
    return found | (_pretrained(scores) if "pretrained" in set(scores["part"]) else {})


def _pretrained(scores: pd.DataFrame) -> dict[str, Any]:
    rows = where(scores, part="pretrained")
    by = ["data", "seed", "method"]
    accuracy = _means(where(rows, metric="accuracy"), by)
    shown = [m for m in accuracy["method"].unique() if "," not in m]
    # The measurement first: figures colour it.
    order = sorted(shown, key=lambda m: (not m.startswith("reweighting"), shown.index(m)))
    accuracy = accuracy[accuracy["method"].isin(order)]
    accuracy = accuracy.assign(method=pd.Categorical(accuracy["method"], order))
    heads = where(rows, metric="component accuracy", kind="head")
    return {
        "methods": figures.bars(
            accuracy.sort_values(["data", "method"]),
            name="method",
            facet="data",
            title="Uses of labelled examples",
            caption="Accuracy, mean over templates; numbers are labelled examples.",
            value_title="accuracy",
        ),
        "heads": figures.head_map(
            _means(heads, ["data", "seed", "block", "head"]),
            facet="data",
            title="Heads alone",
            caption="Accuracy, mean over templates and seeds.",
            value_title="accuracy",
        ),
        "head_clusters": figures.head_map(
            where(rows, metric="ari", method="model"),
            title="Heads that cluster by task",
            caption="ARI of prompts of all sets with one template.",
            value_title="ARI",
        ),
        "steadiness": figures.bars(
            _means(where(rows, metric="correlation"), by),
            name="method",
            facet="data",
            title="Stability of component accuracies",
            caption="Correlation over heads and MLPs between two sets of prompts.",
            value_title="correlation",
        ),
        "kinds": figures.bars(
            _means(where(rows, metric="share", method="model"), ["data", "seed", "type"]),
            name="type",
            facet="data",
            title="Kinds of components",
            caption="Share of heads and MLPs.",
            value_title="share",
        ),
    }


def _means(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    return rows.groupby(by, sort=False)["value"].mean().reset_index()
