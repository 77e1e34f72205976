"""The scores of the identity pre-training study as one row a run, and as one number a seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy.integrate import trapezoid

from studies.frames import where
from studies.phases import NAMING, TASK
from studies.scales import AGREED
from studies.small_models import UNSEEN

THRESHOLDS = (0.5, 0.9, 0.97)
# What is equal in a comparison -> the column that counts it.
TOTAL, OF_TASK = "all steps", "steps of the task"
BUDGETS = {TOTAL: "step", OF_TASK: "task_step"}
_CONDITION = ["purpose", "n_layers", "n_tasks", "share", "seed"]


def summary(scores: pd.DataFrame) -> pd.DataFrame:
    """One row a run, split, ``budget`` and metric.

    The budget, ``of`` so many steps, is what all arms have: all steps, or those of phase 2.
    Metrics: ``final accuracy``; ``mean accuracy`` over the budget, where steps before the task
    count as zero; and ``steps to T``, restricted: the whole budget where T is not reached, which
    ``reached`` tells.
    """
    runs = where(scores, metric="accuracy", kind=TASK)
    found = []
    for condition, rows in runs.groupby(_CONDITION):
        labels = dict(zip(_CONDITION, condition, strict=True))
        caps = {
            TOTAL: int(rows["step"].max()),
            OF_TASK: int(rows.groupby("arm")["task_step"].max().min()),
        }
        for (arm, split), run in rows.groupby(["arm", "split"]):
            for budget, column in BUDGETS.items():
                measured = _within(run, column, caps[budget])
                at = {"arm": arm, "split": split, "budget": budget, "of": caps[budget]}
                found += [{**labels, **at, "kind": "summary", **row} for row in measured]
    return pd.DataFrame(found)


def _within(run: pd.DataFrame, column: str, cap: int) -> list[dict[str, Any]]:
    run = run[run[column] <= cap].sort_values("step").drop_duplicates(column)
    steps, accuracy = run[column].to_numpy(dtype=float), run["value"].to_numpy()
    rows = [
        {"metric": "final accuracy", "value": float(accuracy[-1])},
        {"metric": "mean accuracy", "value": float(trapezoid(accuracy, steps) / cap)},
    ]
    for threshold in THRESHOLDS:
        there = steps[accuracy >= threshold]
        reached = there.size > 0
        value = float(there[0]) if reached else float(cap)
        rows.append({"metric": f"steps to {threshold:g}", "value": value, "reached": reached})
    return rows


class Runs:
    """The scores as one number a seed."""

    def __init__(self, scores: pd.DataFrame, table: pd.DataFrame) -> None:
        self.table = table
        clusters = where(scores, metric=AGREED, purpose="arms")
        self.clusters = clusters.sort_values(["seed", "step"])
        self.top = int(clusters["layer"].max())
        self.names = where(scores, metric="ari of names").sort_values("seed")["value"].to_numpy()

    def value(
        self, metric: str, arm: str, budget: str = TOTAL, *, column: str = "value", **labels: Any
    ) -> np.ndarray:
        """A metric of one arm, by seed."""
        chosen = {"purpose": "arms", "split": UNSEEN, **labels}
        rows = where(self.table, metric=metric, arm=arm, budget=budget, **chosen)
        return rows.sort_values("seed")[column].to_numpy(dtype=float)

    def gain(
        self, metric: str, arm: str, control: str, budget: str = TOTAL, **labels: Any
    ) -> np.ndarray:
        """A metric of one arm above another's."""
        return self.value(metric, arm, budget, **labels) - self.value(
            metric, control, budget, **labels
        )

    def saved(self, threshold: float, arm: str, control: str, budget: str) -> np.ndarray:
        """Steps an arm needs less than another; NaN if no run of either gets there."""
        metric = f"steps to {threshold:g}"
        reached = [self.reached(threshold, each, budget) for each in (arm, control)]
        fewer = -self.gain(metric, arm, control, budget)
        return fewer if sum(reached) else np.full_like(fewer, np.nan)

    def reached(self, threshold: float, arm: str, budget: str) -> int:
        """Number of seeds in which an arm reaches a threshold."""
        found = self.value(f"steps to {threshold:g}", arm, budget, column="reached")
        return int(found.sum())

    def named(self, arm: str) -> np.ndarray:
        """Agreement of the last layer at the end of phase 1."""
        rows = where(self.clusters, arm=arm, kind=NAMING, layer=self.top)
        return rows.groupby("seed")["value"].last().to_numpy()

    def lowest_after(self, arm: str) -> np.ndarray:
        """Lowest agreement of the last layer at any checkpoint of phase 2."""
        rows = where(self.clusters, arm=arm, kind=TASK, layer=self.top)
        return rows.groupby("seed")["value"].min().to_numpy()

    def ended(self, arm: str) -> np.ndarray:
        """Agreement of the last layer at the end."""
        rows = where(self.clusters, arm=arm, layer=self.top)
        return rows.groupby("seed")["value"].last().to_numpy()

    def by_share(self, arm: str) -> pd.DataFrame:
        """Final accuracy at equal total steps: a row a seed, a column a share of the examples."""
        rows = where(
            self.table,
            metric="final accuracy",
            budget=TOTAL,
            arm=arm,
            split=UNSEEN,
            purpose=["arms", "examples"],
        )
        return rows.pivot(index="seed", columns="share", values="value")

    def examples_to(self, threshold: float, arm: str) -> np.ndarray:
        """Share of the examples at which final accuracy is so high, on a logarithmic scale.

        Interpolated between the shares; the least or the largest of them where the accuracy is
        higher or lower throughout.
        """
        table = self.by_share(arm)
        shares = np.log2(table.columns.to_numpy(dtype=float))
        # More examples never need more: noise that says so is taken out before reading off.
        rising = np.maximum.accumulate(table.to_numpy(), axis=1)
        return np.array([2 ** np.interp(threshold, row, shares) for row in rising])


def conditions(table: pd.DataFrame) -> pd.DataFrame:
    """Final accuracy of named above from-scratch models in the search, a row a run and budget."""
    rows = where(table, purpose="search", split=UNSEEN, metric="final accuracy")
    keys = ["n_layers", "n_tasks", "share", "seed", "budget"]
    arms = rows.pivot(index=keys, columns="arm", values="value")
    return (arms["identity"] - arms["scratch"]).rename("value").reset_index()
