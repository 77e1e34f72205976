"""The figures of the study of head patterns."""

from __future__ import annotations

from typing import Any

import pandas as pd

from lensclust import figures
from studies.head_patterns.mixes import DRAWN, EVEN, FITTED, LEAST, OWN, PARTS, RANDOM, SIMILAR
from studies.head_patterns.scores import RAW
from studies.scores import where

BASES = ("parts", "parts of other tasks", "controls", "shared", "random", "permuted")


# Claims that each figure shows.
SHOWS = {
    "alike": ["task-over-seed*", "tuning-separates*"],
    "growth": ["less-concentrated*", "growing-heads-cluster*"],
    "composition": ["composition*"],
    "speed": ["few-samples*", "pattern-before-loss*"],
    "applications": ["fitted-over-*", "similar-examples"],
    "clusters": ["growing-heads-cluster*"],
}


def pictures(scores: pd.DataFrame) -> dict[str, Any]:
    """The study's figures, by file name."""
    names = {"synthetic": "trained here", "pretrained": "pretrained"}
    named = scores.assign(part=scores["part"].map(names))
    shown = where(named, part=[name for name in names.values() if name in set(named["part"])])
    own = where(named, part="trained here")
    arms = _means(where(own, metric="accuracy", method=_arms(own)), ["method"])
    last = where(own, metric=["ari", "growth"])
    found = {
        "learned": figures.bars(
            _learned(where(shown, metric="learned")),
            name="method",
            facet="part",
            title="Accuracy before and after tuning",
            caption="Accuracy on test prompts, mean over tasks and runs.",
            value_title="accuracy",
        ),
        "alike": figures.bars(
            _means(_staged(where(shown, metric="similarity")), ["part", "method"]),
            name="method",
            facet="part",
            title="Similarity of patterns of two runs",
            caption="Correlation over heads; runs differ in batches and prompts.",
            value_title="correlation",
        ),
        "composition": figures.bars(
            _ordered(_means(where(shown, metric="r2_out", form=RAW), ["part", "method"]), BASES),
            name="method",
            facet="part",
            title="A complex task's change as a combination of other tasks' changes",
            caption="R² over held-out layers.",
            value_title="R²",
        ),
        "speed": figures.curves(
            _means(where(shown, metric="way so far"), ["part", "method", "samples"]),
            x="samples",
            color="method",
            facet="part",
            band=None,
            title="Speed of patterns and loss",
            caption="Share of the change to the last checkpoint, mean over tasks and runs.",
            y_title="share of the change",
        ),
        "applications": figures.bars(
            _ordered(arms, _arms(own)),
            name="method",
            title="Training before a scarce complex task",
            caption="Accuracy on the complex task, mean over tasks; equal numbers of prompts.",
            value_title="accuracy",
        ),
        "growth": figures.head_map(
            where(last, metric="growth"),
            title="Heads that gain activation",
            caption="Change of the share of all activation, tuned on all basic tasks evenly.",
            value_title="share gained",
        ),
        "clusters": figures.head_map(
            where(last, metric="ari"),
            title="Heads that cluster by task",
            caption="ARI in the model tuned on all basic tasks evenly.",
            value_title="ARI",
        ),
    }
    return found


def _arms(rows: pd.DataFrame) -> list[str]:
    there = set(rows["method"].dropna())
    order = (FITTED, EVEN, RANDOM, PARTS, OWN, SIMILAR, DRAWN, LEAST)
    return [name for name in order if name in there]


def _learned(rows: pd.DataFrame) -> pd.DataFrame:
    kinds = rows["kind"].drop_duplicates()
    order = [f"{kind}, {stage}" for stage in ("after", "before") for kind in kinds]
    named = _ordered(rows.assign(method=rows["kind"] + ", " + rows["stage"]), order)
    return _means(named, ["part", "method"])


def _staged(rows: pd.DataFrame) -> pd.DataFrame:
    order = [
        f"{method}, {stage}"
        for stage in ("after", "before")
        for method in ("same task", "other tasks", "dealt")
    ]
    return _ordered(rows.assign(method=rows["method"] + ", " + rows["stage"]), order)


def _ordered(rows: pd.DataFrame, order: Any) -> pd.DataFrame:
    """Rows in the given order: figures colour the first series."""
    kept = where(rows, method=list(order))
    return kept.assign(method=pd.Categorical(kept["method"], list(order))).sort_values("method")


def _means(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    table = rows.groupby(["seed", *by], sort=False, observed=True)["value"].mean().reset_index()
    return table.astype({"method": str}) if "method" in table else table
