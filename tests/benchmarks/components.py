"""Label logits of every component: ours against the straightforward route, and all fits at once.

The peer keeps every head's output at every token, as `run_with_cache` gives it, spells out what
each head writes at the last token in ``d_model`` numbers, and norms and unembeds that for the
labels, in the batches that `decompose` forms by itself. Prompts are few-shot, so that ours may
run their demonstrations once; it is timed without that too. Rounds are interleaved.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import lensclust as lc
from lensclust.models.batching import batches, default_budget
from probes.components.component_logits import ComponentLogits
from probes.components.decomposition import decompose
from probes.components.reweighting import reweight_many

ROUNDS = 3
CHOICES = {"good": " good", "bad": " bad", "great": " great", "poor": " poor"}
CHOICES |= {"fine": " fine", "awful": " awful"}
# What a study fits: tasks (by how many labels they have) x seeds x templates, of few prompts.
LABELS, SEEDS, TEMPLATES, PROMPTS, FITS_LIMIT = (2, 4, 6, 2), 5, 3, 24, 10.0


def rows() -> list[dict[str, object]]:
    """One row for each way to decompose, one for memory, one for fits."""
    model: Any = lc.load("smollm2-135m-instruct")
    prompts = few_shot(model)
    ways = list(WAYS)
    times: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, np.ndarray] = {}
    for repetition in range(ROUNDS + 1):
        for way, run in WAYS.items():
            start = time.perf_counter()
            found[way] = run(model, prompts)
            if repetition:  # the first round warms up
                times[way].append(time.perf_counter() - start)
    peer = found["straightforward"]
    what = f"SmolLM2-135M: label logits of {peer.shape[1]} components, {len(prompts)} prompts"
    shared = {"peer": "heads in d_model numbers, then unembedding"}
    compared: list[dict[str, object]] = [
        {
            "what": f"{what}, {way}",
            **shared,
            "ours / peer": float(np.median(np.divide(times[way], times["straightforward"]))),
            "peer, seconds": float(np.median(times["straightforward"])),
            "largest difference": float(np.abs(found[way] - peer).max() / np.abs(peer).max()),
        }
        for way in ways[1:]
    ]
    peaks = {way: memory(way) for way in ways}
    compared += [
        {
            **row,
            "what": f"memory of it beyond the loaded model, {way}",
            "ours / peer": peaks[way] / peaks["straightforward"],
            "peer, MB": peaks["straightforward"],
        }
        for row, way in zip(compared, ways[1:], strict=True)
    ]
    return [*compared, fits(decompose(model, prompts, CHOICES, progress=False))]


def fits(components: ComponentLogits) -> dict[str, object]:
    """All weights of a study, penalties chosen, against its ten seconds."""
    problems = study(components)
    start = time.perf_counter()
    found = reweight_many(problems)
    seconds = time.perf_counter() - start
    return {
        "what": f"{len(problems)} reweightings of {components.logits.sizes['component']} "
        f"components from {PROMPTS} labels, penalties chosen",
        "peer": f"{FITS_LIMIT:g} seconds",
        "ours / peer": seconds / FITS_LIMIT,
        "seconds": seconds,
        # By how much an objective may lie above its least, in nats.
        "largest difference": max(each.gap for each in found),
    }


def study(components: ComponentLogits) -> list[ComponentLogits]:
    """Problems as large as a study's, of real logits; of more than two labels they are dealt."""
    problems = []
    for number, (labels, _, _) in enumerate(product(LABELS, range(SEEDS), range(TEMPLATES))):
        rng = np.random.default_rng(number)
        some = components.take(rng.permutation(len(components.targets))[:PROMPTS]).data
        some = some.isel(label=slice(labels))
        if labels > 2:
            dealt = rng.choice(some["label"].values, PROMPTS).astype(object)
            some = some.assign_coords(target=("prompt", dealt))
        problems.append(ComponentLogits(some, components.error))
    return problems


def few_shot(model: Any, n: int = 96) -> lc.Prompts:
    """Reviews to be judged after four demonstrations, the same before all."""
    said = {
        "good": ("great", "lovely", "moving", "clever"),
        "bad": ("dull", "weak", "silly", "flat"),
    }
    nouns = ("film", "plot", "cast", "score", "ending", "script", "pace", "camera")
    texts, labels = [], []
    for label, noun, other in product(said, nouns, nouns):
        word = said[label][(nouns.index(noun) + nouns.index(other)) % 4]
        texts.append(f"Review: The {noun} and the {other} were {word}.\nVerdict:")
        labels.append(label)
    order = np.random.default_rng(0).permutation(len(texts))[: n + 4]
    shots = "".join(f"{texts[i]} {labels[i]}\n\n" for i in order[:4])
    asked = order[4:]
    frame = pd.DataFrame({"label": [labels[i] for i in asked]})
    return lc.Prompts.from_texts([shots + texts[i] for i in asked], frame, model.tokenizer)


def ours(model: Any, prompts: lc.Prompts, *, share: bool) -> np.ndarray:
    """Label logits of heads and MLPs ``(prompt, component, label)``."""
    found = decompose(model, prompts, CHOICES, share_prefixes=share, progress=False)
    return found.logits.values[:, 1:-1]


@torch.no_grad()
def straightforward(model: Any, prompts: lc.Prompts) -> np.ndarray:
    """The same, for a model with RMSNorm, every head's output spelt out."""
    labels = [
        model.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in CHOICES.values()
    ]
    blocks = range(model.cfg.n_layers)
    kept = [f"blocks.{block}.attn.hook_z" for block in blocks]
    kept += [f"blocks.{block}.hook_mlp_out" for block in blocks]
    w_o = torch.stack([model.blocks[block].attn.W_O for block in blocks])
    out = np.empty((len(prompts), len(blocks) * (model.cfg.n_heads + 1), len(labels)), np.float32)
    for chosen in batches(model, prompts.lengths, default_budget(model)):
        lengths = prompts.lengths[chosen]
        tokens = prompts.tokens[chosen, : int(lengths.max())]
        _, cache = model.run_with_cache(tokens, names_filter=[*kept, "ln_final.hook_scale"])
        at = (torch.arange(len(chosen)), lengths - 1)
        z = torch.stack([cache[name][at] for name in kept[: len(blocks)]], dim=1)
        heads = torch.einsum("rbhd,bhdm->rbhm", z, w_o).flatten(1, 2)
        mlps = torch.stack([cache[name][at] for name in kept[len(blocks) :]], dim=1)
        normed = torch.cat([heads, mlps], dim=1) / cache["ln_final.hook_scale"][at][:, None]
        out[chosen] = (normed * model.ln_final.weight @ model.W_U[:, labels]).numpy()
    return out


def memory(way: str) -> float:
    """Peak resident memory beyond the loaded model, in MB, of a fresh process."""
    program = f"from tests.benchmarks.components import _peak; _peak({way!r})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def _peak(way: str) -> None:
    model: Any = lc.load("smollm2-135m-instruct")
    prompts = few_shot(model)
    # Weights are mapped from their file: one prompt and a digest of all bring them in.
    straightforward(model, prompts.take([0]))
    lc.fingerprint(model)
    # Loading has a peak of its own: count from here.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    WAYS[way](model, prompts)
    print(resident("VmHWM") - before)


def resident(kind: str) -> float:
    """What this process holds (``VmRSS``), or held at most (``VmHWM``), in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{kind}:")[2].split()[0]) / 1024


WAYS: dict[str, Callable[[Any, lc.Prompts], np.ndarray]] = {
    "straightforward": straightforward,
    "every prompt in full": partial(ours, share=False),
    "demonstrations run once": partial(ours, share=True),
}


if __name__ == "__main__":
    print(pd.DataFrame(rows()).to_string())
