"""Reading every layer at the last token: ours against TransformerLens, nnsight and Hugging Face.

Each peer runs the very batches that `extract` forms (sorted by length, same sizes), so a ratio
shows the reading alone. Repetitions are interleaved, and the ratio is the median over them.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

try:
    nnsight: Any = import_module("nnsight")
except ImportError:
    nnsight = None

import lensclust as lc
from lensclust.models.batching import batches, default_budget
from lensclust.models.downloads import PINS, fetch
from lensclust.models.huggingface import save_converted

# The small model takes a second a round, and its ratios scatter more.
REPETITIONS = {"SmolLM2-135M": 3, "SmolLM2-135M, 512 tokens": 3, "GPT-2, 6 layers": 9}
# Caching everything for 150 prompts of SmolLM2 at once would take 27 GB (0.9 GB for five).
FITS_AT_ONCE = ("GPT-2, 6 layers",)
Read = Callable[[], np.ndarray]


def rows() -> list[dict[str, object]]:
    """One row for each model and peer."""
    model, bare, prompts = _smollm2()
    long = _random_prompts(8, lengths=(512, 513), tokens=bare.config.vocab_size)
    return [
        *_compare("SmolLM2-135M", model, bare, prompts),
        *_compare("SmolLM2-135M, 512 tokens", model, bare, long),
        *_compare("GPT-2, 6 layers", *_six_layers()),
    ]


def memory(n_prompts: int) -> float:
    """Peak resident memory, in MB, of a fresh process that stores ``n_prompts`` activations."""
    program = f"from tests.benchmarks.extraction import _store; _store({n_prompts})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def _store(n_prompts: int) -> None:
    model, _, prompts = _six_layers(n_prompts)
    with tempfile.TemporaryDirectory() as folder:
        lc.extract(model, prompts, ["resid", "head"], store=Path(folder) / "a", progress=False)
    # The kernel's own high-water mark; `ru_maxrss` would start from the parent's.
    status = Path("/proc/self/status").read_text()
    print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)


def _smollm2() -> tuple[Any, PreTrainedModel, lc.Prompts]:
    from transformers import AutoModelForCausalLM

    name = "smollm2-135m-instruct"
    model = lc.load(name)
    folder = fetch(name, PINS[name], save_converted)
    bare = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = lc.tasks.natural(model.tokenizer, chat=True)
    return model, bare, prompts.take(range(0, len(prompts), len(prompts) // 150)[:150])


def _six_layers(n: int = 1000) -> tuple[Any, PreTrainedModel, lc.Prompts]:
    attention: dict[str, Any] = {"attn_implementation": "sdpa"}
    config = GPT2Config(
        vocab_size=1000, n_positions=64, n_embd=128, n_layer=6, n_head=4, bos_token_id=0,
        eos_token_id=0, **attention,
    )  # fmt: skip
    torch.manual_seed(0)
    bare = GPT2LMHeadModel(config).eval()
    prompts = _random_prompts(n, lengths=(10, 33), tokens=1000)
    return lc.load(copy.deepcopy(bare)), bare, prompts


def _random_prompts(n: int, *, lengths: tuple[int, int], tokens: int) -> lc.Prompts:
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, tokens, rng.integers(*lengths)).tolist() for _ in range(n)]
    return lc.Prompts.from_token_lists(ids, pd.DataFrame({"task": rng.integers(0, 5, n)}))


@torch.no_grad()
def _compare(
    name: str, model, bare: PreTrainedModel, prompts: lc.Prompts
) -> Iterator[dict[str, object]]:
    n_layers = model.cfg.n_layers
    resid = [f"blocks.{layer}.hook_resid_pre" for layer in range(n_layers)]
    resid.append(f"blocks.{n_layers - 1}.hook_resid_post")

    def batched(read: Callable[[Tensor, Tensor], Tensor]) -> np.ndarray:
        out = np.empty((len(prompts), n_layers + 1, model.cfg.d_model), dtype=np.float32)
        for chosen in batches(model, prompts.lengths, default_budget(model)):
            lengths = prompts.lengths[chosen]
            tokens = prompts.tokens[chosen, : int(lengths.max())]
            out[chosen] = read(tokens, lengths - 1).numpy()
        return out

    def from_cache(keep: list[str] | None) -> Read:
        def read(tokens: Tensor, last: Tensor) -> Tensor:
            _, cache = model.run_with_cache(tokens, names_filter=keep)
            return torch.stack([cache[hook][range(len(last)), last] for hook in resid], dim=1)

        return lambda: batched(read)

    def from_trace(tokens: Tensor, last: Tensor) -> Tensor:
        places, mask = (range(len(last)), last), _mask(tokens, last)
        with traced.trace(tokens, attention_mask=mask):
            states = nnsight.save([blocks[0].input[places], *(b.output[places] for b in blocks)])
        return torch.stack(states, dim=1)

    def once() -> np.ndarray:
        _, cache = model.run_with_cache(prompts.tokens)
        last = prompts.lengths - 1
        return torch.stack([cache[hook][range(len(last)), last] for hook in resid], dim=1).numpy()

    def hugging_face(tokens: Tensor, last: Tensor) -> Tensor:
        states = bare(
            tokens, attention_mask=_mask(tokens, last), output_hidden_states=True
        ).hidden_states
        return torch.stack([layer[range(len(last)), last] for layer in states], dim=1)

    def ours() -> np.ndarray:
        acts = lc.extract(model, prompts, "resid", share_prefixes=False, progress=False)
        return acts.resid.values[:, 0]

    ways: dict[str, Read] = {
        "extract": ours,
        "run_with_cache, everything": from_cache(None),
        "run_with_cache, filtered": from_cache(resid),
        "bare HF forward, output_hidden_states": lambda: batched(hugging_face),
    }
    if nnsight is not None:
        # A copy: what wraps a network may change it for the others.
        traced = nnsight.NNsight(copy.deepcopy(bare))
        blocks = traced.transformer.h if hasattr(bare, "transformer") else traced.model.layers
        ways["nnsight, trace"] = lambda: batched(from_trace)
    else:
        yield {"what": f"{name}: nnsight, trace", "skipped": "nnsight is not installed"}
    if name in FITS_AT_ONCE:
        ways["run_with_cache, everything, all prompts in one call"] = once
    times: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, np.ndarray] = {}
    for repetition in range(REPETITIONS[name] + 1):
        for way, read in ways.items():
            start = time.perf_counter()
            found[way] = read()
            if repetition:  # the first round warms up
                times[way].append(time.perf_counter() - start)
    # Hugging Face's last state has the final norm applied, so it is left out.
    largest = np.abs(found["extract"])[:, :-1].max()
    for way in ways:
        if way != "extract":
            yield {
                "what": f"{name}: residual stream of all layers, "
                f"last token of {len(prompts)} prompts",
                "peer": way,
                "ours / peer": float(np.median(np.divide(times["extract"], times[way]))),
                "peer, seconds": float(np.median(times[way])),
                "largest difference": float(
                    np.abs(found[way] - found["extract"])[:, :-1].max() / largest
                ),
            }


def _mask(tokens: Tensor, last: Tensor) -> Tensor:
    return (torch.arange(tokens.shape[1]) <= last[:, None]).long()
