"""All scores of one seed's questions with and without demonstrations."""

from __future__ import annotations

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

import probes
from studies.icl_representations.causes import measure_causes
from studies.icl_representations.changes import (
    alignment,
    all_links,
    decodability,
    log_ratios,
    pooled_alignment,
)
from studies.icl_representations.options import LINES, NONE, READING, SHOWN, Options
from studies.icl_representations.prompts import answered, behaviour, variants_of


def measure_questions(
    study: Options, model: TransformerBridge, task: str, seed: int
) -> pd.DataFrame:
    """All scores of one of the three tasks."""
    variants = variants_of(study, model.tokenizer, task, seed)
    read = {
        name: answered(model, prompts, whole=task == LINES) for name, prompts in variants.items()
    }
    acts = {name: states for name, (states, _) in read.items()}
    scores = {name: each for name, (_, each) in read.items()}
    found = [behaviour(variants, scores)]
    for name, each in acts.items():
        found.append(alignment(study, each, task, seed).assign(variant=name))
        found.append(decodability(study, each, task, seed).assign(variant=name))
    ratios = {
        name: probes.attention_ratio(
            model,
            variants[name],
            weighting=("attention", "value"),
            draws=study.permutations,
            seed=seed,
            progress=False,
        )
        for name in (NONE, SHOWN)
    }
    found += [log_ratios(ratio.frame).assign(variant=name) for name, ratio in ratios.items()]
    found += all_links(study, variants, scores, acts, ratios, task, seed)
    if task == READING:
        found += pooled_alignment(study, model, variants, task, seed)
        found.append(measure_causes(study, model, variants, acts, seed))
    return pd.concat(found, ignore_index=True)
