"""A user's own code in a network: equal to plain hooks at every size, or refused in one line."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Model
from transformers.models.llama.modeling_llama import LlamaModel

import lensclust as lc
import probes
from probes.attention import answers_cut_off
from tests.lensclust.models.test_own_forwards import states
from tests.tiny import D_VOCAB, hf_model


def prompts(*lengths: int, beginning: list[int] | None = None) -> lc.Prompts:
    """Random prompts of these lengths, with a common beginning if one is given."""
    rng, start = np.random.default_rng(sum(lengths)), beginning or []
    lists = [[*start, *rng.integers(3, D_VOCAB, n).tolist()] for n in lengths]
    return lc.Prompts.from_token_lists(lists, pd.DataFrame({"n": lengths}))


def error(model: Any, network: Any, given: lc.Prompts, layer: int) -> float:
    """Largest relative error of extracted states against an unwrapped network."""
    acts = lc.extract(model, given, f"resid {layer}", progress=False)
    errors = []
    for found, tokens, n in zip(
        acts.resid.values[:, 0, 0], given.tokens.tolist(), given.lengths.tolist(), strict=True
    ):
        right = states(network, layer, tokens[:n])
        errors.append(np.linalg.norm(found - right) / np.linalg.norm(right))
    return float(max(errors))


class Fading(GPT2Attention):
    """Attention that halves its input behind the 20th token."""

    def forward(self, hidden_states: Any, *given: Any, **named: Any) -> Any:
        weight = torch.ones(hidden_states.shape[1])
        weight[20:] = 0.5
        return super().forward(hidden_states * weight[:, None], *given, **named)


class Crowded(GPT2MLP):
    """An MLP that serves the first 50 tokens of a forward only."""

    def forward(self, hidden_states: Any) -> Any:
        out = super().forward(hidden_states).flatten(0, -2).clone()
        out[50:] = 0
        return out.view_as(hidden_states)


class Turned(GPT2Model):
    """Prompts of a batch change places inside the network, and change back behind it."""

    def forward(self, *given: Any, **named: Any) -> Any:
        named["input_ids"] = named["input_ids"].flip(0)
        out: Any = super().forward(*given, **named)
        out.last_hidden_state = out.last_hidden_state.flip(0)
        return out


class Restarting(LlamaModel):
    """Positions count from the last token 7 on."""

    def forward(self, *given: Any, **named: Any) -> Any:
        place = torch.arange(named["input_ids"].shape[1])[None]
        begun = torch.where(named["input_ids"] == 7, place, 0).cummax(1).values
        named["position_ids"] = place - begun
        return super().forward(*given, **named)


class Twice(LlamaModel):
    """A network that runs all its blocks twice."""

    def forward(self, *given: Any, **named: Any) -> Any:
        named |= {"past_key_values": None, "use_cache": False}
        first: Any = super().forward(*given, **named)
        named |= {"input_ids": None, "inputs_embeds": first.last_hidden_state}
        return super().forward(*given, **named)


def with_part(name: str, kind: type[nn.Module]) -> Any:
    """A tiny GPT-2 whose attention, MLPs or whole stack are of another class."""
    network: Any = hf_model("gpt2")
    config = network.config
    if name == "transformer":
        other: Any = kind(config)
        other.load_state_dict(network.transformer.state_dict())
        network.transformer = other
        return network.eval()
    for index, block in enumerate(network.transformer.h):
        inner = 4 * config.n_embd
        other = kind(config, layer_idx=index) if name == "attn" else kind(inner, config)
        other.load_state_dict(getattr(block, name).state_dict())
        setattr(block, name, other)
    return network.eval()


def other_stack(kind: type[LlamaModel]) -> Any:
    network: Any = hf_model("llama")
    stack = kind(network.config)
    stack.load_state_dict(network.model.state_dict())
    network.model = stack
    return network.eval()


@pytest.mark.parametrize(
    ("name", "kind", "small", "large"),
    [
        ("attn", Fading, (5, 8), (30, 41)),
        ("mlp", Crowded, (9,), (9,) * 12),
        ("transformer", Turned, (6,), (4, 6, 5)),
    ],
)
def test_a_fault_that_begins_at_some_size_is_refused_there(
    name: str, kind: type[nn.Module], small: tuple[int, ...], large: tuple[int, ...]
):
    network = with_part(name, kind)
    model = lc.load(copy.deepcopy(network))
    layer = model.cfg.n_layers
    if kind is not Turned:  # two prompts are tried, whatever the call holds
        assert error(model, network, prompts(*small), layer) < 1e-4
    with pytest.raises(lc.InputError, match=rf"of your own \({kind.__name__}\)") as refused:
        lc.extract(model, prompts(*large), "resid", progress=False)
    assert "\n" not in str(refused.value)


def test_positions_that_depend_on_tokens_are_right_whatever_came_before():
    network = other_stack(Restarting)
    model = lc.load(copy.deepcopy(network))
    layer, trunk = model.cfg.n_layers, list(range(8, 60))
    assert error(model, network, prompts(4, 5, 6, 7, beginning=trunk), layer) < 1e-4
    trunk[30] = 7
    assert error(model, network, prompts(4, 5, 6, 7, beginning=trunk), layer) < 1e-4


def shared_block() -> Any:
    network: Any = hf_model("llama")
    layers = network.model.layers
    layers[len(layers) - 1] = layers[0]
    return network


@pytest.mark.parametrize("make", [shared_block, lambda: other_stack(Twice)])
def test_what_runs_twice_is_refused(make: Any):
    model, given = lc.load(make()), prompts(4, 6)
    for site in ("z", "attn_out", "head"):
        with pytest.raises(lc.InputError, match="fires 2 times in one forward"):
            lc.extract(model, given, site, progress=False)
    vector = np.ones(model.cfg.d_model)
    with (
        pytest.raises(lc.InputError, match="fires 2 times in one forward"),
        probes.steer(model, probes.add_direction(vector), at="attn_out 0"),
    ):
        pass
    hidden = torch.zeros_like(given.tokens, dtype=torch.bool)
    hidden[:, 0] = True
    with pytest.raises(lc.InputError, match=r"block 0 cannot be cut: .* fires 2 times"):
        answers_cut_off(model, given, lambda logits, _: logits, hidden, since="answer")


def test_states_between_blocks_that_run_twice_are_those_behind_the_last_or_refused():
    with pytest.raises(lc.InputError, match="fires 2 times in one forward"):
        lc.extract(lc.load(other_stack(Twice)), prompts(4, 6), "resid", progress=False)
    network = shared_block()
    model = lc.load(copy.deepcopy(network))
    acts = lc.extract(model, given := prompts(4, 6), "resid", progress=False)
    with torch.no_grad():
        for row, (tokens, n) in enumerate(zip(given.tokens, given.lengths.tolist(), strict=True)):
            out = network(tokens[None, :n], use_cache=False, output_hidden_states=True)
            for layer in range(model.cfg.n_layers):
                found = acts.resid.values[row, 0, layer]
                assert np.allclose(found, out.hidden_states[layer][0, -1].numpy(), atol=1e-5)


STRENGTH = {"of": 1.0}


class Gain(nn.Module):
    factor = 1.0

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return torch.tanh(value) * self.factor * _gain()


def _gain() -> float:
    return STRENGTH["of"]


@pytest.mark.parametrize("where", ["class", "global"])
def test_class_attributes_and_globals_are_settings(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    network: Any = hf_model("llama")
    network.model.layers[0].mlp.act_fn = Gain()
    model = lc.load(network)
    lc.extract(model, prompts(4, 5), "resid 2", store=tmp_path / "s", progress=False)
    if where == "class":
        monkeypatch.setattr(Gain, "factor", 2.0)
    else:
        monkeypatch.setitem(STRENGTH, "of", 2.0)
    with pytest.raises(lc.InputError, match="other settings"):
        lc.extract(
            model, prompts(6, 7), "resid 2", store=tmp_path / "s", append=True, progress=False
        )


@pytest.mark.parametrize("name", ["neox", "llama"])
def test_functional_calls_and_exports_of_the_network_go_on(name: str):
    network: Any = hf_model(name)
    network.config.use_cache = False
    tokens = torch.tensor([[3, 4, 5]])
    doubled = {key: 2 * weight for key, weight in network.named_parameters()}
    with torch.no_grad():
        before = functional_call(network, doubled, (tokens,)).logits
    model = lc.load(network)
    with torch.no_grad():
        after = functional_call(network, doubled, (tokens,)).logits
    assert torch.equal(before, after)
    torch.export.export(network, (tokens,), strict=False)
    lc.extract(model, prompts(3, 4), "resid", progress=False)


def test_two_threads_get_right_states_or_are_refused():
    model, parts = lc.load(hf_model("gpt2")), [prompts(n, n + 2) for n in range(3, 9)]

    def read(part: lc.Prompts) -> np.ndarray:
        return lc.extract(model, part, "resid", progress=False).resid.values

    right, refused = [read(part) for part in parts], []

    def compared(number: int) -> bool:
        try:
            return np.array_equal(read(parts[number % 6]), right[number % 6])
        except lc.InputError as one_at_a_time:
            refused.append(str(one_at_a_time))
            return True

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(compared, range(90)))
    assert all("in another thread" in message for message in refused)
    assert all(compared(number) for number in range(6))


def test_a_steered_model_is_not_read_by_another_thread():
    model = lc.load(hf_model("gpt2"))
    inside, done, found = threading.Event(), threading.Event(), []

    def steered() -> None:
        move = probes.add_direction(np.ones(model.cfg.d_model))
        with probes.steer(model, move, at="resid 1", positions="all"):
            lc.extract(model, prompts(3), "resid", progress=False)  # the same thread may
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=steered)
    thread.start()
    assert inside.wait(60)
    try:
        lc.extract(model, prompts(3), "resid", progress=False)
    except lc.InputError as refused:
        found.append(str(refused))
    done.set()
    thread.join()
    assert found
    assert found[0].startswith("extract: steer is using this model in another thread")
    lc.extract(model, prompts(3), "resid", progress=False)
