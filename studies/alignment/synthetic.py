"""One seed of the synthetic part: pairs of tasks, one answered as the other."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

import lensclust as lc
from lensclust.inference import answers
from lensclust.models import Site
from lensclust.parallel import one_thread
from lensclust.training import finetuned
from probes.design import mean_states
from studies.alignment.methods import (
    HEADS,
    SUCCESS,
    TRAININGS,
    Asked,
    Examples,
    cluster_heads,
    cluster_term,
    draw_examples,
    learning_rates,
    log_probabilities,
)
from studies.alignment.options import Options
from studies.alignment.scores import (
    Rows,
    candidates,
    chosen_moves,
    frame,
    measure_moves,
    measure_nothing,
    read_now,
    try_training,
)
from studies.synthetic_task import trained

# Training prompts of each task and input: for examples, and for evaluation.
POOL, ASKED_AGAIN = 24, 4


def measure_seed(study: Options, seed: int, folder: Path) -> dict[str, pd.DataFrame]:
    """Train a model, then align pairs of its tasks with every method."""
    prompts = lc.tasks.sif(**study.sizes(), held_out_regexes=0, seed=seed)
    with one_thread():
        run = trained(study, prompts, seed, folder, n_checkpoints=2)
        model = run.model()
        rows = align(study, model, prompts, seed)
    scores = frame(rows, part="synthetic", seed=seed)
    weights = pd.DataFrame({"name": [f"seed {seed}"], "fingerprint": [lc.fingerprint(model)]})
    return {"scores": scores, "weights": weights}


def align(study: Options, model: TransformerBridge, prompts: lc.Prompts, seed: int) -> Rows:
    """Scores of every method on some pairs of tasks, for every number of examples."""
    pool, validation, reported = _parts(prompts, study.rows_per_mapping)
    examples = [drawn.first(n) for drawn in _pairs(study, pool, seed) for n in study.examples]
    sites = [Site("resid", layer) for layer in range(1, model.cfg.n_layers + 1)]
    began = time.perf_counter()
    acts = lc.extract(model, pool, ["resid", "head"], progress=False)
    reading = (time.perf_counter() - began) / len(pool)
    members = mean_states(acts, given="input", kinds="resid")
    made = [
        move
        for some in examples
        for move in candidates(
            some.states(acts[["resid"]]),
            some,
            members,
            len(pool),
            sites,
            study.strengths,
            given="input",
            reading=reading,
        )
    ]
    asked = [Asked(p, answers(model, p, log_probabilities)) for p in (validation, reported)]
    states = [lc.extract(model, part.prompts, "resid", progress=False) for part in asked]
    chosen = chosen_moves(model, asked[0], states[0], made)
    rows = measure_moves(model, asked[1], states[1], chosen) + measure_nothing(asked[1], examples)
    heads = cluster_heads(acts, study.head_share)
    layer = max(1, round(study.pull_depth * model.cfg.n_layers))
    for some in examples:
        for method in TRAININGS:
            term = cluster_term(method, some.states(acts), some, layer, study.pull_weight)
            trained = partial(
                finetuned,
                model,
                some.asked,
                steps=study.finetuning_steps,
                batch_size=study.batch_examples,
                only=heads if method == HEADS else None,
                extra=term,
                seed=seed,
            )
            read = partial(read_now, model)
            known = len(pool) if method == HEADS else 0
            trials = [
                try_training(method, some, lr, trained, read, asked, task_states=known)
                for lr in learning_rates(method, study.rates)
            ]
            rows += max(trials, key=lambda trial: trial.merit).rows
            rows += max(trials, key=lambda trial: trial.success).chosen_by(SUCCESS)
    return rows


def _parts(prompts: lc.Prompts, per_mapping: int) -> tuple[lc.Prompts, lc.Prompts, lc.Prompts]:
    """Prompts for examples (training), for choosing, and for reporting (other strings)."""
    rows = prompts.rows
    train = (rows["split"] == "train").to_numpy()
    # The pool and the evaluated training prompts are disjoint, of the same expressions.
    nth = rows[train].sample(frac=1, random_state=0).groupby(["task", "input"]).cumcount()
    nth = nth.reindex(rows.index).to_numpy()
    pool = prompts.take(np.flatnonzero(train & (nth < POOL)))
    again = train & (nth >= POOL) & (nth < POOL + ASKED_AGAIN)
    unseen = (rows["split"] == "new_string").to_numpy()
    strings = rows["instruction"].where(unseen).rank(method="dense")
    half = (strings % 2).to_numpy()
    group = pd.Series(np.where(train, "seen", "unseen"), index=rows.index)
    labelled = replace(prompts, rows=rows.assign(group=group))
    some = rows.groupby(["split", "task", "input"]).cumcount().to_numpy() < per_mapping
    validation = labelled.take(np.flatnonzero(unseen & (half == 0) & some))
    reported = labelled.take(np.flatnonzero(again | (unseen & (half == 1) & some)))
    return pool, validation, reported


def _pairs(study: Options, pool: lc.Prompts, seed: int) -> list[Examples]:
    """Ordered pairs of tasks drawn at random among those that share inputs."""
    names = sorted(pool.rows["task"].astype(str).unique())
    pairs = [(a, b) for a in names for b in names if a != b]
    drawn = np.random.default_rng([seed, 7]).permutation(len(pairs))
    found: list[Examples] = []
    most = study.examples[-1]
    for index in drawn.tolist():
        source, target = pairs[index]
        try:
            found.append(draw_examples(pool, source, target, most, [seed, 8]).first(most))
        except lc.InputError:  # these two share too few inputs
            continue
        if len(found) == study.pairs:
            return found
    raise lc.InputError(
        f"alignment: {len(found)} pairs of tasks have {most} examples, expected pairs={study.pairs}"
    )
