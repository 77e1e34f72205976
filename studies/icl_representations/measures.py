"""Scores of questions and words by seed, for the claims."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from studies.icl_representations.options import NONE, QUESTIONS, SHOWN, WORDS
from studies.icl_representations.words import FITTED, TESTED
from studies.scores import where

BySeed = Float[np.ndarray, " seed"]


@dataclass(frozen=True)
class Questions:
    """Scores of the questions of all seeds."""

    scores: pd.DataFrame

    @classmethod
    def of(cls, scores: pd.DataFrame) -> Questions:
        """Select them from the scores of a run."""
        return cls(where(scores, part=QUESTIONS))

    @property
    def half(self) -> float:
        """The last layer of the lower half."""
        return float(self.scores["layer"].max()) / 2

    def behaviour(self, metric: str, task: str, variant: str) -> BySeed:
        """Mean over wordings and conditions."""
        rows = where(self.scores, metric=metric, task=task, variant=variant)
        return rows.groupby("seed")["value"].mean().to_numpy()

    def gain(self, metric: str, task: str, variant: str = SHOWN) -> BySeed:
        """Change of behaviour by demonstrations."""
        return self.behaviour(metric, task, variant) - self.behaviour(metric, task, NONE)

    def change(
        self, metric: str, task: str, variant: str = SHOWN, *, lower: bool = False, **labels: Any
    ) -> BySeed:
        """Change of a score by demonstrations, mean over layers (or the lower half)."""
        own, none = (self.by_layer(metric, task, each, **labels) for each in (variant, NONE))
        return self.over_layers(own - none, lower=lower)

    def by_layer(self, metric: str, task: str, variant: str, **labels: Any) -> pd.DataFrame:
        """A score ``(seed, layer)``."""
        rows = where(self.scores, metric=metric, task=task, variant=variant, **labels)
        return rows.pivot_table("value", "seed", "layer", dropna=False)

    def links(self, task: str, method: str, *, controlled: bool) -> pd.DataFrame:
        """Correlations over prompts ``(seed, layer)``."""
        rows = where(self.scores, metric="link", task=task, method=method, controlled=controlled)
        return rows.pivot_table("value", "seed", "layer", dropna=False)

    def over_layers(self, table: pd.DataFrame, *, lower: bool = False) -> BySeed:
        """Mean over the layers that have a value; NaN where none has."""
        layers = table.columns.to_numpy(float) <= (self.half if lower else np.inf)
        return table.loc[:, layers].mean(axis=1).to_numpy()

    def over_conditions(self, method: str) -> BySeed:
        """Correlation, over wordings and conditions of all tasks, of change and behaviour.

        The means of tasks are subtracted from both; then the mean over layers.
        """
        rows = where(self.scores, metric="condition change", method=method)
        own = rows[["value", "behaviour"]]
        means = rows.groupby(["seed", "layer", "task"])[["value", "behaviour"]].transform("mean")
        left = pd.concat([rows[["seed", "layer"]], own - means], axis=1)
        found = left.groupby(["seed", "layer"])[["value", "behaviour"]].apply(
            lambda each: each["value"].corr(each["behaviour"])
        )
        return found.groupby("seed").mean().to_numpy()

    def causes(self, metric: str, method: str) -> BySeed:
        """Effect of an edit."""
        rows = where(self.scores, metric=metric, method=method)
        return rows.sort_values("seed")["value"].to_numpy()

    def patched(self, method: str) -> pd.DataFrame:
        """Effect of patching a state ``(seed, layer)``."""
        rows = where(self.scores, metric="patched", method=method)
        return rows.pivot_table("value", "seed", "layer")

    def gap(self) -> BySeed:
        """Effect of demonstrations in the prompts of the causal measures."""
        return where(self.scores, metric="gap").sort_values("seed")["value"].to_numpy()


@dataclass(frozen=True)
class Words:
    """Scores of the word tasks of all seeds."""

    scores: pd.DataFrame

    @classmethod
    def of(cls, scores: pd.DataFrame) -> Words:
        """Select them from the scores of a run."""
        return cls(where(scores, part=WORDS))

    def accuracy(self, kind: str) -> BySeed:
        """Accuracy on the prompts of one kind."""
        rows = where(self.scores, metric="word accuracy", variant=kind)
        return rows.sort_values("seed")["value"].to_numpy()

    def neighbours(self) -> pd.DataFrame:
        """Mean over layers of neighbours' accuracy, and the model's: ``seed, task, shots``."""
        rows = where(self.scores, metric="neighbours")
        by = ["seed", "task", "shots"]
        return rows.groupby(by)[["value", "null_mean", "behaviour"]].mean().reset_index()

    def silhouette(self, kind: str) -> BySeed:
        """Silhouette, mean over layers."""
        rows = where(self.scores, metric="silhouette", variant=kind)
        return rows.groupby("seed")["value"].mean().to_numpy()

    def nearest(self, method: str, column: str = "value", *, centred: bool = False) -> BySeed:
        """Share nearest to their task's mean of another kind, mean over layers."""
        rows = where(self.scores, metric="nearest", method=method, controlled=centred)
        return rows.groupby("seed")[column].mean().to_numpy()

    def vector(self, method: str, *, like: str | None = None) -> BySeed:
        """Accuracy of a vector on held-out queries, mean over tasks.

        At the layer that is best on the other queries, for this method or the one it controls.
        """
        rows = where(self.scores, metric="vector")
        own = where(rows, method=method, variant=TESTED)
        if own["layer"].isna().all():
            return own.groupby("seed")["value"].mean().to_numpy()
        fitted = where(rows, method=like or method, variant=FITTED)
        best = fitted.pivot_table("value", "seed", "layer").idxmax(axis=1)
        table = own.pivot_table("value", "seed", "layer")
        return np.array([table.loc[seed, layer] for seed, layer in best.items()])


def elsewhere_best(effect: pd.DataFrame) -> dict[Any, Any]:
    """Seed -> the layer whose effect is largest in the mean of the other seeds.

    A single seed has no such layer.
    """
    if len(effect) < 2:
        return {}
    others = (effect.sum() - effect) / (len(effect) - 1)
    return others.idxmax(axis=1).to_dict()


def at_layers(table: pd.DataFrame, layers: dict[Any, Any]) -> BySeed:
    """A table ``(seed, layer)`` at one layer a seed; a missing value where there is none."""
    return np.array([table.loc[seed, layers[seed]] if layers else np.nan for seed in table.index])


def mean(values: BySeed) -> float:
    """Over seeds."""
    return float(np.mean(values))
