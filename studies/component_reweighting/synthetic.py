"""One training on the synthetic task: accuracy of components and of the model over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import lensclust as lc
import probes
from lensclust.parallel import one_thread
from lensclust.tasks.labelled import balanced_order
from probes.components import decompose
from studies.component_reweighting.options import Options
from studies.component_reweighting.scores import component_rows, extremes, kind_shares, relearned
from studies.scales import AGREED
from studies.study import silenced
from studies.synthetic_task import UNSEEN, clustered_prompts, input_only_accuracy, trained


def measure_seed(study: Options, seed: int, folder: Path) -> dict[str, pd.DataFrame]:
    """Train a model; at every checkpoint score and reweight its components."""
    prompts = lc.tasks.sif(**study.sizes(), seed=seed)
    with one_thread():
        run = trained(study, prompts, seed, folder, n_checkpoints=study.n_checkpoints)
        unseen = clustered_prompts(prompts, study.rows_per_mapping).where(split=UNSEEN)
        tables = [
            _checkpoint(study, model, unseen, seed).assign(step=step)
            for step, model in run.models()
        ]
        model = run.model()
    scores = pd.concat(tables, ignore_index=True).assign(part="synthetic", seed=seed)
    weights = pd.DataFrame({"name": [f"seed {seed}"], "fingerprint": [lc.fingerprint(model)]})
    return {"scores": scores, "weights": weights}


def _checkpoint(study: Options, model: Any, prompts: lc.Prompts, seed: int) -> pd.DataFrame:
    """Components on unseen strings, reweighting from some of them, and clusters of heads."""
    outputs = prompts.rows["output"].astype(str)
    choices = {
        name: answer[0]
        for name, answer in sorted({*zip(outputs, prompts.answers or (), strict=True)})
    }
    parts = decompose(model, prompts, choices, label="output", progress=False)
    order = balanced_order(parts.targets, np.random.default_rng(seed))
    most = study.labels[-1]
    queries = parts.take(order[most:])
    # Chance is the best answer from the input alone, which needs no reading of the task.
    chance = float(input_only_accuracy(prompts.rows).iloc[0])
    rows = [
        *extremes(queries),
        *kind_shares(queries),
        {"metric": "chance", "method": "input alone", "value": chance},
        {"metric": "error", "method": "sum", "value": parts.error},
    ]
    for n_labels in study.labels:
        learnt = parts.take(order[:n_labels])
        rows += relearned([learnt], [queries], n_labels, full=n_labels == most)[0]
    acts = lc.extract(model, prompts, "head", progress=False)
    with silenced("probes.clustering.clustering"):
        options: dict[str, Any] = {"permutations": study.permutations, "jobs": 1}
        found = probes.cluster(acts, kinds="head", metrics=AGREED, **options).frame
    agreed = found.rename(columns={"layer": "block"})
    columns = ["metric", "block", "head", "value", "null_mean"]
    return pd.concat(
        [pd.DataFrame(rows), component_rows(queries), agreed[columns].assign(method="model")],
        ignore_index=True,
    )
