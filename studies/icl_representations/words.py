"""Word tasks by instruction, demonstrations or both: neighbours, clusters and vectors."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import lensclust as lc
import probes
from lensclust.inference import answers
from lensclust.models import Site
from lensclust.results import permutation_p
from probes.design import first_answers
from probes.patching.replay import replay
from probes.steering import Intervention, first_token
from studies.icl_representations.causes import chosen_layers
from studies.icl_representations.options import Options
from studies.study import silenced

TOLD, SHOWN, BOTH = "told", "shown", "told and shown"
PARAPHRASES = 2
# The ending of few-shot prompts, so that the answering token is the same in all kinds.
LAYOUT = "{instruction}\n{input} ->"
NEIGHBOURS = 5
FITTED, TESTED = "fitted", "tested"


def measure_words(study: Options, model: TransformerBridge, seed: int) -> pd.DataFrame:
    """All scores of the word tasks."""
    source = lc.tasks.natural(model.tokenizer, tasks=study.word_tasks, paraphrases=PARAPHRASES)
    tables = [*_neighbours(study, model, source, seed), *_kinds(study, model, source, seed)]
    tables += [_vectors(study, model, source, task, seed) for task in study.word_tasks]
    return pd.concat(tables, ignore_index=True)


def _shown(
    study: Options,
    model: TransformerBridge,
    source: lc.Prompts,
    seed: int,
    **options: Any,
) -> lc.Prompts:
    options = {"queries": study.word_queries, "seed": seed, **options}
    return lc.tasks.icl(source, model.tokenizer, **options)


def _right(model: TransformerBridge, prompts: lc.Prompts) -> np.ndarray:
    return answers(model, prompts, first_token).numpy() == first_answers(prompts)


def _neighbours(
    study: Options, model: TransformerBridge, source: lc.Prompts, seed: int
) -> list[pd.DataFrame]:
    """Accuracy of nearest neighbours' tasks and of the model, by shots."""
    found = []
    for shots in study.word_shots:
        prompts = _shown(study, model, source, seed, shots=shots)
        right = pd.Series(_right(model, prompts)).groupby(prompts.rows["task"], sort=False).mean()
        acts = lc.extract(model, prompts, "resid", progress=False)
        near = probes.nearest_neighbour(
            acts,
            k=min(NEIGHBOURS, study.word_queries - 1),
            apart="input",
            per="task",
            permutations=min(study.permutations, 20),
            seed=seed,
        )
        table = near[["layer", "group", "value", "null_mean"]].rename(columns={"group": "task"})
        behaviour = table["task"].map(right)
        found.append(table.assign(metric="neighbours", shots=shots, behaviour=behaviour))
    return found


def _kinds(
    study: Options, model: TransformerBridge, source: lc.Prompts, seed: int
) -> list[pd.DataFrame]:
    """Prompts by instruction, demonstrations and both, of the same tasks and queries."""
    shots = study.word_shots[-1]
    prompts = {
        SHOWN: _shown(study, model, source, seed, shots=shots),
        BOTH: _shown(study, model, source, seed, shots=shots, instruction=True),
    }
    told = lc.tasks.natural(
        model.tokenizer, tasks=study.word_tasks, paraphrases=PARAPHRASES, layout=LAYOUT
    )
    prompts[TOLD] = told.where(input=list(prompts[SHOWN].rows["input"].unique()))
    acts = {
        name: lc.extract(model, each, "resid", progress=False) for name, each in prompts.items()
    }
    found = [
        pd.DataFrame(
            {"metric": ["word accuracy"], "variant": [name], "value": [_right(model, each).mean()]}
        )
        for name, each in prompts.items()
    ]
    for name, each in acts.items():
        with silenced("probes.similarity.neighbours"):
            apart = probes.silhouettes(
                each, given=None, permutations=min(study.permutations, 20), seed=seed
            )
        columns = ["layer", "value", "null_mean", "null_std", "p"]
        found.append(apart[columns].assign(metric="silhouette", variant=name))
    for own, other in permutations(acts, 2):
        for centred in (False, True):
            known, asked = (
                _centred(acts[name]) if centred else acts[name] for name in (other, own)
            )
            near = probes.membership(asked, known, given=None)
            found.append(
                _against_names(near, asked["task"].values, study.permutations, seed).assign(
                    metric="nearest", method=f"{own} by {other}", controlled=centred
                )
            )
    return found


def _centred(acts: xr.Dataset) -> xr.Dataset:
    return acts.assign(resid=acts["resid"] - acts["resid"].mean("prompt"))


def _against_names(near: pd.DataFrame, task: np.ndarray, n: int, seed: int) -> pd.DataFrame:
    """Share of prompts nearest to their task's mean, and its null of permuted names."""
    names = np.unique(task)
    codes = {name: code for code, name in enumerate(names)}
    rng = np.random.default_rng([seed, 5])
    renamings = np.stack([rng.permutation(len(names)) for _ in range(n)])
    rows = []
    for layer, part in near.groupby("layer"):
        own = np.array([codes[name] for name in task[part["prompt"]]])
        said = part["nearest"].map(codes).to_numpy()
        value, null = float((said == own).mean()), (renamings[:, said] == own).mean(1)
        rows.append(
            {
                "layer": layer,
                "value": value,
                "null_mean": null.mean(),
                "null_std": null.std(ddof=1),
                "p": float(permutation_p(value, null)),
            }
        )
    return pd.DataFrame(rows)


def _vectors(
    study: Options, model: TransformerBridge, source: lc.Prompts, task: str, seed: int
) -> pd.DataFrame:
    """Task and function vectors in prompts without instruction or demonstrations.

    They are made from one half of the queries and applied to both halves: the layer is chosen on
    that half and reported on the other.
    """
    own = source.where(task=task)
    n = study.word_queries
    options = {"shots": study.vector_shots, "queries": 2 * n}
    real, shuffled = (
        _shown(study, model, own, seed, shuffled=wrong, **options) for wrong in (False, True)
    )
    fitted = np.arange(len(real)) < n
    made = real.take(np.flatnonzero(fitted))
    vector = probes.function_vector(
        model, made, shuffled.take(np.flatnonzero(fitted)), top=study.top_heads
    )
    function = vector.intervention()
    layers = chosen_layers(model, study.layer_stride)
    sites = [Site("resid", layer) for layer in layers]
    means = lc.extract(model, made, sites, progress=False)["resid"].mean(("prompt", "position"))
    bare = _bare(model, real)
    states = lc.extract(model, bare, sites, progress=False)["resid"].isel(position=0)

    def to_mean(site: Site) -> Any:
        mean = torch.from_numpy(means.sel(layer=site.layer).values).float()
        return lambda states: mean.expand_as(states)

    task_vector = Intervention("task vector", to_mean)
    moves = {
        "task vector": task_vector,
        "task vector, random direction": task_vector.random_twin(seed),
        "function vector": function,
        "function vector, other heads": vector.random_heads(seed).norm_matched(function),
        "function vector, random direction": function.random_twin(seed),
    }
    edits = [
        (site, move.edit_at(site)(torch.from_numpy(states.sel(layer=site.layer).values).float()))
        for move in moves.values()
        for site in sites
    ]
    right = torch.from_numpy(first_answers(bare))

    def is_right(logits: Float[Tensor, "row vocab"], rows: Int[Tensor, " row"]) -> Tensor:
        return (logits.argmax(-1) == right[rows].to(logits.device)).float()

    hits = replay(model, bare, edits, is_right).numpy().reshape(len(moves), len(sites), -1)
    rows = [
        {"metric": "vector", "method": method, "layer": layer, "variant": half, "value": float(hit)}
        for method, each in zip(moves, hits, strict=True)
        for layer, per_prompt in zip(layers, each, strict=True)
        for half, hit in (
            (FITTED, per_prompt[fitted].mean()),
            (TESTED, per_prompt[~fitted].mean()),
        )
    ]
    plain = {"nothing": _right(model, bare), "demonstrations": _right(model, real)}
    rows += [
        {"metric": "vector", "method": name, "variant": TESTED, "value": float(hit[~fitted].mean())}
        for name, hit in plain.items()
    ]
    return pd.DataFrame(rows).assign(task=task)


def _bare(model: TransformerBridge, prompts: lc.Prompts) -> lc.Prompts:
    """The queries alone."""
    texts = [f"{text} ->" for text in prompts.rows["input"]]
    bare = lc.Prompts.from_texts(
        texts,
        prompts.rows,
        model.tokenizer,
        answers=[f" {text}" for text in prompts.rows["output"]],
    )
    return replace(bare, spans={})
