"""Prompts that branch in any way, on many kinds of attention: as each alone, or in full."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

import lensclust as lc
from lensclust.cli.doctor import examine
from lensclust.inference.prefix_sharing import cost as costs
from lensclust.inference.prefix_sharing.sharing import refusal
from lensclust.inference.readouts import answers
from lensclust.models.sites import Site
from probes.components.decomposition import decompose
from probes.patching.replay import replay
from tests.lensclust.inference.attentions import ATTENTIONS, CONTEXT, VOCABULARY, attention_model

# Of one state, or of the logits, of one prompt.
ERROR = 1e-4
HOOKS = {
    "resid": "blocks.{}.hook_resid_pre",
    "z": "blocks.{}.attn.hook_z",
    "attn_out": "blocks.{}.hook_attn_out",
    "mlp_out": "blocks.{}.hook_mlp_out",
}
LAST = "blocks.{}.hook_resid_post"
HALF = (torch.bfloat16, torch.float16)
# Kinds that are met in other ways, too: quick.
QUICK = ("mpt", "gpt-neo", "gemma3", "gpt-oss", "phi3, longrope")
# Positions or windows that count places, and states that are no keys and values.
REFUSED = ("mpt", "bloom", "falcon, alibi", "gpt-neo", "lfm2", "mamba")


@cache
def model_of(name: str, seed: int) -> Any:
    return attention_model(name, seed)


@dataclass(frozen=True)
class Trie:
    """Prompts that leave one another at some depth.

    Attributes:
        trunk: tokens of the first prompt.
        branches: of each further one: which earlier one it leaves, at which share of its length,
            and how many tokens it goes on for.
        seed: of the tokens.
        order: of the prompts, as a seed.
    """

    trunk: int
    branches: tuple[tuple[int, float, int], ...]
    seed: int

    def prompts(self) -> lc.Prompts:
        rng = np.random.default_rng(self.seed)
        rows = [rng.integers(3, VOCABULARY, self.trunk).tolist()]
        for parent, share, more in self.branches:
            stem = rows[parent % len(rows)]
            stem = stem[: round(share * len(stem))]
            rows.append([*stem, *rng.integers(3, VOCABULARY, more).tolist()][:CONTEXT])
        rows = [rows[index] for index in rng.permutation(len(rows))]
        middle = [(len(row) // 2, len(row) // 2 + 1) for row in rows]
        return lc.Prompts.from_token_lists(
            rows, pd.DataFrame({"n": range(len(rows))}), spans={"middle": middle}
        )


SHARES = st.sampled_from([0.3, 0.6, 0.9, 1.0])
TRIES = st.builds(
    Trie,
    trunk=st.integers(2, 90),
    branches=st.builds(
        lambda some, tail: (*some, tail),
        st.lists(st.tuples(st.integers(0, 9), SHARES, st.integers(1, 24)), min_size=1, max_size=5),
        # The last leaves one of them for long.
        st.tuples(st.integers(0, 9), SHARES, st.integers(1, 110)),
    ),
    seed=st.integers(0, 10**6),
)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(error.nan_to_num(torch.inf).max())


@torch.no_grad()
def alone(model: Any, prompts: lc.Prompts) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """States ``(prompt, position, layer, d)`` and logits, by the bridge's own cache."""
    states: dict[str, list[torch.Tensor]] = {}
    logits, layers = [], range(model.cfg.n_layers)
    names = [name.format(n) for name in HOOKS.values() for n in layers]
    names = [name for name in [*names, LAST.format(layers[-1])] if name in model.hook_dict]
    for row, length in enumerate(prompts.lengths.tolist()):
        out, kept = model.run_with_cache(prompts.tokens[row, :length][None], names_filter=names)
        logits.append(out[0, -1])
        for kind, name in HOOKS.items():
            if name.format(0) in kept:
                found = [kept[name.format(n)][0] for n in layers]
                found += [kept[LAST.format(layers[-1])][0]] * (kind == "resid")
                both = [torch.stack(found)[:, place] for place in (length - 1, length // 2)]
                states.setdefault(kind, []).append(torch.stack(both))
    return {kind: torch.stack(values) for kind, values in states.items()}, torch.stack(logits)


def worst(name: str, seed: int, trie: Trie, free: bool) -> dict[str, float]:
    """The largest relative error of every readout."""
    model, prompts = model_of(name, seed), trie.prompts()
    expected, logits = alone(model, prompts)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(prompts), model.cfg.d_model, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        if free:  # tiny models are all overhead: an estimate would nearly always refuse
            patch.setitem(costs.BLOCK_OPERATIONS, "cpu", 0.0)
            patch.setitem(costs.READING_TOKENS, "cpu", 0.0)
            patch.setattr(costs, "SCORE_OPERATIONS", 0)
        acts = lc.extract(
            model, prompts, [*expected], at=["answer", "middle_start"], progress=False
        )
        found = answers(model, prompts, lambda logits, rows: logits)
        edited = replay(
            model,
            prompts,
            [(Site("resid", 1), values)] * 2,
            lambda logits, rows: logits,
            at="middle_start",
        )
    errors = {"answers": relative(found, logits)}
    for kind, states in expected.items():
        read = torch.from_numpy(acts[kind].values)
        errors[kind] = relative(read.flatten(3), states.flatten(3))
    for row, length in enumerate(prompts.lengths.tolist()):

        def put(state, hook, row=row, length=length):
            state = state.clone()
            state[0, length // 2] = values[row]
            return state

        with torch.no_grad():
            after = model.run_with_hooks(
                prompts.tokens[row, :length][None], fwd_hooks=[("blocks.1.hook_resid_pre", put)]
            )[0, -1]
        errors["replay"] = max(errors.get("replay", 0.0), relative(edited[:, row], after))
    return errors


def check(name: str, seed: int, trie: Trie, free: bool) -> None:
    found = worst(name, seed, trie, free)
    assert max(found.values()) < ERROR, (name, found)


@settings(max_examples=15, deadline=None)
@given(name=st.sampled_from(QUICK), seed=st.integers(0, 2), trie=TRIES, free=st.booleans())
def test_random_tries_give_what_each_prompt_gives_alone(name, seed, trie, free):
    check(name, seed, trie, free)


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTENTIONS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 5), trie=TRIES, free=st.booleans())
def test_random_tries_on_every_kind_of_attention(name, seed, trie, free):
    check(name, seed, trie, free)


# -- the verdict --------------------------------------------------------------------------


def few_shot(seed: int = 0) -> lc.Prompts:
    """Long demonstrations and tails of many lengths, the longest alone in its batch."""
    rng = np.random.default_rng(seed)
    shots = rng.integers(3, VOCABULARY, 120).tolist()
    rows = [shots + rng.integers(3, VOCABULARY, n).tolist() for n in (4, 18, 24, 23, 115)]
    middle = [(60, 61)] * len(rows)
    return lc.Prompts.from_token_lists(
        rows, pd.DataFrame({"label": list("aabba")}), spans={"middle": middle}
    )


CALLS = {
    "extract": lambda model, prompts, share: (
        lc.extract(model, prompts, "resid", share_prefixes=share, progress=False).resid.values
    ),
    "answers": lambda model, prompts, share: answers(
        model, prompts, lambda logits, rows: logits, share_prefixes=share
    ).numpy(),
    "decompose": lambda model, prompts, share: (
        decompose(
            model, prompts, {"a": 5, "b": 9}, share_prefixes=share, progress=False
        ).logits.values
    ),
}


@pytest.mark.parametrize("first", [*CALLS, "replay", "plan_prefixes", "examine"])
@pytest.mark.parametrize("name", ["mpt", "gpt-neo"])
def test_a_refusal_is_the_models_whoever_asks_first_and_is_told_once(name, first, caplog):
    """With default settings, whose estimates let these prompts share."""
    prompts = few_shot()
    assert lc.plan_prefixes(model_of("llama", 0), prompts).sharing == len(prompts)
    model = attention_model(name)
    edits = [(Site("resid", 1), torch.ones(len(prompts), model.cfg.d_model))]
    calls: dict[str, Any] = {
        **{name: lambda call=call: call(model, prompts, True) for name, call in CALLS.items()},
        "replay": lambda: replay(
            model, prompts, edits, lambda logits, _: logits, at="middle_start"
        ),
        "plan_prefixes": lambda: lc.plan_prefixes(model, prompts),
        "examine": lambda: examine(model),
    }
    with caplog.at_level(logging.INFO):
        for call in sorted(calls, key=lambda call: call != first):
            found = calls[call]()
            if call in CALLS:
                full = CALLS[call](model, prompts, False)
                np.testing.assert_array_equal(found, full)
            elif call == "plan_prefixes":
                assert (found.sharing, found.cost) == (0, found.plain_cost)
                assert found.refused in str(found)
            elif call == "examine":
                assert found["shared prefixes"].startswith("no: ")
    assert [record.message.count("every prompt is run in full") for record in caplog.records] == [1]


@pytest.mark.parametrize("window", [24, 50, 100, 200])
def test_a_window_by_key_place_is_found_wherever_it_begins_to_hide_keys(window):
    """Prompts whose keys it holds are shared, longer ones are not."""
    model = attention_model("gpt-neo", window_size=window)
    lengths = range(8, CONTEXT, 24)
    refused = [n for n in lengths if refusal(model, n, n + n // 2) is not None]
    allowed = [n for n in lengths if refusal(model, n, n + n // 2) is None]
    # A continuation that branches takes a few keys more than the prompts need.
    assert all(n + n // 2 + 8 > window for n in refused if window > 40)
    assert all(n + n // 2 <= window for n in allowed)
    # Short prompts are checked together, up to 40 keys.
    assert bool(allowed) == (window > 40)


@pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(d, marks=pytest.mark.slow) for d in HALF)]
)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_models_that_can_share_are_not_refused_and_others_are(name, dtype):
    model = attention_model(name).to(dtype)
    reason = refusal(model, 200, 260)
    assert (reason is not None) == (name in (*REFUSED, "llama4", "phi3, longrope")), reason
    # Llama-4's chunks are shorter than the shortest check.
    assert (refusal(model) is not None) == (name in (*REFUSED, "llama4"))


def test_what_is_checked_is_checked_once(monkeypatch):
    model, prompts = attention_model("llama"), few_shot()
    sizes: list[int] = []
    forward = model.original_model.forward

    def counted(*given, **named):
        sizes.append((given[0] if given else named["input_ids"]).numel())
        return forward(*given, **named)

    monkeypatch.setattr(model.original_model, "forward", counted)
    plan = lc.plan_prefixes(model, prompts)
    checks = sum(sizes)
    # Some thousand tokens: a few prompts as long as the longest.
    assert 0 < checks < 6 * int(prompts.lengths.max())
    sizes.clear()
    CALLS["extract"](model, prompts, True)
    # One real prompt is run alone beside them.
    assert plan.computed < sum(sizes) <= plan.computed + int(prompts.lengths.max())
    for call in CALLS.values():
        call(model, prompts, True)
        sizes.clear()
        call(model, prompts, True)
        # What a model multiplies by is measured by decompose each time, on a few tokens.
        assert 0 <= sum(sizes) - plan.computed < 10


def test_a_readout_that_fails_is_not_the_models_fault():
    model, prompts = attention_model("llama"), few_shot()

    def fails(logits, rows):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        answers(model, prompts, fails)
    assert refusal(model, 240, 300) is None


def test_lengths_that_change_a_whole_forward_keep_prompts_apart():
    """LongRoPE: a short prompt beside a long one is what it is alone."""
    model, rng = model_of("phi3, longrope", 0), np.random.default_rng(0)
    rows = [rng.integers(3, VOCABULARY, n).tolist() for n in (20, 47, 48, 49, 90)]
    prompts = lc.Prompts.from_token_lists(rows, pd.DataFrame({"n": range(5)}))
    states, logits = alone(model, prompts)
    found = lc.extract(model, prompts, "resid", share_prefixes=False, progress=False)
    assert relative(torch.from_numpy(found.resid.values[:, 0]), states["resid"][:, 0]) < ERROR
    assert relative(torch.from_numpy(CALLS["answers"](model, prompts, False)), logits) < ERROR
    mean = lc.pooled(model, prompts, "resid", span="prompt", how="last", progress=False)
    assert relative(torch.from_numpy(mean.resid.values[:, 0]), states["resid"][:, 0]) < ERROR
