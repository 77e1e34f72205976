"""Cached generation is compared with a plain forward at load, in cases in which it can be wrong."""

from __future__ import annotations

import copy
import logging
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

import lensclust as lc
from lensclust.cli.doctor import examine
from lensclust.inference.answer_scores import greedy_texts
from lensclust.models.agreement import _MEMO
from lensclust.models.cached_generation import FIRST_BAD, cached_generation, uncached
from probes.steering.interventions import Intervention
from probes.steering.steering import steer
from tests.families.registry import FAMILIES, build
from tests.longrope import changing, greedy
from tests.tiny import ARCHITECTURES, hf_model, tiny_tokenizer

MOVE = Intervention("plus one", lambda site: lambda states: states + 1)
TOKENS = torch.tensor([[5, 9, 3, 7, 11], [8, 4, 6, 2, 9]])
OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False}
OPTIONS |= {"verbose": False}
STATES = "hidden_states"


@pytest.fixture
def lost_cache(monkeypatch):
    """As under transformers 5.24: attention is not handed what was computed before."""
    monkeypatch.setattr(AttentionBridge, "_update_kv_cache", lambda self, k, v, **_: (k, v))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_are_right_and_left_as_they_were(name):
    bridge: Any = lc.load(hf_model(name))
    _MEMO.pop(bridge)

    def state() -> list[Any]:
        points = {id(point): len(point._forward_hooks) for point in bridge.hook_dict.values()}
        flags = [module.training for module in bridge.modules()]
        hooks = [len(module._forward_hooks) for module in bridge.original_model.modules()]
        return [points, flags, hooks, torch.get_rng_state().tolist()]

    before = state()
    assert cached_generation(bridge).right is True
    assert state() == before
    found, plain = (bridge.generate(TOKENS, use_past_kv_cache=c, **OPTIONS) for c in (True, False))
    assert torch.equal(found, plain)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lost_cache_is_found(name, dtype, lost_cache, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        bridge: Any = lc.load(hf_model(name).to(dtype))
    assert cached_generation(bridge).right is False
    assert [r.getMessage() for r in caplog.records if "use_past_kv_cache=False" in r.getMessage()]
    monkeypatch.setattr(
        sys.modules["lensclust.models.cached_generation"].transformers, "__version__", "5.24.0"
    )
    with pytest.raises(lc.InputError, match=r"pip install 'transformers<5\.24'") as caught:
        lc.load(hf_model(name).to(dtype))
    assert "5.24.0 and transformer-lens 4." in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_block_and_one_position_are_enough(monkeypatch):
    update = AttentionBridge._update_kv_cache

    def last_forgets(self, k, v, **given):
        return (k, v) if self._layer_idx == 2 else update(self, k, v, **given)

    with monkeypatch.context() as patched:
        patched.setattr(AttentionBridge, "_update_kv_cache", last_forgets)
        assert cached_generation(lc.load(hf_model("llama"))).right is False

    def late(network, args, given):
        # The first step behind the prompt is right, the second is not.
        if (places := given.get("position_ids")) is not None and int(places.max()) > 5:
            return args, given | {"position_ids": places + 1}
        return None

    hf = hf_model("qwen2")
    hf.register_forward_pre_hook(late, with_kwargs=True)
    assert cached_generation(lc.load(hf)).right is False


def test_what_is_wrong_with_a_cache_is_refused_with_it_and_right_without(lost_cache, tmp_path):
    bridge: Any = lc.load(hf_model("llama"), tokenizer=tiny_tokenizer(tmp_path))
    with steer(bridge, MOVE, at="resid 1", positions="last"):
        plain = bridge.generate(TOKENS, use_past_kv_cache=False, **OPTIONS)
        with pytest.raises(lc.InputError, match="use_past_kv_cache=False"):
            bridge.generate(TOKENS, **OPTIONS)
        prompts = lc.Prompts.from_token_lists(TOKENS.tolist(), pd.DataFrame({"task": ["a", "b"]}))
        texts = greedy_texts(bridge, prompts, new_tokens=4)
    assert texts == [bridge.tokenizer.decode(row) for row in plain[:, 5:]]


def test_what_cannot_be_tried_loads():
    assert cached_generation(lc.load("native:sif-small")).right is None
    bridge: Any = lc.load(hf_model("gpt2"))

    def fails(*args, **options):
        raise RuntimeError("one line\nand another")

    other: Any = lc.load(hf_model("opt"))
    other.original_model.to("meta")
    assert "off the devices" in cached_generation(other).why
    fresh: Any = hf_model("neox")
    fresh.forward, forward = fails, fresh.forward
    loaded: Any = lc.load(fresh)
    assert cached_generation(loaded).why == "not tried: RuntimeError: one line"
    fresh.forward = forward
    assert examine(bridge)["cached generation"] == "equals a forward of the whole sequence"


KINDS = [("phi3", "longrope"), ("gemma3", "longrope"), ("llama", "dynamic"), ("qwen2", "dynamic")]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_cache_that_outlives_its_frequencies_is_not_used(name, kind, tmp_path, caplog):
    network: Any = changing(name, 20, kind=kind)
    plain = copy.deepcopy(network)
    with caplog.at_level(logging.WARNING):
        bridge: Any = lc.load(network, tokenizer=tiny_tokenizer(tmp_path))
    assert "beyond 20 tokens, where its frequencies change" in caplog.text
    assert "wrong beyond 20 tokens" in examine(bridge)["cached generation"]
    rng = torch.Generator().manual_seed(0)
    lengths = (9, 17, 17, 19)
    rows = [torch.randint(4, 60, (n,), generator=rng).tolist() for n in lengths]
    prompts = lc.Prompts.from_token_lists(rows, pd.DataFrame({"row": lengths}))
    texts = greedy_texts(bridge, prompts, new_tokens=7)
    written = [greedy(plain, torch.tensor([row]), 7)[0, len(row) :] for row in rows]
    assert texts == [bridge.tokenizer.decode(tokens) for tokens in written]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_steering_refuses_a_cache_where_frequencies_change(name, kind):
    network: Any = changing(name, 20, kind=kind)
    plain = copy.deepcopy(network)
    bridge: Any = lc.load(network)
    tokens = torch.randint(4, 60, (2, 17), generator=torch.Generator().manual_seed(1))
    module = plain.get_decoder().layers[1]
    options = {**OPTIONS, "return_type": "tokens"}

    def moved(length: int, new: int) -> torch.Tensor:
        def add(_module: Any, args: Any, given: Any) -> Any:
            states = args[0] if args else given["hidden_states"]
            return (
                ((states + 1, *args[1:]), given) if args else (args, {**given, STATES: states + 1})
            )

        handle = module.register_forward_pre_hook(add, with_kwargs=True)
        found = greedy(plain, tokens[:, :length], new)
        handle.remove()
        return found

    with steer(bridge, MOVE, at="resid 1", positions="all"):
        # 17 tokens and three of four new ones are run: the cache holds throughout.
        assert torch.equal(bridge.generate(tokens, **options), moved(17, 4))
        longer = {**options, "max_new_tokens": 6}
        with pytest.raises(lc.InputError, match="frequencies change beyond 20 tokens") as caught:
            bridge.generate(tokens, **longer)
        assert "\n" not in str(caught.value)
        found = bridge.generate(tokens, use_past_kv_cache=False, **longer)
        assert torch.equal(found, moved(17, 6))


def test_beyond_its_change_the_cache_of_longrope_is_right_again():
    network: Any = changing("qwen2", 12)
    plain = copy.deepcopy(network)
    bridge: Any = lc.load(network)
    assert cached_generation(bridge).right is True
    tokens = torch.randint(4, 60, (2, 13), generator=torch.Generator().manual_seed(1))
    nothing = Intervention("nothing", lambda site: lambda states: states)
    with steer(bridge, nothing, at="resid 1", positions="all"):
        found = bridge.generate(tokens, **{**OPTIONS, "return_type": "tokens"})
    assert torch.equal(found, greedy(plain, tokens, 4))


@pytest.mark.parametrize("step", [2, 4, 5, 6, 7, 8])
def test_frequencies_that_change_among_the_tried_tokens_are_not_a_lost_cache(step):
    assert cached_generation(lc.load(changing("llama", step))).right is True


@pytest.mark.parametrize("name", ["bamba", "nemotron_h", "mamba"])
def test_the_advice_for_models_whose_states_transformers_must_make_works(name):
    network: Any = build(FAMILIES[name])
    plain = copy.deepcopy(network)
    bridge: Any = lc.load(network)
    tokens = torch.randint(4, 60, (2, 11), generator=torch.Generator().manual_seed(1))
    assert "model.original_model.generate(tokens, use_cache=False)" in uncached(bridge)
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": False, "eos_token_id": None}
    nothing = Intervention("nothing", lambda site: lambda states: states)
    for steering in (nullcontext(), steer(bridge, nothing, at="resid 1", positions="all")):
        with steering:
            found = bridge.original_model.generate(tokens, **options)
        assert torch.equal(found, greedy(plain, tokens, 5))
    if name == "bamba":
        with steer(bridge, MOVE, at="resid 1"), pytest.raises(lc.InputError) as caught:
            bridge.generate(tokens[:1], **OPTIONS)
        assert uncached(bridge) in str(caught.value)


def test_the_bound_is_that_of_the_package():
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    bound = re.search(r'"transformers>=[\d.]+,<(\d+)\.(\d+)"', text)
    assert bound is not None
    assert tuple(map(int, bound.groups())) == FIRST_BAD
