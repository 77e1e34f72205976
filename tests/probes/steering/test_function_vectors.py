"""Indirect effects against one forward for every head, and vectors against the sum they are."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch

import lensclust as lc
from lensclust.models.sites import Site
from probes.steering.function_vectors import FunctionVector, function_vector
from probes.steering.steering import steer
from tests.tiny import D_MODEL, D_VOCAB, N_HEADS, N_LAYERS, hf_model

D_HEAD = D_MODEL // N_HEADS


def some_prompts(n: int, seed: int, task: str = "copy") -> lc.Prompts:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, D_VOCAB, rng.integers(4, 12)).tolist() for _ in range(n)]
    answers = rng.integers(3, D_VOCAB, (n, 1)).tolist()
    return lc.Prompts.from_token_lists(ids, pd.DataFrame({"task": [task] * n}), answers=answers)


@cache
def model_of(name: str):
    return lc.load(hf_model(name))


@cache
def found_in(name: str, top: int = 4) -> FunctionVector:
    return function_vector(model_of(name), some_prompts(6, 0), some_prompts(5, 1), top=top)


def each_prompt(prompts: lc.Prompts):
    for row, length in enumerate(prompts.lengths.tolist()):
        yield row, prompts.tokens[row : row + 1, :length]


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox"])
@torch.no_grad()
def test_effects_equal_one_forward_for_every_head(name: str) -> None:
    model, found = model_of(name), found_in(name)
    prompts, shuffled = some_prompts(6, 0), some_prompts(5, 1)
    hooks = [f"blocks.{block}.attn.hook_z" for block in range(N_LAYERS)]
    last = [model.run_with_cache(tokens)[1] for _, tokens in each_prompt(prompts)]
    mean = torch.stack([torch.stack([c[hook][0, -1] for hook in hooks]) for c in last]).mean(0)
    assert shuffled.answers is not None
    for site in map(Site.parse, found.frame["site"]):
        assert site.head is not None

        def put(z, hook, site=site):
            z = z.clone()
            z[0, -1, site.head] = mean[site.layer, site.head]
            return z

        gains = []
        for row, tokens in each_prompt(shuffled):
            token = shuffled.answers[row][0]
            plain = model(tokens)[0, -1].softmax(-1)[token]
            patched = model.run_with_hooks(tokens, fwd_hooks=[(hooks[site.layer], put)])
            gains.append(float(patched[0, -1].softmax(-1)[token] - plain))
        np.testing.assert_allclose(found.effects.sel(site=str(site)), gains, atol=1e-6)
    assert list(found.frame["site"]) == [
        f"head {block}.{head}" for block in range(N_LAYERS) for head in range(N_HEADS)
    ]
    np.testing.assert_allclose(found.frame["value"], found.effects.mean("prompt"))
    assert found.frame["value"].between(found.frame["ci_low"], found.frame["ci_high"]).all()
    ranked = found.frame.sort_values("value", ascending=False)["site"].tolist()
    assert [str(site) for site in found.heads] == ranked[:4]
    assert set(found.frame.loc[found.frame["chosen"], "site"]) == set(ranked[:4])


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox"])
@torch.no_grad()
def test_contributions_of_a_block_add_up_to_its_attention_output(name: str) -> None:
    model, found = model_of(name), found_in(name)
    acts = lc.extract(model, some_prompts(6, 0), "attn_out", progress=False)
    for block in range(N_LAYERS):
        bias = getattr(model.blocks[block].attn, "b_O", None)
        offset = 0 if bias is None else bias.detach().numpy()
        np.testing.assert_allclose(
            found.contributions.sel(block=block).sum("head") + offset,
            acts.attn_out.sel(block=block).mean("prompt").isel(position=0),
            atol=1e-5,
        )
    parts = [found.contributions.sel(block=s.layer, head=s.head).values for s in found.heads]
    np.testing.assert_allclose(found.vector, np.sum(parts, 0), atol=1e-6)


@torch.no_grad()
def test_the_only_head_that_writes_is_the_only_one_with_an_effect() -> None:
    network = hf_model("gpt2")
    for block in range(N_LAYERS):
        written = network.get_parameter(f"transformer.h.{block}.attn.c_proj.weight")
        for head in range(N_HEADS):
            if (block, head) != (1, 2):
                written[head * D_HEAD : (head + 1) * D_HEAD] = 0
    found = function_vector(lc.load(network), some_prompts(6, 0), some_prompts(5, 1), top=1)
    others = found.effects.drop_sel(site="head 1.2")
    assert float(abs(others).max()) < 1e-7
    assert float(abs(found.effects.sel(site="head 1.2")).min()) > 1e-6


def test_a_mean_of_one_prompt_put_back_into_it_changes_nothing() -> None:
    prompt = some_prompts(1, 0)
    found = function_vector(model_of("gpt2"), prompt, prompt, top=2)
    assert float(abs(found.effects).max()) < 1e-6


@torch.no_grad()
def test_the_vector_is_added_where_asked_and_the_model_is_left_alone() -> None:
    model, found = model_of("gpt2"), found_in("gpt2")
    tokens = some_prompts(1, 2).tokens
    before = model(tokens)

    def add(state, hook):
        state = state.clone()
        state[:, -1] += 3 * torch.from_numpy(found.vector).float()
        return state

    by_hand = model.run_with_hooks(tokens, fwd_hooks=[("blocks.2.hook_resid_pre", add)])
    with steer(model, found.intervention(3), at="resid 2"):
        steered = model(tokens)
    torch.testing.assert_close(steered, by_hand, atol=1e-5, rtol=1e-5)
    assert torch.equal(before, model(tokens))
    assert not torch.allclose(before, steered, atol=1e-3)
    with (
        pytest.raises(lc.InputError, match=r"vector of 32 numbers at 'head 1\.2'"),
        steer(model, found.intervention(), at="head 1.2"),
    ):
        model(tokens)


def test_the_control_sums_other_heads() -> None:
    found, here, states = found_in("gpt2"), Site("resid", 1), torch.zeros(2, D_MODEL)
    outputs = found.contributions.stack(site=["block", "head"]).transpose("site", ...)
    chosen = [s.layer * N_HEADS + (s.head or 0) for s in found.heads]
    drawn = set()
    for seed in range(5):
        vector = found.random_heads(seed).edit_at(here)(states)[0].numpy()
        # More numbers in a state than heads: which heads were summed can be read off.
        share = np.linalg.lstsq(outputs.values.T, vector, rcond=None)[0]
        np.testing.assert_allclose(np.sort(share), [0] * 8 + [1] * 4, atol=1e-3)
        drawn.add(tuple(np.flatnonzero(share > 0.5)))
        assert not set(np.flatnonzero(share > 0.5)) & set(chosen)
    assert len(drawn) > 1
    matched = found.random_heads().norm_matched(found.intervention())
    length = torch.full((2,), float(np.linalg.norm(found.vector)))
    torch.testing.assert_close(matched.size(states, here), length)
    torch.testing.assert_close(found.intervention().random_twin().size(states, here), length)
    with pytest.raises(lc.InputError, match="7 heads are chosen and 5 left"):
        found_in("gpt2", 7).random_heads()


def test_given_heads() -> None:
    found = found_in("gpt2")
    other = found.with_heads(["head 0.1", Site("head", 2, 3)])
    parts = found.contributions
    expected = parts.sel(block=0, head=1) + parts.sel(block=2, head=3)
    np.testing.assert_allclose(other.vector, expected, atol=1e-6)
    assert other.frame.loc[other.frame["chosen"], "site"].tolist() == ["head 0.1", "head 2.3"]
    for heads in ([], ["head 0.1", "head 0.1"], ["resid 1"], ["head 9.0"]):
        with pytest.raises(lc.InputError, match="with_heads: given"):
            found.with_heads(heads)


def test_it_shows_itself() -> None:
    found = found_in("gpt2")
    chart = found.plot().to_dict()
    assert "Indirect effect" in str(chart["title"])
    assert "4 of 12 heads" in repr(found)
    assert "head " in found._repr_html_()


def test_refused_at_the_door() -> None:
    prompts, shuffled = some_prompts(3, 0), some_prompts(3, 1)
    with pytest.raises(lc.InputError, match="do not add up"):
        function_vector(model_of("gemma2"), prompts, shuffled)
    model = model_of("gpt2")
    for top in (0, 13):
        with pytest.raises(lc.InputError, match=f"top={top}, expected 1 to 12"):
            function_vector(model, prompts, shuffled, top=top)
    with pytest.raises(lc.InputError, match="prompts of 2 tasks given"):
        function_vector(model, prompts, some_prompts(3, 1, "reverse"), top=2)
    silent = lc.Prompts.from_token_lists([[4, 5]], pd.DataFrame({"task": ["copy"]}))
    with pytest.raises(lc.InputError, match="expected shuffled prompts with an answer each"):
        function_vector(model, prompts, silent, top=2)
