"""Attention ratios against patterns and gradients taken by hand, planted attention, and noise."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from hypothesis import given, settings, strategies as st
from scipy import stats

import lensclust as lc
from lensclust.models.native import native_config
from probes.attention.ratio import WEIGHTINGS, attention_ratio
from probes.attention.spans import random_places
from tests.tiny import ARCHITECTURES, D_VOCAB, hf_model

NATIVE = "native:sif-small"
N = 8
EAGER: dict[str, Any] = {"attn_implementation": "eager"}


def fresh(name: str) -> Any:
    return lc.load(NATIVE if name == "native" else hf_model(name))


model_of = cache(fresh)
"""One model for all tests that leave it as it is."""


def prompts_of(n: int = N, seed: int = 0, **spans: list[tuple[int, int]]) -> lc.Prompts:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, D_VOCAB, rng.integers(11, 17)).tolist() for _ in range(n)]
    given = {
        "relevant": [(3 + i % 2, 5 + i % 2) for i in range(n)],
        "irrelevant": [(6 + i % 2, 9) for i in range(n)],
        "question": [(2, len(row)) for row in ids],
        "asking": [(9, 11) for _ in ids],
    }
    answers = rng.integers(3, D_VOCAB, (n, 1)).tolist()
    rows = pd.DataFrame({"item": range(n)})
    return lc.Prompts.from_token_lists(ids, rows, answers=answers, spans={**given, **spans})


def ratio(model: Any, prompts: lc.Prompts, **options: Any) -> Any:
    return attention_ratio(model, prompts, **{"block": "question", "progress": False, **options})


def alone(prompts: lc.Prompts, row: int) -> torch.Tensor:
    return prompts.tokens[row : row + 1, : prompts.lengths[row]]


def means(prompts: lc.Prompts, row: int, looks: torch.Tensor, query: str) -> np.ndarray:
    """``(side, head)`` of one prompt's ``(head, query, key)``, token by token."""
    assert prompts.spans is not None
    last = int(prompts.lengths[row]) - 1
    asking = [last] if query == "answer" else range(*prompts.spans[query][row].tolist())
    found = [
        torch.stack(
            [looks[:, q, k] for q in asking for k in range(*prompts.spans[name][row].tolist())]
        ).mean(0)
        for name in ("relevant", "irrelevant")
    ]
    return torch.stack(found).numpy()


@pytest.mark.parametrize("query", ["answer", "asking"])
@pytest.mark.parametrize("name", ["native", *ARCHITECTURES])
@torch.no_grad()
def test_weights_are_those_of_the_cached_patterns_and_values(name: str, query: str) -> None:
    model, prompts = model_of(name), prompts_of()
    found = ratio(model, prompts, query=query, weighting=["attention", "value"], draws=2).values
    for row in range(len(prompts)):
        _, cache = model.run_with_cache(alone(prompts, row))
        for block in range(model.cfg.n_layers):
            pattern = cache[f"blocks.{block}.attn.hook_pattern"][0]
            v, w_o = cache[f"blocks.{block}.attn.hook_v"][0], model.blocks[block].attn.W_O
            group = model.cfg.n_heads // v.shape[1]
            long = [(v[:, h // group] @ w_o[h]).norm(dim=-1) for h in range(model.cfg.n_heads)]
            expected = {"attention": pattern, "value": pattern * torch.stack(long)[:, None]}
            for weighting, looks in expected.items():
                here = found.sel(weighting=weighting, block=block).isel(prompt=row)
                np.testing.assert_allclose(
                    [here["relevant"], here["irrelevant"]],
                    means(prompts, row, looks, query),
                    rtol=2e-5,
                )


@cache
def in_double(name: str) -> Any:
    return (lc.load(NATIVE) if name == "native" else hf_model(name)).double()


def attentions(name: str, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits and patterns of a model that nothing of ours has touched, in double precision."""
    model = in_double(name)
    if name == "native":
        seen: list[torch.Tensor] = []
        hooks = [
            (f"blocks.{block}.attn.hook_pattern", lambda value, hook: seen.append(value))
            for block in range(model.cfg.n_layers)
        ]
        return model.run_with_hooks(tokens, fwd_hooks=hooks), seen
    out = model(tokens, output_attentions=True)
    return out.logits, list(out.attentions)


@pytest.mark.parametrize("query", ["answer", "asking"])
@pytest.mark.parametrize("name", ["native", *ARCHITECTURES])
def test_gradients_are_those_of_autograd_in_double_precision(name: str, query: str) -> None:
    model, prompts = fresh(name).double(), prompts_of(4)
    found = ratio(model, prompts, query=query, weighting="gradient", draws=2).values
    answers = prompts.answers
    assert answers is not None
    for row in range(len(prompts)):
        logits, patterns = attentions(name, alone(prompts, row))
        loss = -logits[0, -1].log_softmax(-1)[answers[row][0]]
        gradients = torch.autograd.grad(loss, patterns)
        for block, (pattern, gradient) in enumerate(zip(patterns, gradients, strict=True)):
            here = found.isel(weighting=0, prompt=row, block=block)
            expected = means(prompts, row, (pattern * gradient).abs().detach()[0], query)
            np.testing.assert_allclose(
                [here["relevant"], here["irrelevant"]], expected, rtol=1e-4, atol=1e-9
            )


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 99), budget=st.integers(1, 200), order=st.permutations(range(N)))
def test_neither_batches_nor_padding_nor_order_change_a_weight(
    seed: int, budget: int, order: list[int]
) -> None:
    model, prompts = model_of("llama"), prompts_of(seed=seed)
    whole = ratio(model, prompts, draws=3)
    parts = ratio(model, prompts, draws=3, batch_tokens=budget)
    turned = ratio(model, prompts.take(order), draws=3).values
    for side in ("relevant", "irrelevant"):
        expected = whole.values[side].values
        np.testing.assert_allclose(parts.values[side], expected, rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(turned[side], expected[:, order], rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(parts.null, whole.null, atol=1e-3)


def test_one_forward_gives_what_each_weighting_gives_alone() -> None:
    model, prompts = model_of("gpt2"), prompts_of()
    together = ratio(model, prompts).values
    assert together["weighting"].values.tolist() == list(WEIGHTINGS)
    for weighting in WEIGHTINGS:
        single = ratio(model, prompts, weighting=weighting).values
        np.testing.assert_allclose(
            single["relevant"][0], together["relevant"].sel(weighting=weighting), rtol=1e-4
        )


def boosted(prompts: lc.Prompts, by: float, head: int) -> Any:
    """A hook that multiplies a head's weights on relevant tokens, and leaves the sum at 1."""
    assert prompts.spans is not None
    token = torch.arange(prompts.tokens.shape[1])
    start, stop = prompts.spans["relevant"].T[..., None]
    relevant = (token >= start) & (token < stop)

    def hook(value: torch.Tensor, hook: Any) -> torch.Tensor:
        changed = value.clone()
        here = value[:, head] * (1 + (by - 1) * relevant[:, None].to(value))
        changed[:, head] = here / here.sum(-1, keepdim=True)
        return changed

    return hook


def test_planted_attention_is_found_at_its_head_alone_and_by_its_size() -> None:
    model, prompts = model_of("llama"), prompts_of(12)
    lengths = prompts.lengths
    # One batch in the order of the prompts, as the planting hook needs it.
    prompts = prompts.take(lengths.argsort(descending=True, stable=True).numpy())
    plain = ratio(model, prompts, weighting="attention").frame
    # In the last block nothing comes after it that could change.
    with model.hooks(fwd_hooks=[("blocks.2.attn.hook_pattern", boosted(prompts, 20.0, 1))]):
        planted = ratio(model, prompts, weighting="attention").frame
    change = planted["log_ratio"] - plain["log_ratio"]
    at = (planted["block"] == 2) & (planted["head"] == 1)
    assert change[at].item() == pytest.approx(np.log(20), abs=1e-4)
    others = (planted["heads"] == "one") & ~at
    np.testing.assert_allclose(change[others], 0, atol=1e-5)
    assert planted.loc[at, "p"].item() == pytest.approx(1 / 101)
    assert planted.loc[at, "low"].item() > 2


def test_a_head_that_looks_for_its_own_token_finds_it() -> None:
    """One head, whose query and key are the token itself: its ratio is known beforehand."""
    fields = {"n_layers": 1, "n_heads": 1, "d_model": 64, "d_vocab": 64, "attn_only": True}
    model: Any = lc.load(native_config("sif-small", **fields, normalization_type=None))
    strength = 24.0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.zero_()
            if "embed" in name or ((".q." in name or ".k." in name) and weight.ndim == 2):
                weight.copy_(torch.eye(64) * (strength if ".q." in name else 1))
    ids = [[1, 2, 3, 4, 10 + i, 5, 6, 7, 8, 10 + i] for i in range(N)]
    spans = {"relevant": [(4, 5)] * N, "irrelevant": [(6, 7)] * N}
    prompts = lc.Prompts.from_token_lists(ids, pd.DataFrame({"item": range(N)}), spans=spans)
    found = ratio(model, prompts, block=None, weighting="attention").frame
    # Scores are divided by the root of the head's size.
    np.testing.assert_allclose(found["log_ratio"], strength / 8, rtol=1e-5)
    assert (found["p"] < 0.05).all()


def test_random_spans_of_a_random_model_have_ratio_one() -> None:
    model = model_of("native")
    spans: dict[str, Any] = {"relevant": [(3, 5)] * 30, "irrelevant": [(6, 8)] * 30}
    null = ratio(model, prompts_of(30, **spans), draws=200, weighting=["attention", "value"]).null
    error = null.std("draw", ddof=1) / np.sqrt(200)
    assert float((np.abs(null.mean("draw")) / error).max()) < 5


def test_spans_at_random_places_are_rarely_called_different() -> None:
    model, found = model_of("native"), []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        places = [random_places(np.array([2, 3]), np.array([2, 10]), 1, rng) for _ in range(N)]
        spans: dict[str, Any] = {
            name: [(int(p[side, 0]), int(p[side, 0]) + size) for p in places]
            for side, (name, size) in enumerate([("relevant", 2), ("irrelevant", 3)])
        }
        prompts = prompts_of(seed=seed, question=[(2, 10)] * N, **spans)
        frame = ratio(model, prompts, weighting="attention", draws=99, seed=seed).frame
        found.append(frame["p"].iloc[0])
    assert np.sum(np.array(found) <= 0.05) <= stats.binom.ppf(0.9999, 40, 0.05)


@given(
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    start=st.integers(1, 9),
    slack=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_random_places_are_disjoint_and_inside(
    size: tuple[int, int], start: int, slack: int, seed: int
) -> None:
    text = np.array([start, start + sum(size) + slack])
    found = random_places(np.array(size), text, 50, np.random.default_rng(seed))
    for first, second in found.T.tolist():
        covered = [*range(first, first + size[0]), *range(second, second + size[1])]
        assert len(set(covered)) == sum(size)
        assert text[0] <= min(covered)
        assert max(covered) < text[1]


def test_every_pair_of_random_places_is_equally_likely() -> None:
    draws = random_places(np.array([1, 3]), np.array([2, 9]), 20_000, np.random.default_rng(0))
    _, counts = np.unique(draws, axis=1, return_counts=True)
    # Slack of 3: 10 ways to deal it out, for either order.
    assert len(counts) == 20
    assert stats.chisquare(counts).pvalue > 1e-4


def test_frame_is_the_mean_of_what_single_prompts_show() -> None:
    found = ratio(model_of("gpt2"), prompts_of())
    for heads in ("mean", "max", "2"):
        each = found.per_prompt(heads=heads)
        frame = found.frame
        of = frame["head"] == 2 if heads == "2" else frame["heads"] == heads
        keys = ["weighting", "block"]
        expected = each.groupby(keys)[["relevant", "irrelevant", "log_ratio", "share"]].mean()
        got = frame[of].set_index(keys)[expected.columns].loc[expected.index]
        np.testing.assert_allclose(got, expected)
        np.testing.assert_allclose(np.log(each["share"] / (1 - each["share"])), each["log_ratio"])
    values = found.values.sel(weighting="attention")
    expected = np.log(values["relevant"].max("head") / values["irrelevant"].max("head"))
    biggest = found.per_prompt(heads="max").query("weighting == 'attention'")
    np.testing.assert_allclose(biggest["log_ratio"], expected.values.ravel(), rtol=1e-4)
    assert found.plot().to_dict()["title"]
    assert "gradient" in repr(found)


def test_a_weight_of_zero_makes_no_ratio_and_is_counted_out() -> None:
    model, prompts = model_of("llama"), prompts_of()

    def blind(value: torch.Tensor, hook: Any) -> torch.Tensor:
        changed = value.clone()
        changed[:, 1, :, 3:6] = 0
        return changed

    with model.hooks(fwd_hooks=[("blocks.2.attn.hook_pattern", blind)]):
        found = ratio(model, prompts, weighting="attention")
    frame = found.frame.set_index(["block", "head"])
    assert frame.loc[(2, 1), "n"] == 0
    assert np.isnan(frame.loc[(2, 1), ["log_ratio", "p"]].astype(float)).all()
    assert frame.loc[(2, 1), "share"] == 0
    assert frame.loc[(2, 0), "n"] == N
    assert found.per_prompt(heads="1")["log_ratio"].isna().sum() == N


def test_nothing_is_left_on_the_model_also_when_it_fails() -> None:
    model, prompts = fresh("llama"), prompts_of()
    cut = ("blocks.1.attn.hook_pattern", lambda value, hook: value.detach())
    with (
        model.hooks(fwd_hooks=[cut]),
        pytest.raises(lc.InputError, match=r"'blocks.1.attn.hook_pattern'\] got no gradient"),
    ):
        ratio(model, prompts)
    ratio(model, prompts)
    assert all(weight.grad is None for weight in model.parameters())
    points = {id(point): point for point in model.hook_dict.values()}.values()
    assert not any(point.fwd_hooks or point.bwd_hooks for point in points)


def test_a_frozen_model_has_gradients_too() -> None:
    model, prompts = fresh("native"), prompts_of()
    expected = ratio(model, prompts, weighting="gradient").values
    for weight in model.parameters():
        weight.requires_grad_(False)
    found = ratio(model, prompts, weighting="gradient").values
    np.testing.assert_array_equal(found["relevant"], expected["relevant"])


def test_wrong_input_is_one_clear_line() -> None:
    model = model_of("native")
    training: Any = lc.load(NATIVE).train()
    empty, late = [(4, 4)] * N, [(9, 11)] * N
    refused: dict[str, Any] = {
        "no span 'sought'": lambda: ratio(model, prompts_of(), relevant="sought"),
        "no span 'query'": lambda: attention_ratio(model, prompts_of()),
        "span 'relevant' of prompt 0 is empty": lambda: ratio(model, prompts_of(relevant=empty)),
        "span 'relevant' of prompt 0 is empty (a prompt's first": lambda: ratio(
            model, prompts_of(relevant=[(0, 1)] * N), block=None
        ),
        "'relevant' and 'irrelevant' of prompt 0 overlap: 5 to 7 and 6 to 9": lambda: ratio(
            model, prompts_of(relevant=[(5, 7)] * N)
        ),
        "'relevant' and 'relevant' of prompt 0 overlap": lambda: ratio(
            model, prompts_of(), irrelevant="relevant"
        ),
        "is 1 to 3, expected inside the block 'question', 2 to": lambda: ratio(
            model, prompts_of(relevant=[(1, 3)] * N)
        ),
        "is 9 to 11, expected before the tokens of 'asking', 9 to 11": lambda: ratio(
            model, prompts_of(relevant=late), query="asking"
        ),
        "demonstrations of prompt 0, 0 to 3, overlap the block 'question', 2": lambda: ratio(
            model, prompts_of(demonstrations=[(0, 3)] * N)
        ),
        "0 to 1, overlap the prompt": lambda: ratio(
            model, prompts_of(demonstrations=[(0, 1)] * N), block=None
        ),
        "weighting ['norm']": lambda: ratio(model, prompts_of(), weighting="norm"),
        "weighting []": lambda: ratio(model, prompts_of(), weighting=[]),
        "draws=1": lambda: ratio(model, prompts_of(), draws=1),
        "batch_tokens=0": lambda: ratio(model, prompts_of(), batch_tokens=0),
        "training mode": lambda: ratio(training, prompts_of()),
        "heads='9'": lambda: ratio(model, prompts_of()).per_prompt(heads="9"),
        "prompt 0 has no answer": lambda: ratio(
            model,
            lc.Prompts.from_token_lists(
                [[1] * 12],
                pd.DataFrame({"a": [1]}),
                spans={"relevant": [(2, 4)], "irrelevant": [(5, 6)]},
            ),
            block=None,
        ),
    }
    for words, call in refused.items():
        with pytest.raises(lc.InputError) as caught:
            call()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    beyond = lc.Prompts(
        **{
            **vars(prompts_of()),
            "spans": {**(prompts_of().spans or {}), "relevant": torch.full((N, 2), 99)},
        }  # type: ignore[arg-type]
    )
    with pytest.raises(lc.InputError, match="is 99 to 99, expected places within its"):
        ratio(model, beyond)


# -- values as they are weighted --------------------------------------------------------------


def clipped_network() -> Any:
    """OLMo whose values are clipped behind their projection, far inside their range."""
    config = transformers.OlmoConfig(
        vocab_size=D_VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        clip_qkv=0.05,
        pad_token_id=0,
        **EAGER,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network: Any = transformers.OlmoForCausalLM(config)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


@torch.no_grad()
def test_values_that_are_clipped_after_their_hook_weigh_as_they_are_used() -> None:
    model, plain, prompts = lc.load(clipped_network()), clipped_network(), prompts_of(3)
    found = ratio(model, prompts, weighting="value", draws=2).values
    for row in range(len(prompts)):
        projected: list[torch.Tensor] = []

        def keep(*args: Any, projected: list[torch.Tensor] = projected) -> None:
            projected.append(args[2].clone())  # it is clipped in place

        handles = [
            layer.self_attn.v_proj.register_forward_hook(keep) for layer in plain.model.layers
        ]
        patterns = plain(alone(prompts, row), output_attentions=True).attentions
        for handle in handles:
            handle.remove()
        for block, layer in enumerate(plain.model.layers):
            assert (projected[block].abs() > 0.05).float().mean() > 0.5
            v = projected[block][0].clamp(-0.05, 0.05).unflatten(-1, (2, 8))
            w_o = layer.self_attn.o_proj.weight.T.unflatten(0, (4, 8))
            long = torch.stack([(v[:, h // 2] @ w_o[h]).norm(dim=-1) for h in range(4)])
            here = found.isel(weighting=0, block=block, prompt=row)
            np.testing.assert_allclose(
                [here["relevant"], here["irrelevant"]],
                means(prompts, row, patterns[block][0] * long[:, None], "answer"),
                rtol=1e-4,
            )


def test_a_hybrid_has_patterns_where_it_has_attention_and_gated_values_are_refused() -> None:
    config = transformers.Qwen3NextConfig(
        vocab_size=D_VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["linear_attention", "linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        **EAGER,
    )
    torch.manual_seed(0)
    network = transformers.Qwen3NextForCausalLM(config).eval()
    model, prompts = lc.load(copy.deepcopy(network)), prompts_of(3)
    found = ratio(model, prompts, weighting=["attention", "gradient"], draws=2)
    assert found.values["block"].values.tolist() == [2]
    assert set(found.frame["block"]) == {2}
    with torch.no_grad():
        for row in range(len(prompts)):
            pattern = network(alone(prompts, row), output_attentions=True).attentions[-1][0]
            here = found.values.sel(weighting="attention", block=2).isel(prompt=row)
            np.testing.assert_allclose(
                [here["relevant"], here["irrelevant"]],
                means(prompts, row, pattern, "answer"),
                rtol=1e-4,
            )
    with pytest.raises(lc.InputError, match=r"values of block 2 of .* cannot be weighted"):
        ratio(model, prompts, weighting="value", draws=2)


@pytest.mark.parametrize("where", ["input", "output", "z"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_values_are_not_weighted_where_heads_pass_through_something_else(name: str, where: str):
    network: Any = hf_model(name)
    stack = network.model.layers if name == "llama" else network.transformer.h
    attention = stack[1].self_attn if name == "llama" else stack[1].attn
    projection = attention.o_proj if name == "llama" else attention.c_proj
    if where == "input":
        projection.register_forward_pre_hook(lambda module, given: (given[0] * 0.5,))
    elif where == "output":
        projection.register_forward_hook(lambda module, given, out: 10 * out)
    model, prompts = lc.load(network), prompts_of(3)
    hooks: Any = [("blocks.1.attn.hook_z", lambda z, hook: 0 * z)] if where == "z" else []
    with model.hooks(fwd_hooks=hooks):
        ratio(model, prompts, weighting="attention")
        with pytest.raises(lc.InputError, match="another weighting"):
            ratio(model, prompts, weighting="value")
