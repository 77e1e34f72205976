"""The scores of one part of the study of head patterns as one number a seed, or a task."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from studies.frames import where

PAPER: dict[str, Any] = {"source": "Zhao et al., arXiv 2409.15820", "origin": "reconstruction"}
OURS: dict[str, Any] = {"source": "this project", "origin": "extension"}


class Part:
    """Scores of one part as one number a seed or, of one model, one a task."""

    def __init__(self, scores: pd.DataFrame, part: str, unit: str) -> None:
        self.scores = where(scores, part=part)
        self.unit = unit
        self.over: dict[str, Any] = {"unit": unit}
        if unit == "task":
            self.over["n_seeds"] = int(where(self.scores, metric="activation")["run"].nunique())

    def values(self, **labels: Any) -> pd.Series:
        """Mean of the rows with these labels by seed or task."""
        rows = where(self.scores, **labels)
        return rows.groupby(self.unit)["value"].mean()

    def gaps(self, stage: str) -> pd.Series:
        """Similarity of one task's patterns above that of two tasks', before or after tuning.

        By seed; of one model by ordered pair of tasks, which share tasks.
        """
        same = self.values(metric="similarity", method="same task", stage=stage)
        if self.unit != "task":
            return same - self.values(metric="similarity", method="other tasks", stage=stage)
        rows = where(self.scores, metric="similarity", method="pair", stage=stage)
        pairs = rows.groupby(["task", "other"])["value"].mean()
        return same.reindex(pairs.index, level="task") - pairs

    def over_pairs(self, gaps: pd.Series) -> dict[str, Any]:
        """Units of what `gaps` gives."""
        if self.unit != "task":
            return self.over
        pairs = np.array(gaps.index.to_list(), dtype=str)
        return {"units": {"task": pairs}, "n_seeds": self.over["n_seeds"]}

    def mean(self, **labels: Any) -> float:
        return float(self.values(**labels).mean())
