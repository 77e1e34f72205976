"""Activation of heads: ours against attention matrices whose gradients are retained.

The peer is the route of the authors' published script, for transformers alone: eager attention,
gradients retained on every attention matrix, the mean loss of a batch of four, and gradients of
all parameters on the way, which are thrown away. The script changes the source of a model for
that; `output_attentions` gives the same matrices. It pads to a fixed length, which is spared the
peer here: all prompts are equally long. A second peer has its parameters frozen, a third also
takes a prompt at a time; ours takes two at this length. Rounds are interleaved.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM

import lensclust as lc
from lensclust.models.downloads import PINS, fetch
from lensclust.models.huggingface import save_converted
from probes.heads.activation import head_activation
from tests.benchmarks.components import resident

NAME = "smollm2-135m-instruct"
ROUNDS = 3
TOKENS, ANSWER, PROMPTS = 512, 64, 4


@dataclass(frozen=True)
class Way:
    """How numbers of every prompt, block and head are come by, and of which model."""

    load: Callable[[], Any]
    run: Callable[[Any, lc.Prompts], np.ndarray]


def rows() -> list[dict[str, object]]:
    """Time and memory, ours against each peer."""
    models = {way.load: way.load() for way in (OURS, *PEERS.values())}
    prompts = long_prompts()
    ways = {"ours": OURS, "ours, four at once": FOUR, **PEERS}
    times: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, np.ndarray] = {}
    for way in ways.values():  # warms up
        way.run(models[way.load], prompts.take([0]))
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.perf_counter()
            found[name] = way.run(models[way.load], prompts)
            times[name].append(time.perf_counter() - start)
    del models
    peaks = {name: memory(name) for name in ways}
    pairs = [("ours", peer) for peer in PEERS] + [("ours, four at once", next(iter(PEERS)))]
    compared: list[dict[str, Any]] = []
    for ours, peer in pairs:
        detail = ours.removeprefix("ours")
        what = f"SmolLM2-135M: activation of its heads, {PROMPTS} prompts of {TOKENS} tokens"
        difference = np.abs(found[ours] - found[peer]).max() / np.abs(found[peer]).max()
        shared = {"peer": f"attention matrices, {peer}", "largest difference": float(difference)}
        time_ratio = float(np.median(np.divide(times[ours], times[peer])))
        seconds = float(np.median(times[peer]))
        compared += [
            {"what": f"{what}{detail}", **shared}
            | {"ours / peer": time_ratio, "peer, seconds": seconds},
            {"what": f"memory of it beyond the loaded model{detail}", **shared}
            | {"ours / peer": peaks[ours] / peaks[peer], "peer, MB": peaks[peer]},
        ]
    return compared


def long_prompts() -> lc.Prompts:
    """Instructions one after the other, so many tokens that each prompt's answer included."""
    tokenizer = lc.load(NAME).tokenizer
    texts = lc.tasks.natural(tokenizer).texts or ()
    ids = tokenizer("\n".join(texts), add_special_tokens=False)["input_ids"]
    parts = [ids[TOKENS * i : TOKENS * (i + 1)] for i in range(PROMPTS)]
    rows = pd.DataFrame({"task": range(PROMPTS)})
    answers = [part[-ANSWER:] for part in parts]
    return lc.Prompts.from_token_lists([part[:-ANSWER] for part in parts], rows, answers=answers)


def ours(model: Any, prompts: lc.Prompts, *, batch_tokens: int | None = None) -> np.ndarray:
    """By a gate on every head."""
    return head_activation(model, prompts, batch_tokens=batch_tokens).signed.values


def matrices(network: Any, prompts: lc.Prompts, *, batch: int, frozen: bool) -> np.ndarray:
    """By attention matrices and their gradients."""
    network.requires_grad_(not frozen)
    tokens, _, answered = prompts.with_answers()
    parts = [
        _of_batch(network, tokens[rows], answered[rows])
        for rows in torch.arange(len(prompts)).split(batch)
    ]
    return torch.cat(parts).numpy()


def _of_batch(network: Any, tokens: torch.Tensor, answered: torch.Tensor) -> torch.Tensor:
    states = network.get_input_embeddings()(tokens)
    # A matrix has a gradient only if something below it asks for one.
    states = states if states.requires_grad else states.requires_grad_()
    labels = tokens.masked_fill(~answered, -100)
    out = network(inputs_embeds=states, labels=labels, output_attentions=True, use_cache=False)
    for matrix in out.attentions:
        matrix.retain_grad()
    out.loss.backward()
    each = [(matrix * matrix.grad).sum((2, 3)) for matrix in out.attentions]
    network.zero_grad()
    # Of the mean over all answer tokens of the batch, a prompt's mean is this share.
    counts = answered.sum(1)
    share = counts / counts.sum()
    return torch.stack(each, dim=1).detach() / share[:, None, None]


def hooked() -> Any:
    """The model that ours runs."""
    return lc.load(NAME)


def eager() -> Any:
    """The model that peers run."""
    folder = fetch(NAME, PINS[NAME], save_converted)
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def memory(name: str) -> float:
    """Peak resident memory beyond the loaded model, in MB, of a fresh process.

    Of all ways alike: what a tensor held goes back to the system when it is freed, so that the
    peak is of memory in use, not of what the allocator keeps between small tensors.
    """
    program = f"from tests.benchmarks.head_activation import _peak; _peak({name!r})"
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.split()[-1])


def _peak(name: str) -> None:
    way = {"ours": OURS, "ours, four at once": FOUR, **PEERS}[name]
    model, prompts = way.load(), long_prompts()
    # Weights are mapped from their file: a few tokens and a digest of all bring them in.
    short = lc.Prompts.from_token_lists([[1, 2]], prompts.rows.iloc[:1], answers=[[3]])
    way.run(model, short)
    lc.fingerprint(model)
    # Loading has a peak of its own: count from here.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    way.run(model, prompts)
    print(resident("VmHWM") - before)


OURS = Way(hooked, ours)
FOUR = Way(hooked, partial(ours, batch_tokens=4 * TOKENS))
PEERS = {
    "as the script": Way(eager, partial(matrices, batch=4, frozen=False)),
    "parameters frozen": Way(eager, partial(matrices, batch=4, frozen=True)),
    "parameters frozen, one at a time": Way(eager, partial(matrices, batch=1, frozen=True)),
}


if __name__ == "__main__":
    print(pd.DataFrame(rows()).to_string())
