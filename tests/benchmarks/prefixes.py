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
    PreTrainedModel,
)

import lensclust as lc
from lensclust.models.batching import cut_by_length, default_budget
from lensclust.models.downloads import PINS, fetch
from lensclust.models.huggingface import save_converted
from tests.lensclust.tasks.test_instruction_induction import REAL

MODEL = "smollm2-135m-instruct"
ROUNDS = 3
# Prompts of one round of instruction_induction: eight instructions of twenty inputs.
PART = 160
BARE, FULL = "bare HF forward, output_hidden_states", "extract, share_prefixes=False"

Read = Callable[[lc.Prompts], np.ndarray]


def rows(full: bool = False) -> Iterator[dict[str, object]]:
    """One row for each kind of prompts and peer.

    Args:
        full: every prompt of instruction_induction in one round; takes half an hour.
    """
    yield from _pretrained(full)
    yield from _unrelated_in_a_small_model()


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
        number = f"{len(prompts):,} prompts" if full else f"{ROUNDS} x {PART} of {len(prompts):,}"
        rounds = [prompts] if full else _parts(prompts)
        yield from _compare(f"{title} ({number})", model, rounds, peers)
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


def _parts(prompts: lc.Prompts) -> list[lc.Prompts]:
    """Stretches of neighbouring prompts, from the first to the last."""
    starts = np.linspace(0, (len(prompts) - PART) // PART, ROUNDS).astype(int) * PART
    return [prompts.take(range(start, start + PART)) for start in starts]


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
        for rows in cut_by_length(prompts.lengths, budget):
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


if __name__ == "__main__":
    for row in rows(full="--full" in sys.argv):
        print(*(f"{name}: {value}" for name, value in row.items()), sep="\n  ", flush=True)
