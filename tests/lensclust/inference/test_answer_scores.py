"""Answer scores against log-softmax by hand, and what is written against one-by-one decoding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import PreTrainedModel

import lensclust as lc
from lensclust.inference.answer_scores import answer_scores, greedy_texts
from tests.tiny import D_VOCAB, hf_model, tiny_tokenizer


@pytest.fixture(scope="module")
def network() -> PreTrainedModel:
    return hf_model("llama")


def some_prompts(network: PreTrainedModel, n: int = 9) -> lc.Prompts:
    """Prompts of several lengths; every third answer is what the model itself would say."""
    generator = torch.Generator().manual_seed(0)
    ids, answers = [], []
    for row in range(n):
        tokens = torch.randint(4, D_VOCAB, (3 + row % 4,), generator=generator).tolist()
        answer = torch.randint(4, D_VOCAB, (1 + row % 3,), generator=generator).tolist()
        if row % 3 == 0:
            answer = []
            for _ in range(1 + row % 2):
                with torch.no_grad():
                    logits = network(torch.tensor([tokens + answer])).logits
                answer.append(int(logits[0, -1].argmax()))
        ids.append(tokens)
        answers.append(answer)
    return lc.Prompts.from_token_lists(ids, pd.DataFrame({"row": range(n)}), answers=answers)


@pytest.mark.parametrize("batch_tokens", [8, 10_000])
def test_scores_are_those_of_one_forward_a_prompt(network: PreTrainedModel, batch_tokens: int):
    model = lc.load(hf_model("llama"))
    prompts = some_prompts(network)
    others = [[4 + row] for row in range(len(prompts))]
    found: Any = answer_scores(model, prompts, others=others, batch_tokens=batch_tokens)
    assert prompts.answers is not None
    for row, answer in enumerate(prompts.answers):
        length = int(prompts.lengths[row])
        tokens = [*prompts.tokens[row, :length].tolist(), *answer]
        with torch.no_grad():
            told = network(torch.tensor([tokens])).logits[0].log_softmax(-1).double()
        steps = [told[length - 1 + step] for step in range(len(answer))]
        total = sum(float(step[token]) for step, token in zip(steps, answer, strict=True))
        assert np.isclose(found.loc[row, "confidence"], total, atol=1e-4)
        greedy = [int(step.argmax()) for step in steps] == list(answer)
        assert found.loc[row, "right"] == greedy == (row % 3 == 0)
        choice = float(steps[0][answer[0]] - steps[0][others[row][0]])
        assert np.isclose(found.loc[row, "choice"], choice, atol=1e-4)
        assert found.loc[row, "says_other"] == (int(steps[0].argmax()) == others[row][0])


def test_what_is_written_is_what_each_prompt_alone_would_get(network: PreTrainedModel, tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    network.save_pretrained(tmp_path)
    model = lc.load(str(tmp_path))
    prompts = some_prompts(network)
    found = greedy_texts(model, prompts, new_tokens=4)
    for row, text in enumerate(found):
        tokens = prompts.tokens[row, : int(prompts.lengths[row])].tolist()
        for _ in range(4):
            with torch.no_grad():
                logits = network(torch.tensor([tokens])).logits
            tokens.append(int(logits[0, -1].argmax()))
        assert text == tokenizer.decode(tokens[-4:])


def test_what_cannot_be_scored(network: PreTrainedModel):
    model, prompts = lc.load(hf_model("llama")), some_prompts(network)
    with pytest.raises(lc.InputError, match="expected prompts with an answer each"):
        answer_scores(
            model,
            lc.Prompts.from_token_lists([[4]], pd.DataFrame({"row": [0]})),
        )
    with pytest.raises(lc.InputError, match="2 other answers to 9 prompts, expected one each"):
        answer_scores(model, prompts, others=[[4], [5]])
    with pytest.raises(lc.InputError, match="the model has no tokenizer"):
        greedy_texts(model, prompts, new_tokens=2)
