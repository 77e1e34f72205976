"""How much of the machine's matrix rate extraction reaches: model operations over the floor.

A forward up to the last layer does two operations a token with each weight of its blocks (scores
of attention, norms and what is read are not counted, so the share is a lower bound). The floor is
one large product in the same dtype, measured in the same process (`tests.benchmarks.floors`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from transformer_lens.model_bridge import TransformerBridge

import lensclust as lc
from tests.benchmarks.floors import matrix_rate, waited

MODEL = "smollm2-135m-instruct"
# One batch: so many tokens at once on a GPU. On a CPU, what leaves its caches free.
LENGTH, GPU_TOKENS, CPU_TOKENS = 512, 8192, 2048
GPU_BATCHES, CPU_BATCHES, ROUNDS = 16, 1, 3


def rows() -> Iterator[dict[str, object]]:
    """A row for the CPU, and one a dtype for the GPU; or why there is none."""
    yield _reached(torch.device("cpu"), torch.float32, CPU_TOKENS, CPU_BATCHES)
    for dtype in (torch.bfloat16, torch.float32):
        if torch.cuda.is_available():
            yield _reached(torch.device("cuda"), dtype, GPU_TOKENS, GPU_BATCHES)
        else:
            name = _what("GPU", dtype, GPU_TOKENS)
            yield {"what": name, "skipped": "no CUDA device here"}


def block_operations(model: TransformerBridge) -> int:
    """Operations a token in the blocks' products: two with each weight of a matrix."""
    network: Any = model.original_model
    weights = {id(w): w for layer in network.model.layers for w in layer.parameters()}
    return 2 * sum(weight.numel() for weight in weights.values() if weight.ndim == 2)


def _reached(device: torch.device, dtype: torch.dtype, tokens: int, n: int) -> dict[str, object]:
    model = lc.load(MODEL, device=device, dtype=dtype, progress=False)
    rng = np.random.default_rng(0)
    count = n * tokens // LENGTH
    ids = rng.integers(0, model.cfg.d_vocab, (count, LENGTH)).tolist()
    prompts = lc.Prompts.from_token_lists(ids, pd.DataFrame({"task": np.arange(count) % 2}))

    def read() -> xr.Dataset:
        return lc.extract(
            model, prompts, "resid", batch_tokens=tokens, shard=2 * tokens // LENGTH,
            share_prefixes=False, progress=False,
        )  # fmt: skip

    acts = read()
    # The floor moves with what else the machine does: measured between the rounds.
    shares, times = [], []
    for _ in range(ROUNDS):
        start = waited(device)
        read()
        times.append(waited(device) - start)
        shares.append(count * LENGTH * block_operations(model) / times[-1])
        shares[-1] /= matrix_rate(dtype, device)
    share = float(np.median(shares))
    return {
        "what": _what(
            "CPU" if device.type == "cpu" else torch.cuda.get_device_name(), dtype, tokens
        ),
        "peer": "a large product in the same dtype doing as many operations",
        "ours / peer": 1 / share,
        "share of the matrix rate": share,
        "ours, seconds": float(np.median(times)),
        "largest difference": _difference(acts, model, prompts, device),
    }


@torch.no_grad()
def _difference(
    acts: xr.Dataset, model: TransformerBridge, prompts: lc.Prompts, device: torch.device
) -> float:
    """From the hidden states of the first prompt alone, relative to the largest state."""
    ids = prompts.tokens[:1].to(device)
    states = model.original_model(ids, output_hidden_states=True).hidden_states
    # The last of them has the final norm applied.
    expected = torch.stack([state[0, -1] for state in states[:-1]]).float().cpu().numpy()
    found = acts.resid.values[0, 0, :-1]
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _what(where: str, dtype: torch.dtype, tokens: int) -> str:
    kind = str(dtype).removeprefix("torch.")
    return f"SmolLM2-135M, {kind}, {where}: residual stream, {tokens} tokens at once"


if __name__ == "__main__":
    for row in rows():
        print(*(f"{name}: {value}" for name, value in row.items()), sep="\n")
