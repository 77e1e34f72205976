"""Shared prefixes against running every prompt in full, and against Hugging Face itself."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from hypothesis import given, settings, strategies as st

import lensclust as lc
from lensclust.activations import reader as shard_reading
from lensclust.activations.store import writing as store
from lensclust.cli.doctor import examine
from lensclust.inference.prefix_sharing import cost as costs
from lensclust.inference.prefix_sharing.forwards import visible
from lensclust.inference.prefix_sharing.packing import PackedBatch
from lensclust.inference.prefix_sharing.plan import pack
from lensclust.inference.prefix_sharing.sharing import refusal
from lensclust.inference.readouts import answers
from lensclust.models.agreement import rounding_tolerance
from tests.probes.patching.test_replay import ODD, UNSHARED, build
from tests.tiny import ARCHITECTURES, D_VOCAB, hf_model

KINDS = ("resid", "z", "attn_out", "mlp_out", "resid_mid")


@pytest.fixture(autouse=True)
def forwards_cost_nothing(monkeypatch):
    """Tiny models are all overhead, so that their estimates would nearly always refuse."""
    monkeypatch.setitem(costs.BLOCK_OPERATIONS, "cpu", 0.0)
    monkeypatch.setitem(costs.READING_TOKENS, "cpu", 0.0)
    monkeypatch.setattr(costs, "SCORE_OPERATIONS", 0)


def nested_prompts(seed: int = 0, *, inputs: int = 9, shuffled: bool = True) -> lc.Prompts:
    """A preamble, four instructions and inputs; repeated, cut short and unrelated prompts too."""
    rng = np.random.default_rng(seed)

    def some(most: int) -> list[int]:
        return rng.integers(3, D_VOCAB, rng.integers(1, most)).tolist()

    preamble = some(8)
    instructions = [preamble + some(12) for _ in range(4)]
    ids = [each + some(14) for each in instructions for _ in range(inputs)]
    ids += [preamble, ids[5], ids[7][:-1], some(2), some(20)]
    ids = [ids[i] for i in rng.permutation(len(ids))] if shuffled else ids
    first = [(0, 1)] * len(ids)
    middle = [(len(row) // 2, len(row) // 2 + 1) for row in ids]
    return lc.Prompts.from_token_lists(
        ids, pd.DataFrame({"n": range(len(ids))}), spans={"first": first, "middle": middle}
    )


def worst_error(found: xr.Dataset, expected: xr.Dataset) -> float:
    """Of any layer's states of any prompt at any position, relative to their norm."""
    errors = []
    for name in expected.data_vars:
        a, b = (x[name].values.astype(np.float64) for x in (found, expected))
        a, b = (x.reshape(*x.shape[:3], -1) for x in (a, b))
        errors.append(np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1))
    return max(float(error.max()) for error in errors)


@pytest.fixture
def tokens_run(monkeypatch):
    """Wraps a network's forward: the tokens of every call are listed."""

    def listen(model) -> list[int]:
        sizes: list[int] = []
        network = model.original_model
        forward = network.forward

        def counted(*args, **kwargs):
            given = args[0] if args else kwargs["input_ids"]
            sizes.append(given.numel())
            return forward(*args, **kwargs)

        monkeypatch.setattr(network, "forward", counted)
        return sizes

    return listen


# -- the plan, without a model ------------------------------------------------------------

TRIES = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=12), min_size=1, max_size=14)


def contexts(batches: Sequence[PackedBatch]) -> tuple[list[tuple[int, ...]], dict]:
    """What every computed token has before it, and that of everything wanted, by brute force.

    A token's states are those of its context if all that it sees have contexts which are the
    beginnings of its own.
    """
    cached: list[tuple[int, ...]] = []
    computed, wanted = [], {}
    for batch in batches:
        cached = [] if batch.fresh else cached
        seen, width = visible(batch, None)[:, 0], batch.past.shape[1]
        of: dict[tuple[int, int], tuple[int, ...]] = {}
        for group, place in (batch.tokens > 0).nonzero().tolist():
            keys = seen[group, place].nonzero()[:, 0].tolist()
            before = [cached[batch.past[group, key]] for key in keys if key < width]
            before += [of[group, key - width] for key in keys if width <= key < width + place]
            before.sort(key=len)
            context = (*(before[-1] if before else ()), int(batch.tokens[group, place]))
            assert before == [context[:n] for n in range(1, len(context))]
            assert int(batch.positions[group, place]) == len(context) - 1
            of[group, place] = context
        computed += of.values()
        cached += [of[group, place] for group, place in batch.cached.tolist()]
        for group, place, prompt, slot in batch.wanted.tolist():
            assert (prompt, slot) not in wanted
            wanted[prompt, slot] = of[group, place]
    return computed, wanted


@settings(max_examples=80, deadline=None)
@given(
    ids=TRIES,
    budget=st.integers(1, 60),
    most_cached=st.sampled_from([0, 3, 1000]),
    overhead=st.sampled_from([0.0, 5.0]),
    group_tokens=st.sampled_from([1, 4, 128]),
    data=st.data(),
)
def test_every_token_is_computed_once_and_sees_its_own_prompt(
    ids, budget, most_cached, overhead, group_tokens, data
):
    prompts = lc.Prompts.from_token_lists(ids, pd.DataFrame({"n": range(len(ids))}))
    ends = prompts.lengths - 1
    other = [data.draw(st.integers(0, int(end))) for end in ends]
    positions = torch.stack([ends, torch.tensor(other)], dim=1)
    cost = costs.Cost(forward=overhead, key=0.0)
    packing = pack(
        prompts.tokens,
        prompts.lengths,
        positions,
        budget=budget,
        most_cached=most_cached,
        cost=cost,
        group_tokens=group_tokens,
        gain=-np.inf,  # whether it pays or not
    )
    computed, wanted = contexts(packing.batches)
    distinct = {tuple(row[: n + 1]) for row in ids for n in range(len(row))}
    assert set(computed) == distinct
    assert packing.plan.distinct == len(distinct)
    assert packing.plan.limit == sum(map(len, ids)) / len(distinct)
    assert packing.plan.computed >= len(computed)
    assert wanted == {
        (row, slot): tuple(ids[row][: int(positions[row, slot]) + 1])
        for row in range(len(ids))
        for slot in (0, 1)
    }
    parts = sum(batch.fresh for batch in packing.batches)
    if parts == 1:
        assert len(computed) == len(distinct)
        assert sum(len(batch.cached) for batch in packing.batches) <= most_cached
    for batch in packing.batches:
        assert len(batch.tokens) == 1 or batch.tokens.numel() <= budget
    assert max(batch.tokens.shape[1] for batch in packing.batches) <= max(budget, 12)


def test_what_comes_after_the_last_wanted_token_is_not_computed():
    prompts = nested_prompts()
    found = lc.plan_prefixes(build("llama"), prompts, at="first_start")
    assert found.distinct == len(set(prompts.tokens[:, 0].tolist()))
    assert found.sharing == len(prompts)


def test_the_plan_is_printed_and_does_not_depend_on_shards():
    prompts = nested_prompts(inputs=40)
    plans = [lc.plan_prefixes(build("llama"), prompts, shard=shard) for shard in (30, 512)]
    ids = [row[:n].tolist() for row, n in zip(prompts.tokens, prompts.lengths, strict=True)]
    distinct = {tuple(row[: n + 1]) for row in ids for n in range(len(row))}
    assert {plan.distinct for plan in plans} == {len(distinct)}
    assert len(distinct) <= plans[1].computed <= plans[0].computed < plans[0].tokens
    text = str(plans[1])
    for number in (len(prompts), plans[1].tokens, len(distinct), plans[1].groups):
        assert f"{number:,}" in text
    native = lc.plan_prefixes(lc.load("native:sif-small"), prompts)
    assert (native.sharing, native.cost) == (0, native.plain_cost)
    assert "cannot share      no key/value cache in NativeModel" in str(native)


# -- with models --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ARCHITECTURES, *ODD])
def test_every_site_equals_the_plain_route_and_hugging_face(name, caplog, tokens_run):
    model, prompts = build(name), nested_prompts()
    kinds = [kind for kind in KINDS if kind != "resid_mid" or name != "neox"]
    options = {"at": ["answer", "middle_start"], "progress": False}
    full = lc.extract(model, prompts, kinds, share_prefixes=False, **options)
    with caplog.at_level(logging.INFO):
        lc.extract(model, prompts, kinds, **options)  # what is checked is checked now
        sizes = tokens_run(model)
        shared = lc.extract(model, prompts, kinds, **options)
    assert not caplog.records
    computed = sum(sizes)
    plan = lc.plan_prefixes(model, prompts, at=options["at"])
    assert sum(sizes) == computed == plan.computed < 0.7 * plan.tokens
    assert plan.refused is None
    # The listening forward is noted as code of the caller's.
    assert shared.attrs == full.attrs | {"hooks": shared.attrs["hooks"]}
    assert worst_error(shared, full) < 1e-5
    if name in ARCHITECTURES:  # the others are not built twice alike
        reference = hf_model(name)
        for row in range(len(prompts)):
            ids = prompts.tokens[row, : prompts.lengths[row]][None]
            with torch.no_grad():
                states = reference(ids, output_hidden_states=True).hidden_states[:-1]
            expected = torch.stack([state[0, -1] for state in states]).numpy()
            found = shared.resid[row, 0, :-1].values
            error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
            assert error.max() < 1e-5


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", [*ARCHITECTURES, *ODD, *UNSHARED])
def test_no_attention_matrix_of_long_prompts_is_made_nor_missed(name, share, monkeypatch):
    model, prompts = build(name), nested_prompts()
    kinds = [kind for kind in KINDS if kind != "attn_out" and (kind, name) != ("resid_mid", "neox")]
    options = {"at": ["answer", "middle_start"], "progress": False}
    plain = lc.extract(model, prompts, kinds, share_prefixes=False, **options)
    monkeypatch.setattr(shard_reading, "LONG", 8)
    lc.extract(model, prompts, "resid", **options)  # tries it, which makes matrices
    made: list[str] = []
    for block in model.blocks:
        block.attn.hook_pattern.register_forward_hook(lambda *_: made.append("pattern"))
    found = lc.extract(model, prompts, kinds, share_prefixes=share, **options)
    assert worst_error(found, plain) < 1e-5
    capped = getattr(model.original_model.config, "attn_logit_softcapping", None)
    before = len(made)
    # These have no such code.
    assert (before > 0) == (capped is not None or name in UNSHARED)
    # What leaves a block's attention is asked for: its hook has to fire.
    out = lc.extract(model, prompts, "attn_out", share_prefixes=share, **options)
    assert len(made) > before
    assert (out.attn_out != 0).any()


MODELS = {name: build(name) for name in ("llama", "gemma2, window 5")}


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(sorted(MODELS)),
    ids=st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=20), min_size=2, max_size=12),
    batch_tokens=st.sampled_from([1, 9, 40, 1000]),
    shard=st.sampled_from([1, 4, 100]),
    pad=st.integers(0, 3),
)
def test_neither_batching_nor_shards_nor_padding_matter(name, ids, batch_tokens, shard, pad):
    rows = pd.DataFrame({"n": range(len(ids))})
    prompts = lc.Prompts.from_token_lists(ids, rows)
    wider = lc.Prompts(
        torch.nn.functional.pad(prompts.tokens, (0, pad), value=7), prompts.lengths, rows, pad_id=7
    )
    model, sites = MODELS[name], ["resid", "z"]
    full = lc.extract(model, prompts, sites, share_prefixes=False, progress=False)
    shared = lc.extract(model, wider, sites, batch_tokens=batch_tokens, shard=shard, progress=False)
    assert worst_error(shared, full) < 1e-5


def test_order_does_not_matter():
    model, prompts = MODELS["llama"], nested_prompts()
    order = np.random.default_rng(0).permutation(len(prompts))
    one = lc.extract(model, prompts, "resid", progress=False)
    other = lc.extract(model, prompts.take(order), "resid", progress=False)
    assert worst_error(other.drop_vars("n"), one.isel(prompt=order).drop_vars("n")) < 1e-5


def test_little_memory_for_keys_and_values(monkeypatch, tokens_run):
    model, prompts = MODELS["llama"], nested_prompts()
    full = lc.extract(model, prompts, "resid", share_prefixes=False, progress=False)
    sizes = tokens_run(model)
    lc.extract(model, prompts, "resid", batch_tokens=30, progress=False)
    before = sum(sizes)
    # Twenty tokens of three layers with two heads of eight numbers for keys and for values.
    monkeypatch.setattr(costs, "CACHE_BYTES", 20 * 2 * 3 * 2 * 8 * 4)
    assert costs.most_cached(model) == 20
    sizes.clear()
    shared = lc.extract(model, prompts, "resid", batch_tokens=30, progress=False)
    assert before < sum(sizes) < int(prompts.lengths.sum())
    assert worst_error(shared, full) < 1e-5


@pytest.mark.parametrize("kept", ["float16", "float64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_of_numbers(dtype, kept, caplog):
    model, prompts = build("llama"), nested_prompts()
    model.to(dtype)
    options = {"dtype": kept, "progress": False}
    full = lc.extract(model, prompts, "resid", share_prefixes=False, **options)
    with caplog.at_level(logging.INFO):
        shared = lc.extract(model, prompts, "resid", **options)
    assert not caplog.records
    assert shared.resid.dtype == kept
    assert worst_error(shared, full) < max(rounding_tolerance(dtype), 1e-3)


def test_prompts_that_share_nothing_run_as_they_would_without(tokens_run):
    rng = np.random.default_rng(0)
    ids = [[3 + n, *rng.integers(3, D_VOCAB, rng.integers(1, 20)).tolist()] for n in range(40)]
    prompts = lc.Prompts.from_token_lists(ids, pd.DataFrame({"n": range(40)}))
    model = MODELS["llama"]
    assert lc.plan_prefixes(model, prompts).sharing == 0
    sizes = tokens_run(model)
    shared = lc.extract(model, prompts, "resid", progress=False)
    assert len(sizes) == 1
    full = lc.extract(model, prompts, "resid", share_prefixes=False, progress=False)
    xr.testing.assert_identical(shared, full)


def test_an_estimate_decides(monkeypatch):
    model, prompts = MODELS["llama"], nested_prompts()
    assert lc.plan_prefixes(model, prompts).sharing == len(prompts)
    monkeypatch.setitem(costs.READING_TOKENS, "cpu", 1e4)
    assert lc.plan_prefixes(model, prompts).sharing == 0


# -- models that cannot -------------------------------------------------------------------


@pytest.mark.parametrize("name", [*UNSHARED, "gpt-neo, long context", "native"])
def test_a_model_that_cannot_share_is_found_out_and_run_in_full(name, caplog):
    if name == "gpt-neo, long context":
        UNSHARED[name] = copy.deepcopy(UNSHARED["gpt-neo"])
        UNSHARED[name][1]["max_position_embeddings"] = 512
    model, prompts = build(name), nested_prompts()
    with caplog.at_level(logging.INFO):
        found = lc.extract(model, prompts, ["resid", "z"], progress=False)
    assert len(caplog.records) == 1
    assert "cannot share prefixes" in caplog.text
    assert "run in full" in caplog.text
    full = lc.extract(model, prompts, ["resid", "z"], share_prefixes=False, progress=False)
    xr.testing.assert_identical(found, full)


def test_hooks_of_the_caller_see_prompts_as_they_are(caplog):
    prompts, name = nested_prompts(), "blocks.1.hook_resid_pre"

    def shift_the_last(state, hook):
        return torch.cat([state[:, :-1], state[:, -1:] + 1], dim=1)

    for context in (
        lambda model: model.hooks(fwd_hooks=[(name, shift_the_last)]),
        lambda model: model.blocks[1].register_forward_hook(lambda *given: None),
    ):
        caplog.clear()
        model = build("llama")
        with context(model), caplog.at_level(logging.INFO):
            found = lc.extract(model, prompts, "resid", progress=False)
            full = lc.extract(model, prompts, "resid", share_prefixes=False, progress=False)
        xr.testing.assert_identical(found, full)
        assert len(caplog.records) == 1
        assert "it has hooks" in caplog.text
        assert refusal(model) is None


def test_no_hook_outlives_the_call():
    model, prompts = build("llama"), nested_prompts()
    lc.extract(model, prompts, "resid 1", progress=False)
    answers(model, prompts, lambda logits, rows: logits)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_the_doctor_says_whether_prefixes_are_shared():
    assert examine(build("gemma2, window 5"))["shared prefixes"] == "yes"
    assert examine(build("bloom"))["shared prefixes"].startswith("no: ")
    native = examine("native:sif-small")
    assert native["shared prefixes"] == "no: no key/value cache in NativeModel"


# -- stores -------------------------------------------------------------------------------


def test_a_resumed_store_has_the_same_bytes(tmp_path, monkeypatch):
    model, prompts = MODELS["llama"], nested_prompts(inputs=15)
    options = {"sites": ["resid", "z"], "shard": 16, "progress": False}
    memory = lc.extract(model, prompts, **options)
    disk = lc.extract(model, prompts, store=tmp_path / "a", **options)
    xr.testing.assert_identical(disk.load(), memory)

    read, calls = shard_reading.BatchReader.read, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(self, *arguments)

    monkeypatch.setattr(shard_reading.BatchReader, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lc.extract(model, prompts, store=tmp_path / "b", **options)
    resumed = lc.extract(model, prompts, store=tmp_path / "b", resume=True, **options)
    assert len(calls) == 3 + len(prompts) // 16 - 1
    xr.testing.assert_identical(resumed.load(), memory)
    assert store.verify(tmp_path / "b").size == 0
    full = lc.extract(model, prompts, share_prefixes=False, store=tmp_path / "c", **options)
    assert worst_error(disk, full) < 1e-5
    xr.testing.assert_equal(disk.drop_vars(["resid", "z"]), full.drop_vars(["resid", "z"]))


# -- answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2, window 5", "bloom", "native"])
def test_answers_are_those_of_each_prompt_alone(name, tokens_run):
    model, prompts = build(name), nested_prompts()
    with torch.no_grad():
        alone = torch.stack(
            [
                model(row[None, :n])[0, -1]
                for row, n in zip(prompts.tokens, prompts.lengths, strict=True)
            ]
        )
    answers(model, prompts, lambda logits, rows: rows)  # what is checked is checked now
    sizes = tokens_run(model)
    options: Any
    for options in ({}, {"batch_tokens": 30}, {"share_prefixes": False}):
        sizes.clear()
        found = answers(model, prompts, lambda logits, rows: logits, **options)
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
        fewer = sum(sizes) < 0.8 * int(prompts.lengths.sum())
        assert fewer == (name not in ("bloom", "native") and "share_prefixes" not in options)
    numbers = answers(model, prompts, lambda logits, rows: rows)
    assert numbers.tolist() == list(range(len(prompts)))
