"""Causal effects of states and attention that demonstrations change on answers.

A prompt's own state after demonstrations holds its answer, so patching it is weak evidence. The
mean state of other items in the same wording does not hold the answer: its effect beyond that of
the same mean without demonstrations is what demonstrations leave in one position.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import lensclust as lc
from lensclust.inference import Readout, answers
from lensclust.models import Site
from probes.attention import answers_cut_off
from probes.design import first_answers
from probes.patching.replay import replay
from studies.icl_representations.options import NONE, SHOWN, Options


def measure_causes(
    study: Options,
    model: TransformerBridge,
    variants: Mapping[str, lc.Prompts],
    acts: Mapping[str, xr.Dataset],
    seed: int,
) -> pd.DataFrame:
    """Log probability of the right answer's first token gained by each edit (nats, mean)."""
    right = torch.from_numpy(first_answers(variants[NONE]))

    def confidence(
        logits: Float[Tensor, "row vocab"], rows: Int[Tensor, " row"]
    ) -> Float[Tensor, " row"]:
        return logits.log_softmax(-1).gather(1, right[rows].to(logits.device)[:, None])[:, 0]

    before = {name: answers(model, variants[name], confidence) for name in (NONE, SHOWN)}
    rows = [
        {"metric": "gap", "value": float((before[SHOWN] - before[NONE]).mean())},
        *_patched(study, model, variants, acts, confidence, before),
        *_cut(model, variants[SHOWN], confidence, before[SHOWN], seed),
    ]
    return pd.DataFrame(rows)


def _patched(
    study: Options,
    model: TransformerBridge,
    variants: Mapping[str, lc.Prompts],
    acts: Mapping[str, xr.Dataset],
    confidence: Readout,
    before: Mapping[str, Tensor],
) -> list[dict[str, object]]:
    """Effect of replacing the last state of each prompt, layer by layer."""
    strangers = _strangers(variants[NONE].rows)
    layers = chosen_layers(model, study.layer_stride)
    found = []
    for base, donors in {
        NONE: {
            "own, shown": (SHOWN, None),
            "others, shown": (SHOWN, strangers),
            "others, none": (NONE, strangers),
        },
        SHOWN: {"own, none": (NONE, None)},
    }.items():
        edits, labels = [], []
        for method, (variant, weights) in donors.items():
            for layer in layers:
                states = torch.from_numpy(
                    acts[variant]["resid"].sel(layer=layer).isel(position=0).values
                ).float()
                edits.append(
                    (Site("resid", layer), states if weights is None else weights @ states)
                )
                labels.append({"method": method, "layer": layer})
        effects = replay(model, variants[base], edits, confidence) - before[base]
        found += [
            {**label, "metric": "patched", "variant": base, "value": float(effect.mean())}
            for label, effect in zip(labels, effects, strict=True)
        ]
    return found


def _strangers(rows: pd.DataFrame) -> Float[Tensor, "prompt prompt"]:
    """Weights of a mean over the prompts in the same wording with another name and activity."""
    same = {
        label: rows[label].to_numpy()[:, None] == rows[label].to_numpy()
        for label in ("template", "name", "activity")
    }
    weights = same["template"] & ~same["name"] & ~same["activity"]
    return torch.from_numpy(weights / weights.sum(1, keepdims=True)).float()


def _cut(
    model: TransformerBridge, prompts: lc.Prompts, confidence: Readout, before: Tensor, seed: int
) -> list[dict[str, object]]:
    """Effect of attention knockout from the query to the demonstrations' answers or controls."""
    spans = prompts.spans or {}
    place = torch.arange(prompts.tokens.shape[1])

    def within(name: str) -> Bool[Tensor, "prompt position"]:
        start, stop = spans[name].unbind(1)
        return (place >= start[:, None]) & (place < stop[:, None])

    shown = torch.stack([within(name) for name in spans if name.startswith("shown_")]).any(0)
    # The first token is an attention sink: the random control never hides it.
    rest = within("demonstrations") & ~shown & (place > 0)
    rng = np.random.default_rng([seed, 4])
    others = torch.zeros_like(rest)
    for row in range(len(rest)):
        candidates = np.flatnonzero(rest[row].numpy())
        n = min(int(shown[row].sum()), len(candidates))
        others[row, torch.from_numpy(rng.choice(candidates, n, replace=False))] = True
    hidden = {"answers": shown, "other tokens": others, "all but the first": rest | shown}
    return [
        {
            "metric": "cut",
            "method": name,
            "value": float((answers_cut_off(model, prompts, confidence, mask) - before).mean()),
        }
        for name, mask in hidden.items()
    ]


def chosen_layers(model: TransformerBridge, stride: int) -> list[int]:
    """Every ``stride``-th layer of the residual stream, and the last."""
    last = model.cfg.n_layers
    return sorted({*range(0, last + 1, stride), last})
