"""Replay against one plain forward for every edit and prompt."""

from __future__ import annotations

import logging
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from hypothesis import Phase, given, settings, strategies as st

import lensclust as lc
from lensclust.inference.readouts import answers
from lensclust.models.sites import Site, resolve
from probes.patching.replay import replay
from tests.tiny import ARCHITECTURES, D_VOCAB, hf_model

HOOKS = {
    "z": "blocks.{}.attn.hook_z",
    "attn_out": "blocks.{}.hook_attn_out",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "resid_mid": "blocks.{}.hook_resid_mid",
}
SMALL = {"vocab_size": D_VOCAB, "hidden_size": 32}
ODD = {
    "gemma2, window 5": ("Gemma2ForCausalLM", {"sliding_window": 5, "head_dim": 8}),
    "mistral, window 5": ("MistralForCausalLM", {"sliding_window": 5}),
    "qwen2, window 5": (
        "Qwen2ForCausalLM",
        {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
    ),
}
# Bloom's positions cannot be given; GPT-Neo's window counts places, not positions.
UNSHARED = {
    "bloom": ("BloomForCausalLM", {**SMALL, "n_layer": 2, "n_head": 4}),
    "gpt-neo": (
        "GPTNeoForCausalLM",
        {
            **SMALL,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 5,
            "max_position_embeddings": 64,
        },
    ),
}


def some_prompts(n: int = 5, *, seed: int = 0, longest: int = 16) -> lc.Prompts:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, D_VOCAB, rng.integers(4, longest)).tolist() for _ in range(n)]
    spans = {"input": [(1, 3)] * n, "first": [(0, 1)] * n}
    return lc.Prompts.from_token_lists(ids, pd.DataFrame({"n": range(n)}), spans=spans)


def some_edits(model, sites, prompts, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    sizes = {True: model.cfg.d_model, False: model.cfg.d_head}
    return [
        (site, torch.randn(len(prompts), sizes[site.head is None], generator=generator))
        for site in sites
    ]


def build(name: str):
    if name == "native":
        return lc.load("native:sif-small")
    if name in ARCHITECTURES:
        return lc.load(hf_model(name))
    from tests.tiny import _COMMON

    class_name, fields = (ODD | UNSHARED)[name]
    common = {**_COMMON, "num_key_value_heads": 2} if name in ODD else {}
    model_class = getattr(transformers, class_name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        config = model_class.config_class(**common, **fields, attn_implementation="eager")
        return lc.load(model_class(config).eval())


built = cache(build)
"""One model for all tests that leave it as it is."""


@torch.no_grad()
def one_forward_per_patch(model, prompts, edits, at):
    out = []
    for site, values in edits:
        name = HOOKS.get(site.kind, f"blocks.{site.layer}.hook_resid_pre").format(site.layer)
        if site == Site("resid", model.cfg.n_layers):
            name = f"blocks.{site.layer - 1}.hook_resid_post"
        for row, where in enumerate(prompts.position(at).tolist()):

            def put(state, hook, site=site, value=values[row], where=where):
                place = (0, where) if site.head is None else (0, where, site.head)
                state = state.clone()
                state[place] = value
                return state

            tokens = prompts.tokens[row : row + 1, : prompts.lengths[row]]
            out.append(model.run_with_hooks(tokens, fwd_hooks=[(name, put)])[0, -1])
    return torch.stack(out).reshape(len(edits), len(prompts), -1)


def logits_of(logits, rows):
    return logits


@pytest.mark.parametrize("at", ["answer", "input_end", "first_start"])
@pytest.mark.parametrize("name", [*ARCHITECTURES, *ODD, "native"])
def test_every_site_equals_one_plain_forward_per_patch(name, at, caplog):
    model, prompts = built(name), some_prompts()
    kinds = ["resid", "z", "attn_out", "mlp_out"] + ([] if name == "neox" else ["resid_mid"])
    edits = some_edits(model, resolve(model, kinds), prompts)
    with caplog.at_level(logging.WARNING):
        found = replay(model, prompts, edits, logits_of, at=at)
    assert not caplog.records, "the prefix was not shared"
    some = slice(None, None, 3)
    expected = one_forward_per_patch(model, prompts, edits[some], at)
    torch.testing.assert_close(found[some], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", UNSHARED)
def test_a_model_that_cannot_share_a_prefix_is_found_out_and_run_in_full(name, caplog):
    model, prompts = build(name), some_prompts()
    edits = some_edits(model, resolve(model, ["resid", "z"]), prompts)
    with caplog.at_level(logging.WARNING):
        found = replay(model, prompts, edits, logits_of)
    assert "every prompt is run in full" in caplog.text
    expected = one_forward_per_patch(model, prompts, edits, "answer")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


MODELS = {name: built(name) for name in ("native", "llama")}


@settings(max_examples=10, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    name=st.sampled_from(sorted(MODELS)),
    seed=st.integers(0, 1000),
    at=st.sampled_from(["answer", "input_start"]),
    batch_tokens=st.sampled_from([1, 17, 60, 500]),
)
def test_neither_batching_nor_order_nor_company_matters(name, seed, at, batch_tokens):
    model, prompts = MODELS[name], some_prompts(seed=seed)
    edits = some_edits(model, resolve(model, ["resid", "head 1.2"]), prompts, seed)
    edits.append((Site("z", 1, 2), edits[-1][1]))
    together = replay(model, prompts, edits, logits_of, at=at)
    order = np.random.default_rng(seed).permutation(len(prompts))
    shuffled = [(site, values[torch.from_numpy(order)]) for site, values in edits[::-1]]
    apart = replay(
        model, prompts.take(order), shuffled, logits_of, at=at, batch_tokens=batch_tokens
    )
    torch.testing.assert_close(apart.flip(0), together[:, order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[-1], together[-2])  # head and z are one place


@pytest.mark.parametrize("name", ["llama", "native"])
def test_the_models_own_state_changes_nothing(name):
    model, prompts = MODELS[name], some_prompts(8)
    states = lc.extract(model, prompts, "resid", at="input_end")
    edits = [
        (Site("resid", layer), torch.from_numpy(states.resid[:, 0, layer].values))
        for layer in range(model.cfg.n_layers + 1)
    ]
    found = replay(model, prompts, edits, logits_of, at="input_end")
    plain = answers(model, prompts, logits_of, batch_tokens=20)
    torch.testing.assert_close(found, plain.expand_as(found), atol=1e-5, rtol=1e-5)


def test_readouts_of_any_shape_and_the_prompt_of_each_row():
    model, prompts = MODELS["llama"], some_prompts(9)
    edits = some_edits(model, resolve(model, "attn_out"), prompts)
    numbers = replay(model, prompts, edits, lambda logits, rows: rows, batch_tokens=20)
    assert numbers.tolist() == [list(range(9))] * len(edits)
    assert replay(model, prompts, edits, lambda x, _: x[:, :6].reshape(-1, 2, 3)).shape[2:] == (
        2,
        3,
    )


@pytest.mark.parametrize(("name", "share"), [("llama", 0.2), ("native", 0.35)])
def test_a_last_token_sweep_runs_a_fraction_of_the_tokens_in_few_forwards(name, share, monkeypatch):
    model, prompts = MODELS[name], some_prompts(60, longest=40)
    edits = some_edits(model, resolve(model, "z"), prompts)
    sizes = []
    # Not by a hook: what a caller's hook does is not known, so that prompts are run in full.
    forward = model.original_model.forward

    def counted(*args, **kwargs):
        sizes.append((args or [kwargs["input_ids"]])[0].numel())
        return forward(*args, **kwargs)

    replay(model, prompts, edits, lambda logits, rows: rows)  # the model is checked once
    monkeypatch.setattr(model.original_model, "forward", counted)
    replay(model, prompts, edits, lambda logits, rows: rows)
    assert max(sizes) <= 2048
    assert sum(sizes) < share * len(edits) * int(prompts.lengths.sum())
    assert len(sizes) < len(prompts)


def hooks_of(model) -> int:
    points = {id(point): point for point in model.hook_dict.values()}.values()
    modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return modules + sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in points)


@pytest.mark.parametrize("name", ["llama", "native"])
def test_no_hook_outlives_the_call_and_the_callers_own_stay(name):
    model, prompts = MODELS[name], some_prompts()
    edits = some_edits(model, resolve(model, ["resid", "z"]), prompts)

    def fails(logits, rows):
        raise KeyboardInterrupt

    seen = []
    model.add_hook("blocks.0.hook_resid_pre", lambda state, hook: seen.append(1))
    try:
        before = hooks_of(model)
        replay(model, prompts, edits, logits_of)
        with pytest.raises(KeyboardInterrupt):
            replay(model, prompts, edits, fails)
        assert hooks_of(model) == before
        assert seen
    finally:
        model.reset_hooks()


def test_wrong_input_is_one_clear_line():
    model, prompts = MODELS["llama"], some_prompts()
    good = some_edits(model, [Site("resid", 1)], prompts)
    short = [(Site("head", 1, 2), torch.zeros(len(prompts), model.cfg.d_model))]
    for edits, options, message in [
        ([], {}, "no edit given; `answers`"),
        (short, {}, r"edit 0 \(head 1.2\) has values of shape \(5, 32\), expected \(5, 8\)"),
        ([(Site("resid", 9), good[0][1])], {}, "site 'resid 9' does not exist"),
        (good, {"at": "middle"}, "position 'middle' does not exist"),
        (good, {"batch_tokens": 0}, "batch_tokens=0, expected at least 1"),
    ]:
        with pytest.raises(lc.InputError, match=message):
            replay(model, prompts, edits, logits_of, **options)
    training = build("llama").train()
    for call in (
        lambda: replay(training, prompts, good, logits_of),
        lambda: answers(training, prompts, logits_of),
    ):
        with pytest.raises(lc.InputError, match="in training mode"):
            call()
