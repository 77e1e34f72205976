"""Flows of label words against sums over pairs of tokens, from autograd in double precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import lensclust as lc
from probes.attention.label_words import FLOWS, label_word_flow
from tests.probes.attention.test_attention import alone, attentions, model_of
from tests.tiny import ARCHITECTURES, D_VOCAB

N = 4
LABELS = {"a": 7, "b": 11}


def prompts_of(seed: int = 0, **spans: list[tuple[int, int]]) -> lc.Prompts:
    """Shots of two tokens and a label each, then a query of two."""
    rng = np.random.default_rng(seed)
    shots = rng.integers(1, 4, N)
    tokens = rng.integers(12, D_VOCAB, (N, 20)).tolist()
    ids = [
        [row[0], *(t for k in range(n) for t in (*row[3 * k + 1 : 3 * k + 3], 7)), *row[-2:]]
        for row, n in zip(tokens, shots, strict=True)
    ]
    given = {
        f"label_words_{k}": [(3 * k + 3, 3 * k + 4) if k < shots[i] else (0, 0) for i in range(N)]
        for k in range(3)
    }
    answers = [[7], [11], [7], [11]]
    rows = pd.DataFrame({"label": [*"abab"]})
    return lc.Prompts.from_token_lists(ids, rows, answers=answers, spans={**given, **spans})


def by_hand(saliency: np.ndarray, words: list[int]) -> dict[str, float]:
    last = len(saliency) - 1
    pairs = {(i, j) for i in range(last + 1) for j in range(i)}
    into = {(p, j) for p in words for j in range(p)}
    out = {(last, p) for p in words}
    rest = pairs - into - out
    return {
        name: float(np.mean([saliency[pair] for pair in chosen]))
        for name, chosen in {"wp": into, "pq": out, "ww": rest}.items()
    }


@pytest.mark.parametrize("choices", [None, LABELS])
@pytest.mark.parametrize("name", ["native", *ARCHITECTURES])
def test_flows_are_means_over_pairs_of_the_saliency(name: str, choices: Any) -> None:
    model, prompts = model_of(name).double(), prompts_of()
    found = label_word_flow(model, prompts, choices=choices, draws=1, progress=False).values
    answers = prompts.answers
    assert answers is not None
    for row in range(N):
        logits, patterns = attentions(name, alone(prompts, row))
        given = logits[0, -1] if choices is None else logits[0, -1, list(LABELS.values())]
        right = answers[row][0]
        place = right if choices is None else list(LABELS.values()).index(right)
        gradients = torch.autograd.grad(-given.log_softmax(-1)[place], patterns)
        words = (alone(prompts, row)[0] == 7).nonzero()[:, 0].tolist()
        for block, (pattern, gradient) in enumerate(zip(patterns, gradients, strict=True)):
            saliency = (pattern * gradient).sum(1).abs()[0].detach().numpy()
            for flow, value in by_hand(saliency, words).items():
                got = float(found[flow].isel(prompt=row, block=block))
                assert got == pytest.approx(value, rel=1e-3, abs=1e-9)


def test_random_tokens_stand_in_for_label_words() -> None:
    """With as many other tokens as label words there is only one way to draw them."""
    model = model_of("gpt2")
    rows = pd.DataFrame({"label": ["a"]})
    spans = {"words": [(2, 3)], "others": [(1, 2)]}
    prompts = lc.Prompts.from_token_lists([[1, 2, 3, 4]], rows, answers=[[7]], spans=spans)
    found, swapped = (
        label_word_flow(model, prompts, words=name, progress=False).values for name in spans
    )
    for flow in ("wp", "pq"):
        np.testing.assert_allclose(found[f"{flow}_random"], swapped[flow], rtol=1e-5)


@pytest.mark.parametrize("budget", [1, 30])
def test_batches_and_padding_change_nothing(budget: int) -> None:
    model, prompts = model_of("llama"), prompts_of()
    whole = label_word_flow(model, prompts, progress=False)
    parts = label_word_flow(model, prompts, batch_tokens=budget, progress=False).values
    for flow in FLOWS:
        np.testing.assert_allclose(parts[flow], whole.values[flow], rtol=1e-3, atol=1e-8)
    means = whole.frame.groupby("flow")["value"].mean()
    assert means["wp"] == pytest.approx(float(whole.values["wp"].mean()), rel=1e-5)
    assert whole.plot().to_dict()["title"]
    assert "strongest wp at block" in repr(whole)


def test_wrong_input_is_one_clear_line() -> None:
    model, prompts = model_of("native"), prompts_of()
    refused: dict[str, Any] = {
        "no span ['shown']: these": {"words": "shown"},
        "prompt 0 has no label word in spans ['nowhere']": {"words": "nowhere"},
        "expected after its first token and before the query at": {"words": "late"},
        "position 'middle' does not exist": {"query": "middle"},
        "expected one of the labels [7, 12]": {"choices": {"a": 7, "b": 12}},
        "draws=0": {"draws": 0},
    }
    last = int(prompts.lengths.min())
    prompts = prompts_of(nowhere=[(0, 0)] * N, late=[(last - 1, last)] * N)
    for words, options in refused.items():
        with pytest.raises(lc.InputError) as caught:
            label_word_flow(model, prompts, progress=False, **options)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    rows = pd.DataFrame({"label": ["a"]})
    spans = {"label_words": [(1, 2)]}
    short = lc.Prompts.from_token_lists([[1, 2, 3]], rows, answers=[[7]], spans=spans)
    with pytest.raises(lc.InputError, match="1 label words and 0 other tokens"):
        label_word_flow(model, short, progress=False)
