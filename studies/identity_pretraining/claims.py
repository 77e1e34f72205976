"""The claims and notes of the identity pre-training study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.integrate import trapezoid

import lensclust as lc
from lensclust.results import Scale, decide
from studies.identity_pretraining.options import ARMS, COMPARED
from studies.identity_pretraining.phases import NAMING, TASK
from studies.scales import AGREED, AGREEMENT, SHARE, SMALL
from studies.scores import where
from studies.synthetic_task import LAYER_0, UNSEEN

PAPER: dict[str, Any] = {
    "source": "Wu & Varshney, arXiv 2402.12151",
    "origin": "reconstruction",
}
OURS: dict[str, Any] = {"source": "this project", "origin": "extension"}
GAIN: dict[str, Any] = {"at_least": 0, "margin": SMALL, "scale": SHARE.gain}
CLUSTERED: dict[str, Any] = {"at_least": 0, "margin": SMALL, "scale": AGREEMENT.gain}
# A tenth of a halving of the examples, some 7 % of them.
HALVINGS = 0.1
THRESHOLDS = (0.5, 0.9, 0.97)
# Budget that a comparison equates -> the column that counts it.
TOTAL, OF_TASK = "all steps", "steps of the task"
BUDGETS = {TOTAL: "step", OF_TASK: "task_step"}
_CONDITION = ["purpose", "n_layers", "n_tasks", "share", "seed"]


def claims(scores: pd.DataFrame, table: pd.DataFrame, *, interval: int) -> list[lc.Claim]:
    """Decide the claims; each value is one seed.

    Args:
        interval: steps between two evaluations: a smaller difference counts as none.
    """
    seen = Runs(scores, table)
    data = {arm: seen.by_share(arm).drop(columns=1.0).mean(axis=1).to_numpy() for arm in COMPARED}
    needed = {arm: seen.examples_to(0.5, arm) for arm in COMPARED}
    never = {arm: seen.value("final accuracy", arm, split="new_regex") for arm in COMPARED}
    pairs = {
        arm: seen.value("final accuracy", arm, split="new_pair")
        for arm in ("identity", "auxiliary", "scratch")
    }

    def sooner(id: str, statement: str, arm: str, control: str, **options: Any) -> lc.Claim:
        return _sooner(seen, id, statement, arm, control, interval, **options)

    def higher(
        id: str,
        statement: str,
        arm: str = "identity",
        control: str = "scratch",
        budget: str = TOTAL,
        metric: str = "final accuracy",
        **origin: Any,
    ) -> lc.Claim:
        return decide(
            id,
            statement,
            seen.gain(metric, arm, control, budget),
            control={
                name: seen.value(metric, name, budget).mean()
                for name in dict.fromkeys((arm, *COMPARED))
            },
            **GAIN,
            **(origin or PAPER),
        )

    def throughout(id: str, statement: str, *arms: str, budget: str = TOTAL, **o: Any) -> lc.Claim:
        return higher(id, statement, *arms, budget=budget, metric="mean accuracy", **o)

    return [
        *(
            claim
            for threshold in (0.5, 0.9)
            for claim in (
                sooner(
                    f"sooner-{threshold:g}",
                    f"Naming tasks first saves steps to accuracy {threshold:g} on unseen strings "
                    "against training from scratch (equal total steps)",
                    "identity",
                    "scratch",
                    threshold=threshold,
                    **PAPER,
                ),
                sooner(
                    f"sooner-{threshold:g}-than-shuffled",
                    f"Naming tasks first saves steps to accuracy {threshold:g} on unseen strings "
                    "against shuffled names (equal steps of both phases)",
                    "identity",
                    "shuffled",
                    threshold=threshold,
                    **PAPER,
                ),
                sooner(
                    f"sooner-{threshold:g}-in-phase-2",
                    f"Naming tasks first saves steps to accuracy {threshold:g} on unseen strings "
                    "against training from scratch (equal steps of phase 2)",
                    "identity",
                    "scratch",
                    threshold=threshold,
                    budget=OF_TASK,
                    **PAPER,
                ),
            )
        ),
        higher(
            "higher",
            "Naming tasks first raises final accuracy on unseen strings above training from "
            "scratch (equal total steps)",
        ),
        higher(
            "higher-in-phase-2",
            "Naming tasks first raises final accuracy on unseen strings above training from "
            "scratch (equal steps of phase 2)",
            budget=OF_TASK,
        ),
        # Without a threshold every run counts.
        throughout(
            "higher-throughout",
            "Naming tasks first raises mean accuracy over training on unseen strings above "
            "training from scratch (equal total steps; steps of naming count as 0)",
        ),
        throughout(
            "higher-throughout-than-shuffled",
            "Naming tasks first raises mean accuracy over training on unseen strings above "
            "shuffled names (equal steps of both phases)",
            "identity",
            "shuffled",
        ),
        throughout(
            "higher-throughout-phase-2",
            "Naming tasks first raises mean accuracy over training on unseen strings above "
            "training from scratch (equal steps of phase 2)",
            budget=OF_TASK,
        ),
        sooner(
            "after-instruction",
            "Naming the task right after the instruction saves steps to accuracy 0.9 against "
            "training from scratch (equal total steps)",
            "instruction",
            "scratch",
        ),
        sooner(
            "auxiliary",
            "An auxiliary head that names the task saves steps to accuracy 0.9 against training "
            "from scratch (equal total steps)",
            "auxiliary",
            "scratch",
        ),
        throughout(
            "auxiliary-throughout",
            "An auxiliary head that names the task raises mean accuracy over training above "
            "training from scratch (equal total steps)",
            "auxiliary",
            "scratch",
            **OURS,
        ),
        sooner(
            "own-clusters",
            "Names from a half-trained model's own clusters save steps to accuracy 0.9 against "
            "training from scratch (equal total steps)",
            "own clusters",
            "scratch",
            more={"ARI of those names": seen.names.mean()},
        ),
        sooner(
            "true-names",
            "True names save steps to accuracy 0.9 against names permuted over whole expressions "
            "(equal total steps)",
            "identity",
            "regrouped",
        ),
        decide(
            "pairs",
            "Naming tasks first raises accuracy on new pairs of known expression and input above "
            "training from scratch (equal total steps)",
            pairs["identity"] - pairs["scratch"],
            control={"identity": pairs["identity"].mean(), "scratch": pairs["scratch"].mean()},
            **GAIN,
            **OURS,
        ),
        decide(
            "auxiliary-pairs",
            "An auxiliary head that names the task raises accuracy on new pairs of known "
            "expression and input above training from scratch (equal total steps)",
            pairs["auxiliary"] - pairs["scratch"],
            control={"auxiliary": pairs["auxiliary"].mean(), "scratch": pairs["scratch"].mean()},
            **GAIN,
            **OURS,
        ),
        decide(
            "unknown-expressions",
            "Naming tasks first does not help with expressions never trained on (accuracy above "
            "training from scratch)",
            never["identity"] - never["scratch"],
            control={arm: value.mean() for arm, value in never.items()},
            at_most=0.05,
            scale=SHARE.gain,
            **OURS,
        ),
        decide(
            "named-clusters",
            "Naming alone makes states cluster by task (agreement across wordings at the last "
            "layer, above shuffled names)",
            seen.named("identity") - seen.named("shuffled"),
            control={
                "true names": seen.named("identity").mean(),
                "shuffled names": seen.named("shuffled").mean(),
            },
            **CLUSTERED,
            **OURS,
        ),
        decide(
            "clusters-last",
            "Clusters from naming last through phase 2 (lowest agreement in phase 2 minus half of "
            "that before)",
            seen.lowest_after("identity") - seen.named("identity") / 2,
            control={
                "after naming": seen.named("identity").mean(),
                "lowest in phase 2": seen.lowest_after("identity").mean(),
            },
            **CLUSTERED,
            **OURS,
        ),
        decide(
            "clusters-at-the-end",
            "After naming tasks first the last layer clusters more by task at the end than after "
            "training from scratch (agreement across wordings, equal total steps)",
            seen.ended("identity") - seen.ended("scratch"),
            control={arm: seen.ended(arm).mean() for arm in ARMS},
            **CLUSTERED,
            **OURS,
        ),
        decide(
            "few-examples",
            "Naming tasks first helps where examples are few (final accuracy above training from "
            "scratch, mean over the shares below 1, equal total steps)",
            data["identity"] - data["scratch"],
            control={arm: value.mean() for arm, value in data.items()},
            **GAIN,
            **OURS,
        ),
        decide(
            "fewer-examples",
            "Naming tasks first needs fewer examples for an accuracy of 0.5 (halvings against "
            "training from scratch)",
            np.log2(needed["scratch"] / needed["identity"]),
            control={f"share, {arm}": value.mean() for arm, value in needed.items()},
            at_least=0,
            margin=HALVINGS,
            **OURS,
        ),
    ]


def _sooner(
    seen: Runs,
    id: str,
    statement: str,
    arm: str,
    control: str,
    interval: int,
    *,
    threshold: float = 0.9,
    budget: str = TOTAL,
    more: dict[str, float] | None = None,
    source: str = OURS["source"],
    origin: Any = OURS["origin"],
) -> lc.Claim:
    metric = f"steps to {threshold:g}"
    cap = where(seen.table, purpose="arms", budget=budget)["of"].max()
    beside = {}
    for name in (arm, control):
        beside[f"steps, {name}"] = seen.value(metric, name, budget).mean()
        beside[f"runs that reach it, {name}"] = seen.reached(threshold, name, budget)
    return decide(
        id,
        statement,
        seen.saved(threshold, arm, control, budget),
        control=beside | (more or {}),
        at_least=0,
        # A difference below the distance of two evaluations counts as none, either way.
        margin=float(interval),
        scale=Scale(-float(cap), float(cap), float(interval)),
        source=source,
        origin=origin,
    )


def notes(decided: Sequence[lc.Claim], table: pd.DataFrame) -> list[str]:
    """Caveats for the reader of the page, including where naming does not help."""
    by_verdict = {
        verdict: [claim.id for claim in decided if claim.verdict == verdict]
        for verdict in ("contradicted", "negligible", "inconclusive")
    }
    caps = {
        budget: int(where(table, purpose="arms", budget=budget)["of"].max()) for budget in BUDGETS
    }
    return [
        "The paper's sizes and hyper-parameters are not known to us: tasks, model, training and "
        "what a name is are a reconstruction, so directions are tested, not values.",
        "Sizes, and the way a model's own clusters are found, were chosen on seeds 100 and 101, "
        "not reported here, so that training from scratch is slow and never perfect. They were "
        "not chosen for a claim to hold.",
        "Steps to a threshold are restricted: a run that does not reach it counts with the whole "
        f"budget ({caps[TOTAL]} of {TOTAL}, {caps[OF_TASK]} of {OF_TASK}). Every estimate gives "
        "the number of runs that reach it; where none does the claim stays inconclusive.",
        f"Claims that naming helps which do not hold: contradicted: "
        f"{_listed(by_verdict['contradicted'])}; negligible: {_listed(by_verdict['negligible'])}; "
        f"inconclusive: {_listed(by_verdict['inconclusive'])}.",
        _search(table),
        "With a share of the examples every task and input keeps at least one, and phase 1 still "
        "names all training instructions: names are assumed cheap, answers expensive.",
        LAYER_0,
    ]


def _listed(ids: Sequence[str]) -> str:
    return ", ".join(ids) if ids else "none"


def _search(table: pd.DataFrame) -> str:
    found, told = conditions(table), []
    for budget in BUDGETS:
        cells = where(found, budget=budget).groupby(["n_layers", "n_tasks", "share"])["value"]
        cells = cells.mean().reset_index()
        best = cells.iloc[int(cells["value"].argmax())]
        told.append(
            f"at equal {budget} final accuracy is above that from scratch in "
            f"{int((cells['value'] > 0).sum())} of {len(cells)} conditions, most "
            f"({best['value']:+.2f}) with {best['n_tasks']:g} tasks, {best['n_layers']:g} blocks "
            f"and {percent(best['share'])} of the examples"
        )
    return f"In the search of conditions, {'; '.join(told)}."


def percent(share: float) -> str:
    """A share as a percentage with three significant digits."""
    return f"{100 * share:.3g} %"


def summary(scores: pd.DataFrame) -> pd.DataFrame:
    """One row per run, split, ``budget`` and metric.

    The budget, ``of`` steps, is what all arms share: all steps, or those of phase 2.
    Metrics: ``final accuracy``; ``mean accuracy`` over the budget, where steps before the task
    count as zero; and ``steps to T``, restricted: the whole budget where T is not reached
    (column ``reached``).
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
    """The scores: one number per seed."""

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
        """A metric of one arm minus another's."""
        return self.value(metric, arm, budget, **labels) - self.value(
            metric, control, budget, **labels
        )

    def saved(self, threshold: float, arm: str, control: str, budget: str) -> np.ndarray:
        """Steps that an arm saves over another; NaN if no run of either reaches the threshold."""
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
        """Final accuracy at equal total steps, by seed (rows) and share of examples (columns)."""
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
        """Share of the examples at which final accuracy reaches ``threshold``, on a log scale.

        Interpolated between the shares; the smallest or the largest share where the accuracy is
        higher or lower throughout.
        """
        table = self.by_share(arm)
        shares = np.log2(table.columns.to_numpy(dtype=float))
        # More examples never lower accuracy: curves are made monotone before reading off.
        rising = np.maximum.accumulate(table.to_numpy(), axis=1)
        return np.array([2 ** np.interp(threshold, row, shares) for row in rising])


def conditions(table: pd.DataFrame) -> pd.DataFrame:
    """Gain in final accuracy of naming over scratch in the search, per run and budget."""
    rows = where(table, purpose="search", split=UNSEEN, metric="final accuracy")
    keys = ["n_layers", "n_tasks", "share", "seed", "budget"]
    arms = rows.pivot(index=keys, columns="arm", values="value")
    return (arms["identity"] - arms["scratch"]).rename("value").reset_index()
