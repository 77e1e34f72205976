"""Sampled attention patterns against those that the model's own cache holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

import lensclust as lc
from lensclust.models.native import native_config
from probes.attention.samples import sample_attention
from tests.tiny import D_VOCAB, byte_tokenizer, hf_model, tiny_tokenizer


def prompts_of(lengths: list[int], seed: int = 0) -> lc.Prompts:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, D_VOCAB, n).tolist() for n in lengths]
    return lc.Prompts.from_token_lists(ids, pd.DataFrame({"item": range(len(ids))}))


def model_of(name: str) -> Any:
    return lc.load("native:sif-small" if name == "native" else hf_model(name))


@pytest.mark.parametrize("name", ["native", "gpt2", "llama", "neox", "gemma2"])
def test_patterns_are_those_of_the_cache(name: str) -> None:
    model, prompts = model_of(name), prompts_of([7, 12, 3])
    found = sample_attention(model, prompts)
    assert len(found.heads) == model.cfg.n_layers * model.cfg.n_heads
    for row, n in enumerate(prompts.lengths.tolist()):
        hooks = [f"blocks.{block}.attn.hook_pattern" for block in range(model.cfg.n_layers)]
        _, cache = model.run_with_cache(prompts.tokens[row : row + 1, :n], names_filter=hooks)
        for site, pattern in zip(found.heads, found.patterns[row], strict=True):
            wanted = cache[hooks[site.layer]][0, site.head].detach().numpy()
            np.testing.assert_allclose(pattern, wanted, atol=1e-6)


def test_the_model_is_left_as_it_was() -> None:
    model = model_of("native")
    sample_attention(model, prompts_of([4]), heads="head 2.1")
    assert not any(hook.fwd_hooks for hook in model.hook_dict.values())


@settings(max_examples=10, deadline=None, database=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    budget=st.integers(1, 30),
)
def test_batches_change_nothing(lengths: list[int], budget: int) -> None:
    model, prompts = MODEL, prompts_of(lengths)
    split = sample_attention(model, prompts, heads=["head 5.3", "head 0.0"], batch_tokens=budget)
    for row in range(len(lengths)):
        alone = sample_attention(model, prompts.take([row]))
        for head in ("head 0.0", "head 5.3"):
            np.testing.assert_allclose(split.of(head)[row], alone.of(head)[0], atol=1e-6)


MODEL = model_of("native")


def test_tokens_are_what_the_tokenizer_decodes(tmp_path: Path) -> None:
    words = tiny_tokenizer(tmp_path)
    model = lc.load(hf_model("llama"), tokenizer=words)
    prompts = lc.Prompts.from_texts(["w1 w2"], pd.DataFrame({"item": [0]}), words)
    assert sample_attention(model, prompts).tokens == (("w1", "w2"),)
    letters = byte_tokenizer()
    prompts = lc.Prompts.from_texts(["<i> é"], pd.DataFrame({"item": [0]}), letters)
    found = sample_attention(model_with(letters), prompts).tokens
    # Half of a character is no character.
    assert found == (("<", "i", ">", " ", "�", "�"),)


def model_with(tokenizer: Any) -> Any:
    return lc.load(native_config("sif-small", d_vocab=len(tokenizer)), tokenizer=tokenizer)


def test_tokens_without_a_tokenizer_are_numbers_or_names() -> None:
    prompts = lc.Prompts.from_token_lists([[3, 4]], pd.DataFrame({"item": [0]}))
    assert sample_attention(MODEL, prompts).tokens == (("3", "4"),)
    assert sample_attention(MODEL, prompts, names=list("abcde")).tokens == (("d", "e"),)
    with pytest.raises(lc.InputError, match="token id 4 has no name: 4 names given"):
        sample_attention(MODEL, prompts, names=list("abcd"))


def test_the_frame_holds_each_weight_once() -> None:
    found = sample_attention(MODEL, prompts_of([3, 5]), heads=["head 1.2", "head 0.3"])
    frame = found.frame
    assert len(frame) == 2 * (6 + 15)
    assert np.allclose(frame.groupby(["prompt", "site", "query"])["weight"].sum(), 1, atol=1e-5)
    row = frame[(frame["prompt"] == 1) & (frame["site"] == "head 0.3")].iloc[-1]
    assert row["weight"] == found.of("head 0.3")[1][4, 4]


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        ("head 6.0", r"'head 6.0' is no head of .*heads 0\.\.3 in blocks \[0, 1, 2, 3, 4, 5\]"),
        ("head 0.4", "'head 0.4' is no head of"),
        ("resid 1", "'resid 1' is no head of"),
        ([], "no head given"),
    ],
)
def test_what_is_no_head_is_refused(heads: Any, said: str) -> None:
    with pytest.raises(lc.InputError, match=said):
        sample_attention(MODEL, prompts_of([4]), heads=heads)


def test_some_heads_and_prompts_are_taken_out() -> None:
    found = sample_attention(MODEL, prompts_of([3, 5, 4]))
    some = found.only(heads=["head 1.2", "head 0.3"], prompts=[2, 0])
    assert [len(tokens) for tokens in some.tokens] == [4, 3]
    assert (some.of("head 0.3")[0] == found.of("head 0.3")[2]).all()
    assert (some.patterns[1][0] == found.of("head 1.2")[0]).all()
    options: Any
    for options, said in (
        ({"prompts": [3]}, "prompt 3 is not among the 3 read"),
        ({"heads": "resid 2"}, "'resid 2' is not among the 24 heads read"),
        ({"prompts": []}, "no prompt given"),
    ):
        with pytest.raises(lc.InputError, match=said):
            found.only(**options)
    assert "8 more heads and 2 more prompts" in found._repr_html_()
    assert "more" not in some.only(prompts=[0])._repr_html_().partition("<iframe")[0]
