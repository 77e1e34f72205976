"""One seed of the synthetic part: clusters predict and change answers to unseen prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from sklearn.metrics import roc_auc_score

import lensclust as lc
import probes
from lensclust.activations import select
from lensclust.inference import answers
from lensclust.models import Site, resolve
from lensclust.parallel import one_thread
from probes.clustering import membership
from probes.design import first_answers, mean_states
from probes.patching.replay import replay
from probes.steering import (
    Intervention,
    erase,
    erase_random,
    erase_reassigned,
    first_token,
    interchange,
    shift,
    transport,
    with_shuffled_labels,
)
from studies.scales import AGREED
from studies.study import silenced
from studies.synthetic_task import (
    SPLITS,
    UNSEEN,
    clustered_prompts,
    input_only_accuracy,
    states_over_training,
    trained,
)
from studies.unseen.options import ANSWER, INSTRUCTION, MEANS, REASSIGNED, SUBSPACE, Options


def measure_seed(study: Options, seed: int, folder: Path) -> dict[str, pd.DataFrame]:
    """Train a model and measure every checkpoint, then move and erase its clusters."""
    prompts = lc.tasks.sif(**study.sizes(), seed=seed)
    with one_thread():
        run = trained(study, prompts, seed, folder, n_checkpoints=study.n_checkpoints)
        # Centroids are those of the first training prompts of each task and input.
        known = _first(prompts.where(split="train"), 2 * study.rows_per_mapping)
        spread = _spread(prompts.where(split="train"), 2 * study.rows_per_mapping)
        asked = clustered_prompts(prompts, study.rows_per_mapping)
        tables, followed = [], []
        right = np.zeros(len(asked), dtype=bool)
        shown = np.flatnonzero(asked.rows["split"] == UNSEEN)
        for step, model in run.models():
            found, states, right = _checkpoint(model, known, asked, study.permutations)
            tables.append(found.assign(step=step))
            followed.append((step, states.isel(prompt=shown)))
        model = run.model()
        unseen = prompts.where(split=UNSEEN)
        moving = [
            table
            for at in (ANSWER, INSTRUCTION)
            for table in _moves(model, known, spread, unseen, study, at, seed)
        ]
        tables.append(pd.concat(moving).assign(step=study.steps))
    scores = pd.concat(tables, ignore_index=True).assign(seed=seed, part="synthetic")
    weights = pd.DataFrame({"name": [f"seed {seed}"], "fingerprint": [lc.fingerprint(model)]})
    answered = np.where(right[shown], "right", "wrong")
    points = _followed(followed, asked.take(shown), answered) if seed == 0 else pd.DataFrame()
    return {"scores": scores, "weights": weights, "map": points}


def _followed(
    followed: Sequence[tuple[int, Any]], prompts: lc.Prompts, answered: np.ndarray
) -> pd.DataFrame:
    """Unseen strings in two dimensions, by checkpoint and layer, with the final answer."""
    states = states_over_training(followed, prompts)
    return states.assign(answered=np.tile(answered, len(states) // len(answered)))


def _first(prompts: lc.Prompts, n: int) -> lc.Prompts:
    """The first ``n`` prompts of each task and input."""
    nth = prompts.rows.groupby(["task", "input"]).cumcount()
    return prompts.take(np.flatnonzero((nth < n).to_numpy()))


def _spread(prompts: lc.Prompts, n: int) -> lc.Prompts:
    """``n`` prompts of each task and input, cycling over its expressions."""
    nth = prompts.rows.groupby(["task", "input", "template"]).cumcount()
    in_turn = prompts.rows.iloc[np.argsort(nth.to_numpy(), kind="stable")]
    place = in_turn.groupby(["task", "input"]).cumcount()
    chosen = np.zeros(len(prompts), dtype=bool)
    chosen[np.argsort(nth.to_numpy(), kind="stable")] = (place < n).to_numpy()
    return prompts.take(np.flatnonzero(chosen))


def _checkpoint(
    model: Any, known: lc.Prompts, asked: lc.Prompts, permutations: int
) -> tuple[pd.DataFrame, xr.Dataset, np.ndarray]:
    """Accuracy, clustering and nearest centroid on each split at one checkpoint.

    Also returns the states, and whether each prompt is answered right.
    """
    right = answers(model, asked, first_token).numpy() == first_answers(asked)
    chance = input_only_accuracy(asked.rows)
    states = lc.extract(model, asked, "resid", progress=False)
    means = lc.extract(model, known, "resid", progress=False)
    near = membership(states, means)
    tables = []
    for split in [name for name in SPLITS if name in set(asked.rows["split"])]:
        rows = np.flatnonzero(asked.rows["split"] == split)
        with silenced(
            "probes.clustering.clustering"
        ):  # layer 0 cannot hold clusters: its score is 0
            found = probes.cluster(
                states.isel(prompt=rows), permutations=permutations, jobs=1
            ).frame
        agreed = found["metric"].isin(["ari", AGREED])
        found = found[agreed][["layer", "metric", "value", "null_mean"]]
        accuracy = {"metric": "accuracy", "value": right[rows].mean(), "null_mean": chance[split]}
        of_split = near[near["prompt"].isin(rows)]
        tables += [
            table.assign(split=split, n=len(rows))
            for table in (found, pd.DataFrame([accuracy]), _prediction(of_split, right))
        ]
    return pd.concat(tables, ignore_index=True), states, right


def _prediction(near: pd.DataFrame, right: np.ndarray) -> pd.DataFrame:
    """Prediction of right answers by the nearest centroid: one row per layer and metric."""
    found = []
    for layer, rows in near.groupby("layer"):
        correct = right[rows["prompt"]]
        inside = rows["right"].to_numpy()
        both = 0 < correct.sum() < len(correct)
        found += [
            {"layer": layer, "metric": metric, "value": float(value)}
            for metric, value in {
                "membership": inside.mean(),
                "accuracy, right cluster": correct[inside].mean() if inside.any() else np.nan,
                "accuracy, wrong cluster": correct[~inside].mean() if (~inside).any() else np.nan,
                "in wrong cluster": float((~inside).sum()),
                "margin AUC": roc_auc_score(correct, rows["margin"]) if both else np.nan,
            }.items()
        ]
    return pd.DataFrame(found)


class _Fit:
    """States of known prompts at one position, and the interventions fitted on them.

    Erasures are fitted on prompts spread over expressions: they then remove the task and not one
    expression of it, and whole expressions can be reassigned within an input.
    """

    def __init__(self, model: Any, known: lc.Prompts, spread: lc.Prompts, at: str) -> None:
        self.at = at
        # At the end of the instruction the input has not been read yet.
        self.given = "input" if at == ANSWER else None
        self.states = lc.extract(model, known, "resid", at=at, progress=False)
        self.spread = lc.extract(model, spread, "resid", at=at, progress=False)
        self.everywhere = mean_states(self.states)
        self.conditional = mean_states(self.states, given=self.given)
        self.shuffled = mean_states(
            with_shuffled_labels(self.states, given=self.given), given=self.given
        )

    def moves(self, source: str, target: str) -> Sequence[Intervention]:
        """The interventions between two tasks, and their controls."""
        plain = shift(self.everywhere, source, target)
        if self.given is None:
            real, control = plain, shift(self.shuffled, source, target, name=MEANS)
        else:
            real = transport(self.conditional, source, target)
            control = transport(self.shuffled, source, target, name=MEANS)
        return [
            *dict.fromkeys([real, plain]),
            real.random_twin(),
            control.norm_matched(real),
        ]


def _moves(
    model: Any,
    known: lc.Prompts,
    spread: lc.Prompts,
    unseen: lc.Prompts,
    study: Options,
    at: str,
    seed: int,
) -> list[pd.DataFrame]:
    """Intervene at every layer, on one half of the prompts and then on the other."""
    fit = _Fit(model, known, spread, at)
    half = unseen.rows.groupby(["task", "input"]).cumcount() % 2
    tables = []
    for number, fold in enumerate(("choose", "report")):
        part = unseen.take(np.flatnonzero(half == number))
        moved = interchange(
            model, part, fit.moves, "resid", at=at, rounds=study.rounds, donors=known, seed=seed
        )
        rates = moved.frame.groupby(["layer", "method", "metric"], sort=False)["value"].mean()
        tables.append(rates.reset_index().assign(fold=fold, position=at, split=UNSEEN))
        tables.append(
            _erasures(model, part, fit, seed).assign(fold=fold, position=at, split=UNSEEN)
        )
    return tables


def _erasures(model: Any, prompts: lc.Prompts, fit: _Fit, seed: int) -> pd.DataFrame:
    """Accuracy left after task identity is erased at a layer, and after each control.

    Also the share of variance that each removes from the states it was fitted on (within input
    where it is fitted within input).
    """
    ways = {"erase": None} | ({} if fit.given is None else {"erase given input": fit.given})
    states = lc.extract(model, prompts, "resid", at=fit.at, progress=False)
    made = [
        (way, given)
        for name, given in ways.items()
        for way in (
            erase(fit.spread, given=given, name=name),
            erase_random(fit.spread, given=given, seed=seed, name=f"{name}, {SUBSPACE}"),
            erase_reassigned(fit.spread, given=given, seed=seed, name=f"{name}, {REASSIGNED}"),
        )
    ]
    edits: list[tuple[Site, torch.Tensor]] = []
    places, removed = [], []
    for site in resolve(model, "resid"):
        values = torch.from_numpy(select(states, site).values)
        known = torch.from_numpy(select(fit.spread, site).values)
        for way, given in made:
            edit = way.edit_at(site)
            edits.append((site, edit(values)))
            place = {"layer": site.layer, "method": way.name}
            places.append(place | {"metric": "accuracy left"})
            share = _removed(known, edit(known), fit.spread, given)
            removed.append(place | {"metric": "variance removed", "value": share})
    own = first_answers(prompts)
    found = replay(model, prompts, edits, first_token, at=fit.at).numpy()
    left = pd.DataFrame(places).assign(value=(found == own).mean(1))
    return pd.concat([left, pd.DataFrame(removed)], ignore_index=True)


def _removed(
    before: torch.Tensor, after: torch.Tensor, acts: xr.Dataset, given: str | None
) -> float:
    """Mean squared distance of edited from original states, over variance within conditions."""
    of = np.zeros(len(before), dtype=int)
    if given is not None:
        of = np.unique(acts[given].values.astype(str), return_inverse=True)[1]
    exact = before.double()
    means = torch.stack([exact[of == value].mean(0) for value in range(of.max() + 1)])
    total = (exact - means[of]).square().sum()
    if total <= 1e-12 * exact.square().sum():  # states differ by rounding alone
        return float("nan")
    return float((after.double() - exact).square().sum() / total)
