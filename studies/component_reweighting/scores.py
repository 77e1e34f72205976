"""Scores of decomposed prompts: best and worst components, and gain by reweighting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int

from probes.components import WRITERS, ComponentLogits, calibrate_many, reweight_many

Row = dict[str, Any]
# Calibration to convergence, with the penalty chosen as for reweighting.
MATCHED = {"Calib+ converged": "converged", "vector scaling": "vector scaling"}


def halves(parts: ComponentLogits) -> Int[np.ndarray, " prompt"]:
    """Half (0 or 1) of each prompt, stratified by label."""
    targets = pd.Series(parts.targets)
    return (targets.groupby(targets).cumcount() % 2).to_numpy()


def extremes(parts: ComponentLogits) -> list[Row]:
    """Accuracy of the model, of its best and worst head or MLP, and of chance.

    A component is chosen on one half of the prompts and scored on the other, both ways; ``same
    queries`` is its accuracy on the prompts that chose it.
    """
    writers = np.isin(parts.data["kind"].values, WRITERS)
    said = parts.logits.values[:, writers].argmax(-1)
    right = said == parts.targets[:, None]
    half = halves(parts)
    found = {"model": parts.model_accuracy}
    pickers: dict[str, Callable[[np.ndarray], Any]] = {"best": np.argmax, "worst": np.argmin}
    for name, pick in pickers.items():
        apart = [right[half == side, pick(right[half != side].mean(0))] for side in (0, 1)]
        found[f"{name} component"] = float(np.concatenate(apart).mean())
        found[f"{name} component, same queries"] = float(right[:, pick(right.mean(0))].mean())
    rows = [{"metric": "accuracy", "method": name, "value": v} for name, v in found.items()]
    # The share of the commonest label: the best accuracy of a constant answer.
    commonest = np.bincount(parts.targets).max() / len(parts.targets)
    return [*rows, {"metric": "chance", "method": "one label", "value": float(commonest)}]


def kind_shares(parts: ComponentLogits, method: str = "model") -> list[Row]:
    """Share of heads and MLPs of each type."""
    frame = parts.kinds()
    types = frame.loc[frame["kind"].isin(WRITERS), "type"]
    return [
        {"metric": "share", "method": method, "type": name, "value": float((types == name).mean())}
        for name in ("good", "bad", "label-biased", "chance")
    ]


def component_rows(parts: ComponentLogits) -> pd.DataFrame:
    """Accuracy of every head and MLP, and the share of its most frequent prediction."""
    frame = parts.kinds()
    frame = frame[frame["kind"].isin(WRITERS)]
    columns = ["component", "kind", "block", "head", "share", "type"]
    return frame[columns].assign(metric="component accuracy", value=frame["accuracy"])


def permuted_labels(parts: ComponentLogits, *, seed: int = 0) -> ComponentLogits:
    """The same prompts with permuted labels: the null of learning from labels."""
    order = np.random.default_rng(seed).permutation(len(parts.targets))
    permuted = ("prompt", parts.data["target"].values[order])
    return replace(parts, data=parts.data.assign_coords(target=permuted))


def relearned(
    learnt: Sequence[ComponentLogits],
    asked: Sequence[ComponentLogits],
    n_labels: int,
    *,
    full: bool,
) -> list[list[Row]]:
    """Accuracy on queries after learning from labelled prompts: a list of rows per problem.

    Args:
        learnt: labelled prompts of each problem.
        asked: queries of each problem.
        n_labels: number in the methods' names.
        full: also run the variants and the control of reweighting.
    """
    fits: dict[str, Sequence[Any]] = {
        f"reweighting {n_labels}": reweight_many(learnt),
        f"Calib+ {n_labels}": calibrate_many(learnt),
        **{
            f"{name} {n_labels}": calibrate_many(learnt, method=method)
            for name, method in MATCHED.items()
        },
    }
    if full:
        permuted = [permuted_labels(each, seed=place) for place, each in enumerate(learnt)]
        fits |= {
            f"reweighting {n_labels}, free": reweight_many(learnt, box=False),
            f"reweighting {n_labels}, script": reweight_many(learnt, official=True),
            f"reweighting {n_labels}, dealt labels": reweight_many(permuted),
        }
    return [
        [
            {"metric": "accuracy", "method": name, "value": fitted[place].accuracy(queries)}
            for name, fitted in fits.items()
        ]
        for place, queries in enumerate(asked)
    ]
