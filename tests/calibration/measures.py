"""Every measure that has a p, as a function of a layout, a task effect and a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

import probes
from probes.design.flips import flipped_p
from probes.design.units import exchangeable
from tests.calibration.layouts import INPUT, NOISE, WORDING, Layout, states

PERMUTATIONS = 99
QUIET: dict[str, Any] = {"permutations": PERMUTATIONS, "progress": False}

# Name of a score -> its p.
Found = dict[str, float]
Measure = Callable[[Layout, float, int], Found]


def clusters(layout: Layout, task: float, seed: int) -> Found:
    """k-means within input, and over all rows."""
    acts, found = states(layout, task=task, seed=seed), {}
    for given, said in (("input", "within input"), (None, "over all rows")):
        frame = probes.cluster(
            acts,
            given=given,
            metrics=["ari", "ami", "pair_f1", "matched_f1", "silhouette", "cross_wording_ari"],
            n_init=1,
            jobs=1,
            seed=seed,
            **QUIET,
        ).frame
        found |= {f"cluster, {row.metric}, {said}": row.p for row in frame.itertuples()}
    return found


def neighbours(layout: Layout, task: float, seed: int) -> Found:
    acts = states(layout, task=task, seed=seed)
    return {"nearest_neighbour": probes.nearest_neighbour(acts, seed=seed, **QUIET)["p"].item()}


def rdms(layout: Layout, task: float, seed: int) -> Found:
    """With the template taken out where templates are shared by tasks, and left in."""
    acts = states(layout, task=task, seed=seed)
    frame = probes.rsa(
        acts, ["task"], nuisance=["template"], compare="spearman", seed=seed, **QUIET
    ).frame
    p = frame.set_index("controlled")["p"]
    return {"rsa": float(p[False]), "rsa, template taken out": float(p[True])}


def linear(layout: Layout, task: float, seed: int) -> Found:
    acts, found = states(layout, task=task, seed=seed), {}
    for groups in ("template", "input", None):
        folds = min(3, int(layout.rows.groupby("task")[groups or "template"].nunique().min()))
        sweep = probes.probe(
            acts,
            groups=groups,
            control=None,
            folds=folds,
            penalties=[0.1],
            jobs=1,
            seed=seed,
            **QUIET,
        )
        frame = sweep.frame.set_index("metric")
        said = f"{groups}s held out" if groups else "rows held out"
        found[f"probe, {said}"] = frame.loc["balanced_accuracy", "p"]
    return found


def conditions(layout: Layout, task: float, seed: int) -> Found:
    """Two conditions with effects drawn apart; a task effect in the second alone."""
    without, shown = (
        states(layout, task=size, seed=[seed, n]) for n, size in enumerate((0.0, task))
    )
    found = {}
    for groups in ("template", "instruction"):
        frame = probes.decode(
            without,
            shown,
            target="task",
            groups=groups,
            penalty=0.1,
            folds=2,
            resamples=99,
            seed=seed,
        ).frame
        found[f"decode, {groups}s held out"] = frame["p"].item()
    return found


def kernels(layout: Layout, task: float, seed: int) -> Found:
    """Two models whose effects are drawn apart; in part the same where there is something."""
    one, other = (states(layout, task=0, seed=[seed, n]) for n in range(2))
    other["resid"] = other.resid + task * one.resid
    return {"cka": probes.cka(one, other, permutations=PERMUTATIONS, seed=seed).frame["p"].item()}


def patches(layout: Layout, task: float, seed: int) -> Found:
    """Effects of patching with parts of the wording and the input, 0 on average or not."""
    rng, rows = np.random.default_rng(seed), layout.rows
    effects = task + NOISE * rng.normal(size=len(rows))
    for labels, size in ((rows["template"] + rows["task"], WORDING), (rows["input"], INPUT / 4)):
        codes = pd.factorize(labels)[0]
        effects += size * rng.normal(size=codes.max() + 1)[codes]
    unit = exchangeable(rows["task"].to_numpy(), rows, by="task").unit
    p, _ = flipped_p(effects[None], unit, PERMUTATIONS, seed=seed)
    return {"patch (effects simulated)": float(p[0])}


MEASURES: tuple[Measure, ...] = (
    clusters,
    neighbours,
    rdms,
    linear,
    conditions,
    kernels,
    patches,
)
