"""How the time of `extract` grows with what it is given: ``b`` of ``time = a * size ** b``.

One size is doubled, everything else stays. Of the rounds of a size the fastest counts: it is the
one that others on the machine disturbed least. The fit goes through all sizes; beside it stands
the steepest of its steps, in which a fixed cost hides less.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from transformers import LlamaConfig, LlamaForCausalLM

import lensclust as lc
from lensclust.models.native import native_config

ROUNDS = 3
# What was asked of the exponents.
MOST = {"prompts": 1.05, "layers": 1.1}
VOCABULARY = 128
Given = tuple[Any, lc.Prompts]


def rows(full: bool = False) -> list[dict[str, object]]:
    """One row for each model and thing that grows.

    Args:
        full: two doublings more of prompts and layers.
    """
    more = 2 if full else 0
    out = []
    for name, build in {"native": _native, "Llama, shared prefixes": _llama}.items():
        model, prompts = build(4), _prompts(tasks=20)
        sizes = {
            "prompts": {n: (model, _prompts(tasks=n // 50)) for n in _doubled(1000, 4 + more)},
            "layers": {n: (build(n), prompts) for n in _doubled(2, 4 + more)},
            "tokens of a prompt": {
                n: (model, _prompts(tasks=20, tokens=n)) for n in _doubled(32, 4)
            },
            "tasks of 1,000 prompts": {
                n: (model, _prompts(tasks=n, each=1000 // n)) for n in _doubled(8, 5)
            },
        }
        out += [
            {"what": f"{name}: {what}", "at most": MOST.get(what), **_exponent(given)}
            for what, given in sizes.items()
        ]
    return out


def _doubled(start: int, sizes: int) -> list[int]:
    return [start * 2**power for power in range(sizes)]


def _native(layers: int) -> Any:
    config = native_config("sif-small", n_layers=layers, d_vocab=VOCABULARY, n_ctx=256)
    return lc.load(config, device="cpu")


def _llama(layers: int) -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return lc.load(LlamaForCausalLM(config).eval())


def _prompts(*, tasks: int, each: int = 50, tokens: int = 44) -> lc.Prompts:
    """A preamble, an instruction for each task, and inputs: a quarter, half and a quarter."""
    rng = np.random.default_rng(0)
    quarter = tokens // 4
    preamble = rng.integers(0, VOCABULARY, quarter).tolist()
    instructions = rng.integers(0, VOCABULARY, (tasks, 2 * quarter)).tolist()
    ids = [
        [*preamble, *instruction, *rng.integers(0, VOCABULARY, quarter).tolist()]
        for instruction in instructions
        for _ in range(each)
    ]
    return lc.Prompts.from_token_lists(ids, pd.DataFrame({"n": range(len(ids))}))


def _exponent(sizes: Mapping[int, Given]) -> dict[str, object]:
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(ROUNDS):
        for size, (model, prompts) in sizes.items():
            start = time.perf_counter()
            lc.extract(model, prompts, "resid", progress=False)
            seconds[size].append(time.perf_counter() - start)
    least = {size: min(each) for size, each in seconds.items()}
    x, y = np.log(list(least)), np.log(list(least.values()))
    return {
        "sizes": f"{min(sizes):,} to {max(sizes):,}",
        "exponent": float(np.polyfit(x, y, 1)[0]),
        "steepest step": float((np.diff(y) / np.diff(x)).max()),
        "seconds": least,
    }


if __name__ == "__main__":
    for row in rows():
        print(*(f"{name}: {value}" for name, value in row.items()), sep="\n  ")
