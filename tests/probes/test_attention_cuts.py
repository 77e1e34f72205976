"""Attention taken off some tokens against the framework's own mask."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

import lensclust as lc
from lensclust.readouts import answers
from probes.attention_cuts import answers_cut_off
from tests.tiny import D_VOCAB, hf_model

LENGTHS = (5, 9, 7)
BEGINS = (3, 5, 4)


@pytest.fixture(scope="module")
def prompts() -> lc.Prompts:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(4, D_VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]
    spans = {"query": list(zip(BEGINS, LENGTHS, strict=True))}
    return lc.Prompts.from_token_lists(ids, pd.DataFrame({"row": range(3)}), spans=spans)


@pytest.fixture(scope="module")
def hidden(prompts: lc.Prompts) -> torch.Tensor:
    drawn = torch.rand(prompts.tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    before = torch.arange(prompts.tokens.shape[1]) < torch.tensor(BEGINS)[:, None]
    return drawn & before


def read(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return logits


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("batch_tokens", [5, 1000])
def test_as_with_a_mask_before_the_softmax(
    prompts: lc.Prompts, hidden: torch.Tensor, architecture: str, batch_tokens: int
):
    model = lc.load(hf_model(architecture))
    found = answers_cut_off(model, prompts, read, hidden, batch_tokens=batch_tokens)
    assert hidden.any(1).all()
    for row, (length, begin) in enumerate(zip(LENGTHS, BEGINS, strict=True)):
        seen = torch.ones(length, length).tril().bool()
        seen[begin:] &= ~hidden[row, :length]
        mask = torch.zeros(1, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
        tokens = prompts.tokens[row : row + 1, :length]
        with torch.no_grad():
            expected = hf_model(architecture)(tokens, attention_mask=mask).logits[0, -1]
        torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=1e-4)


def test_nothing_hidden_changes_nothing_and_blocks_count(prompts: lc.Prompts, hidden: torch.Tensor):
    model = lc.load(hf_model("llama"))
    plain = answers_cut_off(model, prompts, read, torch.zeros_like(hidden))
    torch.testing.assert_close(plain, answers(model, prompts, read))
    nowhere = answers_cut_off(model, prompts, read, hidden, blocks=[])
    torch.testing.assert_close(nowhere, plain)
    one = answers_cut_off(model, prompts, read, hidden, blocks=[1])
    everywhere = answers_cut_off(model, prompts, read, hidden)
    assert (one - plain).abs().max() > 1e-3
    assert (one - everywhere).abs().max() > 1e-3


def test_what_cannot_be_hidden(prompts: lc.Prompts, hidden: torch.Tensor):
    model = lc.load(hf_model("llama"))
    with pytest.raises(lc.InputError, match=r"shape \(3, 2\), expected \(3, 9\)"):
        answers_cut_off(model, prompts, read, hidden[:, :2])
    late = hidden.clone()
    late[1, 5] = True
    with pytest.raises(
        lc.InputError, match="token 5 of prompt 1 is hidden, expected tokens before"
    ):
        answers_cut_off(model, prompts, read, late)
    with pytest.raises(lc.InputError, match=r"block 3 does not exist.* has blocks 0\.\.2"):
        answers_cut_off(model, prompts, read, hidden, blocks=[3])
    with pytest.raises(lc.InputError, match="position 'no_start' does not exist"):
        answers_cut_off(model, prompts, read, hidden, since="no_start")
