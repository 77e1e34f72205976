"""Prompts that begin alike: `extract` with shared prefixes against the bare forward.

The peer runs every prompt in full, in the batches that `extract` forms by default, and keeps all
hidden states, as one writes it by hand with Hugging Face alone. The limit is what sharing can
gain at best: tokens in all prompts over tokens that must be computed. Reading in hooks and
leaving out the unembedding gains something beyond it. Rounds of all ways are interleaved, and
ratios are medians over the rounds.

The folder of instruction_induction is named by ``LENSCLUST_INSTRUCTION_INDUCTION``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import lensclust as lc
from lensclust.batching import batches, default_budget
from lensclust.downloads import PINS, fetch
from lensclust.native import native_config
from lensclust.pretrained import save_converted
from tests.lensclust.tasks.test_instruction_induction import REAL

MODEL = "smollm2-135m-instruct"
ROUNDS = 3
# Prompts of one round of instruction_induction: eight instructions of twenty inputs.
PART = 160
BARE, FULL = "bare HF forward, output_hidden_states", "extract, share_prefixes=False"

Read = Callable[[lc.Prompts], np.ndarray]


def rows(full: bool = False) -> list[dict[str, object]]:
    """One row for each kind of prompts and peer, then one for each thing that grows.

    Args:
        full: every prompt of instruction_induction, and larger sizes; takes most of an hour.
    """
    return [*_pretrained(full), *_unrelated_in_a_small_model(), *_growth(full)]


def _pretrained(full: bool) -> Iterator[dict[str, object]]:
    try:
        model = lc.load(MODEL, progress=False)
    except lc.InputError as error:
        yield {"what": f"{MODEL} with shared prefixes", "skipped": str(error)}
        return
    folder = fetch(MODEL, PINS[MODEL], save_converted)
    bare = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    peers = {BARE: _bare(bare, default_budget(model)), FULL: _extract(model, share_prefixes=False)}
    title = f"{MODEL}: instruction_induction in the chat template, 20 inputs an instruction"
    if (REAL / "execute").is_dir():
        prompts = lc.tasks.instruction_induction(REAL, model.tokenizer, inputs=20, chat=True)
        parts = _parts(prompts, 512 if full else PART, None if full else ROUNDS)
        yield from _compare(title, model, parts, peers)
    else:
        yield {"what": title, "skipped": f"no folder {REAL}"}
    title = f"{MODEL}: 100 queries behind 10 fixed demonstrations"
    yield from _compare(title, model, [_few_shot(model)] * ROUNDS, peers)
    title = f"{MODEL}: 60 prompts that share nothing"
    unrelated = _unrelated(60, vocabulary=model.cfg.d_vocab, longest=60)
    yield from _compare(title, model, [unrelated] * ROUNDS, {FULL: peers[FULL]})


def _unrelated_in_a_small_model() -> Iterator[dict[str, object]]:
    """Where planning weighs most: a forward of all prompts takes a second."""
    config = GPT2Config(
        vocab_size=1000, n_positions=64, n_embd=128, n_layer=6, n_head=4, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = lc.load(GPT2LMHeadModel(config).eval())
    prompts = _unrelated(1000, vocabulary=1000, longest=33)
    yield from _compare(
        "GPT-2, 6 layers: 1000 prompts that share nothing",
        model,
        [prompts] * 9,
        {FULL: _extract(model, share_prefixes=False)},
    )


def _parts(prompts: lc.Prompts, size: int, n: int | None) -> list[lc.Prompts]:
    """Stretches of neighbouring prompts: all of them, or so many from everywhere."""
    starts = np.arange(0, len(prompts), size)
    if n is not None:
        starts = starts[np.linspace(0, len(starts) - 2, n).astype(int)]
    return [prompts.take(range(start, min(start + size, len(prompts)))) for start in starts]


def _few_shot(model: Any) -> lc.Prompts:
    words = lc.tasks.natural(model.tokenizer).rows
    plurals = words[words["task"] == "plural"].drop_duplicates("input")
    shown = "\n".join(f"{x} -> {y}" for x, y in plurals[["input", "output"]].values[:10])
    asked = words.loc[words["task"] != "plural", "output"].drop_duplicates()[:100]
    texts = [f"{shown}\n{word} ->" for word in asked]
    return lc.Prompts.from_texts(texts, pd.DataFrame({"input": asked}), model.tokenizer)


def _unrelated(n: int, *, vocabulary: int, longest: int) -> lc.Prompts:
    rng = np.random.default_rng(0)
    first = rng.permutation(vocabulary)[:n].tolist()
    ids = [[one, *rng.integers(0, vocabulary, rng.integers(9, longest)).tolist()] for one in first]
    return lc.Prompts.from_token_lists(ids, pd.DataFrame({"n": range(n)}))


def _extract(model: Any, **options: Any) -> Read:
    """The residual stream of all layers at the last token."""
    return lambda prompts: lc.extract(
        model, prompts, "resid", progress=False, **options
    ).resid.values[:, 0]


def _bare(network: PreTrainedModel, budget: int) -> Read:
    @torch.no_grad()
    def read(prompts: lc.Prompts) -> np.ndarray:
        out = [np.empty(0)] * len(prompts)
        for rows in batches(prompts.lengths, budget):
            lengths = prompts.lengths[rows]
            tokens = prompts.tokens[rows, : int(lengths.max())]
            mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
            states = network(tokens, attention_mask=mask, output_hidden_states=True).hidden_states
            last = torch.stack([layer[range(len(rows)), lengths - 1] for layer in states], dim=1)
            for row, found in zip(rows.tolist(), last.numpy(), strict=True):
                out[row] = found
        return np.stack(out)

    return read


def _compare(
    title: str, model: Any, rounds: Sequence[lc.Prompts], peers: Mapping[str, Read]
) -> Iterator[dict[str, object]]:
    """Ours and the peers on each round's prompts."""
    ways = {"ours": _extract(model), **peers}
    for read in ways.values():  # the first call is slower
        read(rounds[0].take(range(2)))
    times: dict[str, list[float]] = {way: [] for way in ways}
    # Of this process alone: what others do on the machine at the time hardly counts.
    work: dict[str, list[float]] = {way: [] for way in ways}
    errors: dict[str, list[float]] = {way: [] for way in peers}
    for prompts in rounds:
        found = {}
        for way, read in ways.items():
            start, begun = time.perf_counter(), time.process_time()
            found[way] = read(prompts)
            times[way].append(time.perf_counter() - start)
            work[way].append(time.process_time() - begun)
        for way in peers:
            errors[way].append(_error(found["ours"], found[way]))
    limits = [lc.plan_prefixes(model, prompts).limit for prompts in rounds]
    for way in peers:
        ratio = np.divide(times["ours"], times[way])
        yield {
            "what": title,
            "peer": way,
            "ours / peer": float(np.median(ratio)),
            "peer, seconds": float(np.median(times[way])),
            "largest difference": max(errors[way]),
            "times faster": float(np.median(1 / ratio)),
            "limit": float(np.median(limits)),
            "share of limit": float(np.median(1 / ratio / limits)),
            "times faster in each round": [round(float(each), 3) for each in 1 / ratio],
            "times less processor time": float(np.median(np.divide(work[way], work["ours"]))),
        }


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    """Of any layer's state of any prompt, relative to its norm.

    Hugging Face's last state has the final norm applied, so it is left out.
    """
    found, expected = found[:, :-1], expected[:, :-1]
    norms = np.linalg.norm(expected, axis=-1)
    return float((np.linalg.norm(found - expected, axis=-1) / norms).max())


# -- cost against size --------------------------------------------------------------------


def _growth(full: bool) -> Iterator[dict[str, object]]:
    """Exponents ``b`` of ``time = a * size ** b``, fitted over sizes that double."""
    longest = 5 if full else 3
    native = lc.load("native:sif-small", device="cpu")
    alike = _alike(1000 * 2**longest)
    for name, model in (("native", native), ("Llama, shared prefixes", _llama(4))):
        yield _exponent(
            f"{name}: prompts",
            1.05,
            {
                1000 * 2**power: (model, alike.take(range(1000 * 2**power)))
                for power in range(longest + 1)
            },
        )
    depths = [2 * 2**power for power in range(longest + 2)]
    natives = {n: lc.load(native_config("sif-small", n_layers=n), device="cpu") for n in depths}
    llamas = {n: _llama(n) for n in depths}
    for name, models in (("native", natives), ("Llama, shared prefixes", llamas)):
        some = alike.take(range(1000))
        yield _exponent(f"{name}: layers", 1.1, {n: (models[n], some) for n in depths})


def _llama(layers: int) -> Any:
    config = LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=384, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return lc.load(LlamaForCausalLM(config).eval())


def _alike(n: int) -> lc.Prompts:
    """A preamble, an instruction for every fifty prompts, and inputs."""
    rng = np.random.default_rng(0)
    preamble = rng.integers(0, 128, 12).tolist()
    instructions = rng.integers(0, 128, (n // 50 + 1, 24)).tolist()
    ids = [
        [*preamble, *instructions[row // 50], *rng.integers(0, 128, rng.integers(4, 12)).tolist()]
        for row in range(n)
    ]
    return lc.Prompts.from_token_lists(ids, pd.DataFrame({"n": range(n)}))


def _exponent(
    title: str, bound: float, sizes: Mapping[int, tuple[Any, lc.Prompts]]
) -> dict[str, object]:
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(ROUNDS):
        for size, (model, prompts) in sizes.items():
            start = time.perf_counter()
            lc.extract(model, prompts, "resid", progress=False)
            times[size].append(time.perf_counter() - start)
    # The least of a size's times is the one that others disturbed least.
    least = [min(each) for each in times.values()]
    exponent = float(np.polyfit(np.log(list(sizes)), np.log(least), 1)[0])
    return {
        "what": f"time exponent, {title} {min(sizes):,} to {max(sizes):,}",
        "peer": f"at most {bound}",
        "ours / peer": exponent / bound,
        "exponent": exponent,
        "seconds": least,
    }


if __name__ == "__main__":
    for row in rows(full="--full" in sys.argv):
        print(*(f"{name}: {value}" for name, value in row.items()), sep="\n  ")
