"""Attention ratios against the plain forward: what reading patterns inside it costs.

The peers are the same weights in transformers with eager attention, unhooked: one makes the
logits of every token as it does by default, the other those of the last alone. Rounds are
interleaved. What is read is compared with the weights that transformers itself gives out
(``output_attentions=True``), prompt by prompt. Memory is measured at two numbers of prompts.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM

import lensclust as lc
from lensclust.models.batching import ACCELERATOR_TOKENS, BATCH_TOKENS, cut_by_length
from probes.attention.ratio import WEIGHTINGS, attention_ratio

TOKENS, PROMPTS, FULL_PROMPTS, ROUNDS, LIMIT = 256, 16, 1_000, 3, 1.3
SPANS = {"relevant": (100, 108), "irrelevant": (140, 152), "query": (64, TOKENS)}
# What the allocator keeps has settled after a few batches.
MEMORY_PROMPTS = (16, 48)
MODEL = "smollm2-135m-instruct"


def rows(*, full: bool = False) -> list[dict[str, object]]:
    """One row for each weighting and peer, one for memory."""
    model: Any = lc.load(MODEL)
    network = unhooked(model)
    given = prompts(FULL_PROMPTS if full else PROMPTS)
    ways = {**PEERS, **OURS}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for way, run in ways.items():  # warms up
        run(network if way in PEERS else model, given.take([0]))
    for _ in range(1 if full else ROUNDS):
        for way, run in ways.items():
            start = time.perf_counter()
            run(network if way in PEERS else model, given)
            times[way].append(time.perf_counter() - start)
    difference = largest_difference(model, network, given.take(range(4)))
    compared: list[dict[str, object]] = []
    for way in OURS:
        for peer in PEERS:
            ratio = float(np.median(np.divide(times[way], times[peer])))
            row: dict[str, object] = {
                "what": f"SmolLM2-135M: attention ratios of {len(given)} prompts of {TOKENS} "
                f"tokens, {way}",
                "peer": peer,
                "ours / peer": ratio,
                "peer, seconds": float(np.median(times[peer])),
                "largest difference": difference,
            }
            if "gradient" not in way:
                row |= {"limit": LIMIT, "share of limit": ratio / LIMIT}
            compared.append(row)
    few, many = MEMORY_PROMPTS
    for way in (list(OURS)[1], list(OURS)[-1]):
        peaks = {n: memory(n, way) for n in MEMORY_PROMPTS}
        compared.append(
            {
                "what": f"memory of it beyond the loaded model, {many} prompts, {way}",
                "peer": f"{few} prompts",
                "ours / peer": peaks[many] / peaks[few],
                "peer, MB": peaks[few],
                "largest difference": difference,
            }
        )
    return compared


def unhooked(model: Any) -> Any:
    """The same weights in transformers alone."""
    config = model.original_model.config
    return AutoModelForCausalLM.from_pretrained(
        config.name_or_path, attn_implementation="eager", dtype=torch.float32
    ).eval()


def prompts(n: int) -> lc.Prompts:
    """Random tokens, all prompts equally long and none alike."""
    ids = np.random.default_rng(0).integers(100, 40_000, (n, TOKENS)).tolist()
    labels = pd.DataFrame({"prompt_number": range(n)})
    spans = {name: [span] * n for name, span in SPANS.items()}
    return lc.Prompts.from_token_lists(ids, labels, answers=[[5]] * n, spans=spans)


def ours(model: Any, given: lc.Prompts, *, weighting: tuple[str, ...]) -> Any:
    """All ratios, with their null."""
    return attention_ratio(model, given, weighting=weighting, progress=False)


@torch.no_grad()
def plain(network: Any, given: lc.Prompts, **options: Any) -> None:
    """Nothing but the forward, in the same batches."""
    budget = BATCH_TOKENS.get(network.device.type, ACCELERATOR_TOKENS)
    for chosen in cut_by_length(given.lengths, budget):
        network(given.tokens[chosen], use_cache=False, **options)


@torch.no_grad()
def largest_difference(model: Any, network: Any, given: lc.Prompts) -> float:
    """Of the mean weights, relative to the largest."""
    found = ours(model, given, weighting=("attention",)).values
    expected = []
    for row in given.tokens:
        patterns = network(row[None], use_cache=False, output_attentions=True).attentions
        last = torch.stack([pattern[0, :, -1] for pattern in patterns])
        expected.append(
            [last[..., slice(*SPANS[side])].mean(-1) for side in ("relevant", "irrelevant")]
        )
    worst = 0.0
    for place, side in enumerate(("relevant", "irrelevant")):
        whole = torch.stack([each[place] for each in expected]).numpy()
        got = found[side].values[0]
        worst = max(worst, float(np.abs(got - whole).max() / whole.max()))
    return worst


def memory(n: int, way: str) -> float:
    """Peak resident memory beyond the loaded model, in MB, of a fresh process."""
    program = f"from tests.benchmarks.attention import _peak; _peak({n}, {way!r})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def _peak(n: int, way: str) -> None:
    model: Any = lc.load(MODEL)
    given = prompts(n)
    # Weights are mapped from their file: one prompt and a digest of all bring them in.
    plain(model.original_model, given.take([0]))
    lc.fingerprint(model)
    # Loading has a peak of its own: count from here.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    OURS[way](model, given)
    print(_resident("VmHWM") - before)


def _resident(kind: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{kind}:")[2].split()[0]) / 1024


PEERS: dict[str, Callable[[Any, lc.Prompts], None]] = {
    "plain eager forward": plain,
    "plain eager forward, last logits only": partial(plain, logits_to_keep=1),
}
OURS: dict[str, Callable[[Any, lc.Prompts], Any]] = {
    "attention": partial(ours, weighting=("attention",)),
    "attention and value": partial(ours, weighting=("attention", "value")),
    "attention, value and gradient (a backward)": partial(ours, weighting=WEIGHTINGS),
}


if __name__ == "__main__":
    print(pd.DataFrame(rows(full="--full" in sys.argv)).to_string())
