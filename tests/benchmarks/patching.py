"""Patching every head at the last token: ours against one forward a patch.

The peer is TransformerLens' `generic_activation_patch`, restricted to the last position, so both
do the same patches on the same pairs. Each round times both; the ratio is the median.
"""

from __future__ import annotations

import contextlib
import io
import time
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformer_lens.patching import generic_activation_patch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lensclust as lc
from lensclust.models.native import native_config
from probes.patching.patching import patch

TOKENS, PAIRS, ROUNDS, VOCABULARY = 64, 2, 2, 1000


def rows() -> list[dict[str, object]]:
    """One row for each model."""
    return [_compare(name, model) for name, model in _models()]


def _models() -> list[tuple[str, Any]]:
    shared: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    gpt2 = GPT2Config(**shared, n_positions=128, n_embd=384, n_layer=12, n_head=12)
    llama = LlamaConfig(
        **shared,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    native = native_config(
        "sif-small", n_layers=4, n_heads=8, d_model=256, d_vocab=VOCABULARY, n_ctx=256
    )
    torch.manual_seed(0)
    return [
        ("GPT-2, 12 layers of 12 heads", lc.load(GPT2LMHeadModel(gpt2).eval())),
        ("Llama, 4 layers of 8 heads, 2 of keys", lc.load(LlamaForCausalLM(llama).eval())),
        ("native, 4 layers of 8 heads", lc.load(native)),
    ]


def _pairs() -> tuple[lc.Prompts, lc.Prompts]:
    rng = np.random.default_rng(0)
    labels = pd.DataFrame({"pair": range(PAIRS)})
    base, source = (
        lc.Prompts.from_token_lists(
            rng.integers(0, VOCABULARY, (PAIRS, TOKENS)).tolist(),
            labels,
            answers=[[first + pair] for pair in range(PAIRS)],
        )
        for first in (0, PAIRS)
    )
    return base, source


def _compare(name: str, model: Any) -> dict[str, object]:
    base, source = _pairs()
    number = torch.arange(PAIRS)
    heads = [(b, h) for b in range(model.cfg.n_layers) for h in range(model.cfg.n_heads)]
    cells = pd.DataFrame(heads, columns=["layer", "head"])

    def put(state: torch.Tensor, cell: Any, donor: Any) -> torch.Tensor:
        head = cell[1]
        state[:, -1, head] = donor[:, -1, head]
        return state

    def gap(logits: torch.Tensor) -> torch.Tensor:
        return logits[number, -1, number + PAIRS] - logits[number, -1, number]

    @torch.no_grad()
    def peer() -> np.ndarray:
        wanted = [f"blocks.{block}.attn.hook_z" for block in range(model.cfg.n_layers)]
        _, donors = model.run_with_cache(source.tokens, names_filter=wanted)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            found = generic_activation_patch(
                model, base.tokens, donors, gap, put, "z", index_df=cells, reduce="none"
            )
        return (found.values - gap(model(base.tokens))).numpy()

    def ours() -> np.ndarray:
        return patch(model, base, source, "head").effects.values[:, 0]

    times: dict[str, list[float]] = {"peer": [], "ours": []}
    found: dict[str, np.ndarray] = {}
    for repetition in range(ROUNDS + 1):
        for way, run in (("peer", peer), ("ours", ours)):
            start = time.perf_counter()
            found[way] = run()
            if repetition:  # the first round warms up
                times[way].append(time.perf_counter() - start)
    return {
        "what": f"{name}: all {len(heads)} heads at the last of {TOKENS} tokens, {PAIRS} pairs",
        "peer": "TransformerLens generic_activation_patch",
        "ours / peer": float(np.median(np.divide(times["ours"], times["peer"]))),
        "peer, seconds": float(np.median(times["peer"])),
        "largest difference": float(np.abs(found["ours"] - found["peer"]).max()),
    }


if __name__ == "__main__":
    print(pd.DataFrame(rows()).to_string())
