"""Attention taken off some tokens against the framework's own mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from torch.nn import functional as F

import lensclust as lc
from lensclust.inference.readouts import answers
from probes.attention.knockout import answers_cut_off
from tests.tiny import D_VOCAB, hf_model

SIZES: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODERNBERT: dict[str, Any] = {
    **{name: size for name, size in SIZES.items() if name != "num_key_value_heads"},
    "global_attn_every_n_layers": 2,
    "local_attention": 8,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
# Attention that the bridge leaves to the network, with sinks, windows, chunks and shared values;
# a block without attention.
CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "gptneo": lambda: transformers.GPTNeoConfig(
        vocab_size=D_VOCAB,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],  # pyright: ignore[reportArgumentType]
        window_size=4,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "llama4": lambda: transformers.Llama4TextConfig(
        **SIZES, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=4
    ),
    "nanochat": lambda: transformers.NanoChatConfig(**SIZES),
    "modernbert": lambda: transformers.ModernBertDecoderConfig(**MODERNBERT),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4
    ),
    "lfm2": lambda: transformers.Lfm2Config(
        **SIZES, layer_types=["conv", "full_attention", "conv", "full_attention"]
    ),
}

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


@contextmanager
def softmax_without(gone: torch.Tensor, only: int | None) -> Iterator[list[int]]:
    """Inside, the softmax over keys does not see what is gone, in one call of it or in all."""
    whole, length, calls = F.softmax, gone.shape[-1], [0]

    def softmax(scores: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        # A sink stands behind the keys.
        if scores.dim() == 4 and scores.shape[-2] == length <= scores.shape[-1] <= length + 1:
            if only is None or calls[0] == only:
                here = F.pad(gone, (0, scores.shape[-1] - length))
                scores = scores.masked_fill(here, torch.finfo(scores.dtype).min)
            calls[0] += 1
        return whole(scores, *args, **options)

    F.softmax = softmax
    try:
        yield calls
    finally:
        F.softmax = whole


@pytest.mark.parametrize("family", list(CONFIGS))
def test_whatever_computes_attention(
    prompts: lc.Prompts, hidden: torch.Tensor, family: str
) -> None:
    def network() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            made: Any = transformers.AutoModelForCausalLM.from_config(
                CONFIGS[family](), attn_implementation="eager"
            )
            with torch.no_grad():
                for parameter in made.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return made.eval()

    model, plain = lc.load(network()), network()
    blocks = [1, 3] if family == "lfm2" else range(model.cfg.n_layers)
    for only in (None, len(blocks) - 1):
        where = None if only is None else [blocks[only]]
        found = answers_cut_off(model, prompts, read, hidden, blocks=where)
        for row, (length, begin) in enumerate(zip(LENGTHS, BEGINS, strict=True)):
            gone = (torch.arange(length) >= begin)[:, None] & hidden[row, :length]
            tokens = prompts.tokens[row : row + 1, :length]
            with torch.no_grad(), softmax_without(gone, only) as calls:
                expected = plain(tokens).logits[0, -1]
            assert calls[0] == len(blocks)
            torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=1e-4)
            if only is None:
                with torch.no_grad():
                    assert (plain(tokens).logits[0, -1] - expected).abs().max() > 1e-4


def test_attention_that_cannot_be_reached_is_refused(prompts: lc.Prompts, hidden: torch.Tensor):
    config = CONFIGS["lfm2"]()
    model = lc.load(transformers.AutoModelForCausalLM.from_config(config).eval())
    with pytest.raises(lc.InputError, match=r"block 2 of .* has no attention.*\[1, 3\]"):
        answers_cut_off(model, prompts, read, hidden, blocks=[2])
    mamba = transformers.MambaConfig(vocab_size=D_VOCAB, hidden_size=32, num_hidden_layers=2)
    model = lc.load(transformers.AutoModelForCausalLM.from_config(mamba).eval())
    with pytest.raises(lc.InputError, match="no block whose attention can be reached"):
        answers_cut_off(model, prompts, read, hidden)


def test_the_check_is_the_models_own_and_sees_no_hooks(prompts: lc.Prompts, hidden: torch.Tensor):
    def per_row(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return value * torch.tensor([1.0, 0.5, 2.0])[:, None, None]

    expected = lc.load(hf_model("opt"))
    answers_cut_off(expected, prompts, read, hidden)
    checked_inside = lc.load(hf_model("opt"))
    results = []
    for model in (expected, checked_inside):
        with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", per_row)]):
            results.append(answers_cut_off(model, prompts, read, hidden, batch_tokens=1000))
    torch.testing.assert_close(*results)


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
