"""The pretrained part: few-shot word tasks, moved into each other layer by layer."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

import lensclust as lc
import probes
from lensclust.inference import answers
from lensclust.models import Site
from probes.design import first_answers, mean_states
from probes.steering import (
    Intervention,
    Moves,
    first_token,
    interchange,
    shift,
    with_shuffled_labels,
)
from studies.study import silenced
from studies.unseen.options import MEANS, Options


def measure_pretrained(study: Options) -> dict[str, pd.DataFrame]:
    """Cluster the last token's states of few-shot prompts and move them between tasks.

    The queries are halved: means are fitted on one half and move states of the other, both ways,
    so that no moved prompt has a query that its means include.
    """
    model = lc.load(study.pretrained, progress=False)
    source = lc.tasks.natural(model.tokenizer, tasks=study.tasks)
    prompts = lc.tasks.icl(source, model.tokenizer, shots=study.shots, draws=study.draws)
    right = answers(model, prompts, first_token).numpy() == first_answers(prompts)
    rows = prompts.rows
    accuracy = pd.DataFrame(
        [
            {"metric": "accuracy", "source": task, "value": float(right[part.index].mean())}
            for task, part in rows.groupby("task", sort=False)
        ]
    )
    half = rows["input"].rank(method="dense").astype(int).to_numpy() % 2
    for task in study.tasks:
        if len({*half[right & (rows["task"] == task).to_numpy()]}) < 2:
            raise lc.InputError(
                f"unseen: {study.pretrained} answers too few few-shot prompts of {task!r} right "
                f"({accuracy.set_index('source').loc[task, 'value']:.0%}), expected some in each "
                "half of the queries; give other --tasks, more --shots or another --pretrained"
            )
    acts = lc.extract(model, prompts, "resid", progress=False)
    tables = [accuracy, _clusters(acts, "model"), _clusters(probes.bag_of_tokens(prompts), "words")]
    # Only pairs of prompts that the model answers right in both tasks are moved.
    answered = prompts.take(np.flatnonzero(right))
    doable = {
        pair: int(token)
        for pair, token in zip(
            zip(answered.rows["task"], answered.rows["input"], strict=True),
            first_answers(answered),
            strict=True,
        )
    }
    last = model.cfg.n_layers
    layers = sorted({*range(0, last + 1, study.layer_stride), last})
    half = half[right]
    for fold in (0, 1):
        part = answered.take(np.flatnonzero(half == fold))
        moved = interchange(
            model,
            part,
            _moves(acts.isel(prompt=np.flatnonzero(right)[half != fold])),
            [Site("resid", layer) for layer in layers],
            answers=doable,
            rounds=None,
            donors=part,
        )
        tables.append(moved.frame.assign(fold=str(fold)))
    scores = pd.concat(tables, ignore_index=True).assign(part="pretrained", seed=-1)
    weights = pd.DataFrame({"name": [study.pretrained], "fingerprint": [acts.attrs["weights"]]})
    return {"scores": scores, "weights": weights}


def _moves(fitted: xr.Dataset) -> Moves:
    """The shift between two tasks' mean states, and its controls."""
    means, controls = mean_states(fitted), mean_states(with_shuffled_labels(fitted, given="input"))

    def moves(source: str, target: str) -> list[Intervention]:
        real = shift(means, source, target)
        control = shift(controls, source, target, name=MEANS)
        return [real, real.random_twin(), control.norm_matched(real)]

    return moves


def _clusters(acts: xr.Dataset, method: str) -> pd.DataFrame:
    """Clustering by task within query, and nearest neighbours with another query."""
    with silenced("probes.clustering.clustering"):
        found = probes.cluster(acts, permutations=20, kinds="resid", jobs=1).frame
    near = probes.nearest_neighbour(acts, apart="input", kinds="resid", permutations=20)
    table = pd.concat([found[found["metric"] == "ari"], near], ignore_index=True)
    return table[["layer", "metric", "value", "null_mean", "null_std"]].assign(method=method)
