"""The pretrained part: few-shot word tasks with an instruction, one answered as another."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import lensclust as lc
from lensclust.inference import FrozenBlocks, answers
from lensclust.models import Site, parameter_names
from lensclust.training import finetuned
from probes.design import mean_states
from probes.steering import steer
from studies.alignment.methods import (
    HEADS,
    SHIFT,
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
    Move,
    Rows,
    TrainedScores,
    candidates,
    chosen_moves,
    frame,
    measure_moves,
    measure_nothing,
    read_now,
    try_training,
)

SEEN, UNSEEN = ("imperative", "question"), ("request",)
# Queries are split: examples, choice of layers and rates, report.
QUERIES = {"examples": 8, "validation": 4, "reported": 6}
WORDS_SHOWN = 0.25
TRIED_ON = 2  # pairs on which learning rates are chosen
BATCH = 8  # examples a step
GENERATED, NEW_TOKENS = 5, 4


def measure_pretrained(study: Options) -> dict[str, pd.DataFrame]:
    """Steer and fine-tune every ordered pair of the tasks from few examples."""
    model = lc.load(study.pretrained, progress=False)
    pool, *parts = _parts(study, model)
    pairs = permutations(study.tasks, 2)
    drawn = [draw_examples(pool, *pair, study.pretrained_examples[-1], [0, 8]) for pair in pairs]
    asked = [Asked(part, answers(model, part, log_probabilities), "template") for part in parts]
    drawn = [some for some in drawn if all(_counts(part, some) for part in asked)]
    if not drawn:
        raise lc.InputError(
            f"alignment: {study.pretrained} answers too few prompts of {study.tasks} right "
            "to change them; give other --tasks, more --shots or another --pretrained"
        )
    acts, reading = _states(study, model, pool)
    rows = _steered(study, model, drawn, asked, acts, reading)
    rows += _trained(study, model, drawn, asked, acts)
    scores = frame(rows, part="pretrained", seed=-1)
    weights = pd.DataFrame({"name": [study.pretrained], "fingerprint": [acts.attrs["weights"]]})
    return {"scores": scores, "weights": weights}


def _parts(study: Options, model: TransformerBridge) -> list[lc.Prompts]:
    """Prompts for examples, for choosing and for reporting, with disjoint queries."""
    source = lc.tasks.natural(model.tokenizer, tasks=study.tasks, paraphrases=(*SEEN, *UNSEEN))
    prompts = lc.tasks.icl(
        source, model.tokenizer, shots=study.shots, pool=WORDS_SHOWN, instruction=True
    )
    rows = prompts.rows
    group = np.where(rows["template"].isin(UNSEEN), "unseen", "seen")
    # One draw for all tasks.
    place = rows["input"].map({x: i for i, x in enumerate(rows["input"].unique())}).to_numpy()
    bounds = np.cumsum([0, *QUERIES.values()])
    inside = [(place >= a) & (place < b) for a, b in pairwise(bounds)]
    once = (rows["template"] == SEEN[0]).to_numpy()
    unseen = group == "unseen"
    chosen = [inside[0] & ~unseen, inside[1] & once, inside[2] & (unseen | once)]
    # Prompts to choose by have seen instructions, but are scored alike.
    labels = ["seen", "unseen", group]
    return [
        replace(prompts, rows=rows.assign(group=label)).take(np.flatnonzero(keep))
        for label, keep in zip(labels, chosen, strict=True)
    ]


def _counts(asked: Asked, some: Examples) -> bool:
    """Whether every group of prompts has some on which success for this pair is measured."""
    counted = asked.counted(some.source, some.target)
    return set(asked.group[counted]) == set(asked.group)


def _states(study: Options, model: TransformerBridge, pool: lc.Prompts) -> tuple[Any, float]:
    """States of the pool at the layers that methods use, and seconds per prompt."""
    sites = [*_sites(study, model), Site("resid", _pull_layer(study, model))]
    heads = [
        Site("head", block, head)
        for block in _blocks(study, model)
        for head in range(model.cfg.n_heads)
    ]
    began = time.perf_counter()
    acts = lc.extract(model, pool, [*dict.fromkeys(sites), *heads], progress=False)
    return acts, (time.perf_counter() - began) / len(pool)


def _sites(study: Options, model: TransformerBridge) -> list[Site]:
    layers = {max(1, round(depth * model.cfg.n_layers)) for depth in study.depths}
    return [Site("resid", layer) for layer in sorted(layers)]


def _blocks(study: Options, model: TransformerBridge) -> range:
    """Blocks that are fine-tuned; never the first."""
    return range(max(1, model.cfg.n_layers - study.trained_blocks), model.cfg.n_layers)


def _pull_layer(study: Options, model: TransformerBridge) -> int:
    """The layer in the middle of the fine-tuned blocks."""
    blocks = _blocks(study, model)
    return blocks[0] + (len(blocks) + 1) // 2


def _steered(
    study: Options,
    model: TransformerBridge,
    drawn: list[Examples],
    asked: list[Asked],
    acts: Any,
    reading: float,
) -> Rows:
    """Scores of the interventions, and texts generated under one of them."""
    examples = [some.first(n) for some in drawn for n in study.pretrained_examples]
    sites = _sites(study, model)
    members = mean_states(acts[["resid"]])
    made = [
        move
        for some in examples
        for move in candidates(
            some.states(acts[["resid"]]),
            some,
            members,
            acts.sizes["prompt"],
            sites,
            study.strengths,
            given=None,
            reading=reading,
        )
    ]
    states = [lc.extract(model, part.prompts, sites, progress=False) for part in asked]
    chosen = chosen_moves(model, asked[0], states[0], made)
    rows = measure_moves(model, asked[1], states[1], chosen) + measure_nothing(asked[1], examples)
    most = study.pretrained_examples[-1]
    shown = [m for m in chosen if m.method == SHIFT and len(m.examples.asked) == most]
    texts = [_generated(model, asked[1], move, turn) for turn, move in enumerate(shown[::2])]
    return rows + texts[:GENERATED]


def _trained(
    study: Options,
    model: TransformerBridge,
    drawn: list[Examples],
    asked: list[Asked],
    acts: Any,
) -> Rows:
    """Scores of the fine-tunings; each learning rate is chosen on a few pairs for all."""
    blocks = _blocks(study, model)
    heads = cluster_heads(acts, study.head_share)
    frozen = {part: FrozenBlocks.run(model, part.prompts.tokens, blocks[0]) for part in asked}
    below = [
        FrozenBlocks.run(model, some.asked.with_answers()[0][:, :-1], blocks[0]) for some in drawn
    ]

    def read(part: Asked) -> Tensor:
        return read_now(model, part, frozen[part])

    def trial(pair: int, method: str, lr: float) -> TrainedScores:
        some = drawn[pair]
        term = cluster_term(
            method, some.states(acts), some, _pull_layer(study, model), study.pull_weight
        )
        train = partial(
            finetuned,
            model,
            some.asked,
            steps=study.pretrained_steps,
            only=heads if method == HEADS else parameter_names(model, blocks),
            extra=term,
            batch_size=BATCH,
            frozen=below[pair],
        )
        known = acts.sizes["prompt"] if method == HEADS else 0
        return try_training(method, some, lr, train, read, asked, task_states=known)

    rows: Rows = []
    tried = range(len(drawn))[:: max(1, len(drawn) // TRIED_ON)][:TRIED_ON]
    for method in TRAININGS:
        rates = learning_rates(method, study.pretrained_rates)
        trials = {lr: {pair: trial(pair, method, lr) for pair in tried} for lr in rates}
        best = max(rates, key=lambda lr: sum(found.merit for found in trials[lr].values()))
        for pair in range(len(drawn)):
            rows += (trials[best].get(pair) or trial(pair, method, best)).rows
    return rows


def _generated(model: TransformerBridge, asked: Asked, move: Move, turn: int) -> dict[str, Any]:
    """Text generated from one prompt before and while the model is steered."""
    some = move.examples
    able = asked.counted(some.source, some.target) & (asked.group == "unseen")
    rows = np.flatnonzero(able if able.any() else asked.task == some.source)
    row = int(rows[turn % len(rows)])
    tokens = asked.prompts.tokens[row : row + 1, : int(asked.prompts.lengths[row])]

    def generate() -> str:
        found: Any = model.generate(
            tokens.to(model.cfg.device or "cpu"),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            stop_at_eos=False,
            return_type="tokens",
            verbose=False,
        )
        tokenizer: Any = model.tokenizer
        return tokenizer.decode(found[0, tokens.shape[1] :])

    before = generate()
    with steer(model, move.intervention, at=move.site):
        after = generate()
    return {
        "source": some.source,
        "target": some.target,
        "method": move.method,
        "examples": len(some.asked),
        "layer": move.site.layer,
        "metric": "generated",
        "prompt": asked.prompts.text(row),
        "before": before,
        "after": after,
    }
