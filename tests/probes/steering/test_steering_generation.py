"""Steered generation against a plain loop: unwrapped Hugging Face models, torch hooks, no cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import lensclust as lc
from lensclust.inference.answer_scores import greedy_texts
from lensclust.inference.readouts import answers
from lensclust.models.agreement import relative_error
from lensclust.models.sites import Site
from probes.design.centroids import mean_states
from probes.steering.gating import only_members
from probes.steering.interventions import Intervention, shift
from probes.steering.steering import steer
from tests.tiny import D_VOCAB, hf_model, tiny_tokenizer

BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers"}
BLOCKS |= {"gemma2": "model.layers", "qwen2": "model.layers"}
MIXERS = {"gpt2": "attn.c_proj"}
SITES = ["resid 1", "z 1.2"]
D_HEAD = 8
NEW = 4
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "stop_at_eos": False}

# Token index, length of the prompt, row -> whether it is changed.
Chosen = Callable[[int, int, int], bool]


def add() -> Intervention:
    """Another fixed vector at each site; the change depends on the state, too."""
    return Intervention("add", lambda site: lambda states: 0.5 * states + vector(site))


def vector(site: Site) -> torch.Tensor:
    generator = torch.Generator().manual_seed(site.layer + (site.head or 0))
    return 2 * torch.randn(32 if site.head is None else D_HEAD, generator=generator)


def plain(name: str, prompts: list[list[int]], chosen: Chosen) -> tuple[list, torch.Tensor]:
    """Tokens and logits of each prompt, alone, every step a forward of the whole sequence."""
    model: Any = hf_model(name)
    blocks, edit = model.get_submodule(BLOCKS[name]), add().edit_at
    now = torch.zeros(0, dtype=torch.bool)

    def residual(_module, args, kwargs):
        states = args[0].clone()
        states[0, now] = edit(Site("resid", 1))(states[0, now])
        return (states, *args[1:]), kwargs

    def head(_module, args):
        states = args[0].clone()
        part = states[0, now, 2 * D_HEAD : 3 * D_HEAD]
        states[0, now, 2 * D_HEAD : 3 * D_HEAD] = edit(Site("z", 1, 2))(part)
        return (states, *args[1:])

    blocks[1].register_forward_pre_hook(residual, with_kwargs=True)
    blocks[1].get_submodule(MIXERS.get(name, "self_attn.o_proj")).register_forward_pre_hook(head)
    tokens, logits = [], []
    for row, prompt in enumerate(prompts):
        made, read = list(prompt), []
        for _ in range(NEW):
            now = torch.tensor([chosen(i, len(prompt), row) for i in range(len(made))])
            with torch.no_grad():
                read.append(model(torch.tensor([made]), use_cache=False).logits[0, -1])
            made.append(int(read[-1].argmax()))
        tokens.append(made[len(prompt) :])
        logits.append(torch.stack(read))
    return tokens, torch.stack(logits)


def prompts_of(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, D_VOCAB, length).tolist() for length in lengths]


def ways(prompts: list[list[int]]) -> dict[str, tuple[dict[str, Any], Chosen]]:
    """What is given to `steer`, and what it means."""
    lengths = torch.tensor([len(p) for p in prompts])
    each = torch.arange(len(prompts)) + 1
    return {
        "index 0": ({"positions": 0}, lambda i, n, r: i == 0),
        "middle": ({"positions": (lengths // 2).tolist()}, lambda i, n, r: i == n // 2),
        "last index": ({"positions": lengths - 1}, lambda i, n, r: i == n - 1),
        "one a row": ({"positions": each.numpy()}, lambda i, n, r: i == r + 1),
        "generated token": ({"positions": lengths + 1}, lambda i, n, r: i == n + 1),
        "last": ({"positions": "last"}, lambda i, n, r: i >= n - 1),
        "all": ({"positions": "all"}, lambda i, n, r: True),
        "since 2": ({"since": 2}, lambda i, n, r: i >= 2),
        "generated": ({"since": pd.Series(lengths.tolist())}, lambda i, n, r: i >= n),
    }


def left_padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return tokens, mask


def close(found: Any, expected: tuple[list, torch.Tensor]) -> None:
    assert found.sequences[:, -NEW:].tolist() == expected[0]
    assert relative_error(torch.stack(found.logits, 1), expected[1]) < 1e-4


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("lengths", [(6, 6), (7, 4)], ids=["one length", "two lengths"])
def test_steered_generation_is_that_of_a_plain_loop(name, lengths):
    bridge: Any = lc.load(hf_model(name))
    hooks = len(bridge.original_model._forward_pre_hooks)
    prompts = prompts_of(*lengths)
    tokens, mask = left_padded(prompts)
    options = OPTIONS | {"verbose": False, "output_logits": True, "return_type": "tokens"}
    if len(set(lengths)) > 1:
        options["attention_mask"] = mask
    answers = set()
    for given, chosen in ways(prompts).values():
        expected = plain(name, prompts, chosen)
        answers.add(str(expected[1].sum()))
        with steer(bridge, add(), at=SITES, **given):
            # Several generations in one context, and without the cache.
            for cache in (True, False):
                close(bridge.generate(tokens, use_past_kv_cache=cache, **options), expected)
    assert len(answers) == len(ways(prompts))  # each way does another thing
    assert not {"generate", "generate_stream"} & {*vars(bridge), *vars(bridge.original_model)}
    assert len(bridge.original_model._forward_pre_hooks) == hooks


def test_texts_of_different_lengths_and_the_networks_own_generation(tmp_path):
    bridge: Any = lc.load(hf_model("llama"), tokenizer=tiny_tokenizer(tmp_path))
    texts = ["w1 w2 w3 w4 w5 w6", "w7 w8 w9"]
    prompts = bridge.tokenizer(texts).input_ids
    for given, chosen in ways(prompts).values():
        expected, _ = plain("llama", prompts, chosen)
        words = [bridge.tokenizer.decode(row) for row in expected]
        with steer(bridge, add(), at=SITES, **given):
            written = bridge.generate(texts, verbose=False, **OPTIONS)
            own = bridge.hf_generate(texts, return_type="tokens", **OPTIONS)
            plainly = bridge.hf_generate(
                texts, return_type="tokens", use_cache=False, use_past_kv_cache=False, **OPTIONS
            )
        assert [text.split()[-NEW:] for text in written] == [text.split() for text in words]
        assert own[:, -NEW:].tolist() == plainly[:, -NEW:].tolist() == expected


def test_prompts_of_different_lengths_row_by_row_and_streamed(tmp_path):
    bridge: Any = lc.load(hf_model("qwen2"), tokenizer=tiny_tokenizer(tmp_path))
    lists = prompts_of(4, 7, 4, 6)
    rows = pd.DataFrame({"task": list("abab")})
    prompts = lc.Prompts.from_token_lists(lists, rows)
    last = prompts.position("answer")
    given: Any
    for given, chosen in (
        ({"positions": last}, lambda i, n, r: i == n - 1),
        ({"since": last}, lambda i, n, r: i >= n - 1),
        ({"positions": "last"}, lambda i, n, r: i >= n - 1),
    ):
        expected, _ = plain("qwen2", lists, chosen)
        with steer(bridge, add(), at=SITES, **given):
            # Runs the rows in an order and in batches of its own.
            texts = greedy_texts(bridge, prompts, new_tokens=NEW)
        assert texts == [bridge.tokenizer.decode(row) for row in expected]
    row = torch.tensor(lists[1:2])
    stream = {"max_tokens_per_yield": 2, "return_type": "tokens", "verbose": False} | OPTIONS
    for cache in (True, False):
        with steer(bridge, add(), at=SITES, positions="last"):
            *_, parts = bridge.generate_stream(row, use_past_kv_cache=cache, **stream)
        assert parts[0, -1] == expected[1][-1]


def test_beams_stay_with_their_prompts():
    bridge: Any = lc.load(hf_model("gpt2"))
    tokens = torch.tensor(prompts_of(6, 6))
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": NEW, "do_sample": False}
    options |= {"eos_token_id": None, "pad_token_id": 0}
    for given in ({"since": 3}, {"positions": 0}, {"positions": [1, 1, 1, 4, 4, 4]}):
        found = []
        for cache in (True, False):
            with torch.no_grad(), steer(bridge, add(), at=SITES, **given):
                found.append(bridge.original_model.generate(tokens, use_cache=cache, **options))
        assert torch.equal(*found)


def test_a_prompt_in_pieces():
    bridge: Any = lc.load(hf_model("llama"))
    tokens = torch.tensor(prompts_of(8))
    given: Any
    for given in ({"positions": 6}, {"since": 2}, {"positions": "all"}, {"positions": 0}):
        with torch.no_grad(), steer(bridge, add(), at=SITES, **given):
            whole = bridge(tokens)
            _, cache = bridge(tokens[:, :3], return_type="logits_and_cache", use_cache=True)
            rest = bridge(tokens[:, 3:], past_key_values=cache)
            # The whole prompt again, piece by piece, by the network's own loop.
            own = bridge.original_model.generate(
                tokens, prefill_chunk_size=3, max_new_tokens=2, do_sample=False, eos_token_id=None,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        assert relative_error(rest, whole[:, 3:]) < 1e-4
        assert relative_error(own.logits[0], whole[:, -1]) < 1e-4
    with torch.no_grad(), steer(bridge, add(), at=SITES):
        _, cache = bridge(tokens[:, :3], return_type="logits_and_cache", use_cache=True)
        with pytest.raises(lc.InputError, match="run in pieces"):
            bridge(tokens[:, 3:], past_key_values=cache)
        with pytest.raises(lc.InputError, match="run in pieces"):
            bridge.original_model.generate(tokens, prefill_chunk_size=7, max_new_tokens=2)


def test_a_native_model_has_no_cache():
    bridge: Any = lc.load("native:sif-small")
    tokens = torch.tensor([[1, 5, 9, 3], [2, 6, 7, 8]])
    move = Intervention("halve", lambda site: lambda states: 0.5 * states + 1)
    given: Any
    for given, first in (({"positions": "last"}, 3), ({"since": [1, 1]}, 1)):

        def change(value, hook, first=first):
            value = value.clone()
            value[:, first:] = 0.5 * value[:, first:] + 1
            return value

        expected = tokens
        for _ in range(NEW):
            logits = bridge.run_with_hooks(
                expected, fwd_hooks=[("blocks.2.hook_resid_pre", change)]
            )
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
        with steer(bridge, move, at="resid 2", **given):
            assert torch.equal(bridge.generate(tokens, verbose=False, **OPTIONS), expected)


def test_random_directions_and_gates_are_the_same_with_a_cache():
    bridge: Any = lc.load(hf_model("gemma2"))
    prompts = prompts_of(7, 4)
    tokens, mask = left_padded(prompts)
    rows = pd.DataFrame({"task": list("aabb")})
    acts = lc.extract(
        bridge, lc.Prompts.from_token_lists(prompts_of(5, 6, 7, 8), rows), "resid", progress=False
    )
    means = mean_states(acts)
    twin = shift(means, "a", "b").scaled(3).random_twin()
    options = OPTIONS | {"verbose": False, "output_logits": True, "attention_mask": mask}
    given: Any
    for move in (twin, only_members(twin, means, "a"), twin.scaled(2).norm_matched(twin)):
        for given in ({"positions": "last"}, {"positions": "all"}, {"positions": [1, 3]}):
            found = []
            for cache in (True, False):
                with steer(bridge, move, at="resid 2", **given):
                    made = bridge.generate(tokens, use_past_kv_cache=cache, **options)
                found.append(torch.stack(made.logits, 1))
            assert relative_error(*found) < 1e-4


def test_the_librarys_own_forwards_follow_their_rows():
    bridge: Any = lc.load(hf_model("gpt2"))
    prompts = lc.Prompts.from_token_lists(
        prompts_of(3, 7, 5, 6), pd.DataFrame({"task": list("abab")})
    )
    where = torch.tensor([1, 4, 0, 2])
    with torch.no_grad(), steer(bridge, add(), at="resid 1", positions=where):
        expected = bridge(prompts.tokens)[torch.arange(4), prompts.lengths - 1]
        for budget in (None, 7):
            found = answers(bridge, prompts, lambda logits, rows: logits, batch_tokens=budget)
            assert relative_error(found, expected) < 1e-4
        acts = lc.extract(bridge, prompts, "resid", progress=False)
        _, cache = bridge.run_with_cache(prompts.tokens, names_filter="blocks.2.hook_resid_pre")
        there = cache["blocks.2.hook_resid_pre"][torch.arange(4), prompts.lengths - 1]
        read = torch.from_numpy(acts.resid.sel(layer=2).isel(position=0).values)
        assert relative_error(read, there) < 1e-4
    with steer(bridge, add(), at="resid 1", positions="last"), pytest.raises(lc.InputError):
        lc.extract(bridge, prompts, "resid", progress=False)
    with steer(bridge, add(), at="resid 1", positions=where[:2]), pytest.raises(lc.InputError):
        lc.extract(bridge, prompts.take(range(3)), "resid", progress=False)


def test_what_cannot_be_placed_is_refused():
    bridge: Any = lc.load(hf_model("llama"))
    hooks = len(bridge.original_model._forward_pre_hooks)
    tokens = torch.tensor(prompts_of(6, 6))
    for given, message in (
        ({"positions": -1}, "positions hold -1"),
        ({"positions": torch.tensor([0.5, 1.0])}, "expected one integer"),
        ({"positions": np.array([True, False])}, "expected one integer"),
        ({"positions": np.array([[0, 1]])}, "expected one integer"),
        ({"positions": []}, "expected one integer"),
        ({"positions": 0, "since": 0}, "both positions and since"),
    ):
        with pytest.raises(lc.InputError, match=message), steer(bridge, add(), at=SITES, **given):
            pass
    options = OPTIONS | {"verbose": False}
    with (
        pytest.raises(lc.InputError, match="position 20 given, but a batch of 9 tokens"),
        steer(bridge, add(), at=SITES, positions=[0, 20]),
    ):
        bridge.generate(tokens, **options)
    with (
        pytest.raises(lc.InputError, match="position 7 given"),
        steer(bridge, add(), at=SITES, since=7),
    ):
        bridge(tokens)
    # What was begun before is not known to the context.
    with torch.no_grad():
        _, cache = bridge(tokens, return_type="logits_and_cache", use_cache=True)
        with steer(bridge, add(), at=SITES, positions="last"), pytest.raises(lc.InputError):
            bridge(tokens[:, :1], past_key_values=cache)
    assert len(bridge.original_model._forward_pre_hooks) == hooks


def test_a_site_that_never_fires_is_refused():
    bridge: Any = lc.load(hf_model("llama"))
    tokens = torch.tensor(prompts_of(6))
    # The block runs the network's own code, beside the hook.
    mlp = bridge.blocks[1].mlp
    object.__setattr__(mlp, "forward", mlp.original_component.forward)
    with (
        pytest.raises(lc.InputError, match="does not fire") as caught,
        steer(bridge, add(), at=["mlp_out 0", "mlp_out 1"], positions="all"),
    ):
        bridge(tokens)
    assert "\n" not in str(caught.value)
    before = bridge(tokens)
    with steer(bridge, add(), at="mlp_out 0", positions="all"):
        assert not torch.equal(bridge(tokens), before)
