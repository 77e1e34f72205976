"""What a network's own forwards and its owner's edits do to it, beside a bridge that is in use.

The other side of every comparison is an unwrapped copy of the network with plain torch hooks.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

import lensclust as lc
import probes
from tests.longrope import changing
from tests.tiny import D_VOCAB, hf_model

LISTS = [[5, 9, 13, 7], [8, 17, 4, 6]]
PROMPTS = lc.Prompts.from_token_lists(LISTS, pd.DataFrame({"task": list("ab")}), answers=[[3], [6]])


def states(network: Any, layer: int, ids: list[int]) -> np.ndarray:
    """What stands before a block of an unwrapped network at the last token, or behind the last."""
    stacks = [each for each in network.modules() if isinstance(each, nn.ModuleList)]
    blocks, seen = max(stacks, key=len), []

    def keep(*given: Any) -> None:
        first = given[-1][0] if isinstance(given[-1], tuple) else given[-1]
        seen.append(first[0, -1].numpy())

    behind = layer == len(blocks)
    block = blocks[layer - behind]
    place = block.register_forward_hook(keep) if behind else block.register_forward_pre_hook(keep)
    with torch.no_grad():
        network(torch.tensor([ids]), use_cache=False)
    place.remove()
    return seen[0]


def off(model: Any, network: Any, layer: int = 1) -> float:
    """Largest relative error of extracted states against those of an unwrapped network."""
    acts = lc.extract(model, PROMPTS, f"resid {layer}", progress=False)
    errors = []
    for row, ids in enumerate(LISTS):
        right = states(network, layer, ids)
        found = acts.resid.values[row, 0, 0]
        errors.append(np.linalg.norm(found - right) / np.linalg.norm(right))
    return float(max(errors))


def rwkv(blocks: int, every: int) -> Any:
    torch.manual_seed(0)
    config = transformers.RwkvConfig(
        vocab_size=D_VOCAB, hidden_size=16, num_hidden_layers=blocks, rescale_every=every
    )
    return transformers.RwkvForCausalLM(config).eval()


class HalvedOnce(LlamaMLP):
    """Halves its weights in its first forward, and notes that it did."""

    halved = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.halved:
            self.up_proj.weight.data.div_(2)
            self.halved = True
        return super().forward(x)


class HalvedByOut(HalvedOnce):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.halved:
            self.halved = True
            with torch.no_grad():
                torch.div(self.gate_proj.weight, 2, out=self.gate_proj.weight)
        return LlamaMLP.forward(self, x)


class HalvedInLists(HalvedOnce):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.halved:
            self.halved = True
            with torch.no_grad():
                torch.ops.aten._foreach_mul_([self.up_proj.weight, self.down_proj.weight], 0.5)
        return LlamaMLP.forward(self, x)


class HalvedAsData(HalvedOnce):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.halved:
            self.halved = True
            self.down_proj.weight.data = self.down_proj.weight.data / 2
        return LlamaMLP.forward(self, x)


class HalvedBuffer(HalvedOnce):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("gain", torch.full((1,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.halved:
            self.halved = True
            self.get_buffer("gain").mul_(0.5)
        gain: Any = self.gain
        return LlamaMLP.forward(self, x) * gain


def halved_once(kind: type[HalvedOnce] = HalvedOnce) -> Any:
    network: Any = hf_model("llama")
    for layer in network.model.layers:
        mlp = kind(network.config)
        mlp.load_state_dict(layer.mlp.state_dict(), strict=False)
        layer.mlp = mlp
    return network.eval()


@pytest.mark.parametrize(
    "make",
    [
        lambda: rwkv(5, 2),
        lambda: rwkv(7, 6),
        halved_once,
        lambda: halved_once(HalvedByOut),
        lambda: halved_once(HalvedInLists),
        lambda: halved_once(HalvedAsData),
        lambda: halved_once(HalvedBuffer),
    ],
    ids=["2", "6", "own", "out", "lists", "data", "buffer"],
)
def test_weights_that_a_forward_writes_are_not_written_twice(make: Callable[[], Any]):
    network, plain = make(), make()
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    last = network.config.num_hidden_layers - 1
    model = lc.load(network)
    assert off(model, copy.deepcopy(plain), last) < 1e-5
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, before[name]), name
    with torch.no_grad():
        tokens = torch.tensor([LISTS[0]])
        torch.testing.assert_close(network(tokens).logits, plain(tokens).logits)
    with pytest.raises(lc.InputError, match="load"):
        lc.extract(model, PROMPTS, "resid", progress=False)
    again = lc.load(network)
    assert off(again, plain, last) < 1e-5
    network.train()
    with torch.no_grad():
        network(tokens)
    network.eval()
    assert off(lc.load(network), plain, last) < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(lc.release(network)(tokens).logits, plain(tokens).logits)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("run", ["forward", "generate", "step"])
def test_a_long_text_through_the_network_leaves_short_prompts_alone(name: str, run: str):
    network: Any = changing(name, 24, kind="dynamic")
    plain = copy.deepcopy(network)
    model = lc.load(network)
    assert off(model, plain) < 1e-5
    long = torch.arange(60)[None] % 50 + 5
    if run == "forward":
        with torch.no_grad():
            network(long, use_cache=False)
    elif run == "generate":
        network.generate(long[:, :10], max_new_tokens=40, do_sample=False, pad_token_id=0)
    else:
        network.train()
        network(long, labels=long, use_cache=False).loss.backward()
        network.zero_grad()
        network.eval()
    assert off(model, plain) < 1e-5
    network.to(torch.float64)
    assert off(model, plain.to(torch.float64)) < 1e-5


@dataclass
class Options:
    scale: float


def times(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda made, also=1.0: made * factor * also


class Scaled(LlamaMLP):
    """Multiplies by numbers that lie in containers, tensors and functions among its attributes."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.scales: list[Any] = [[1.0]]
        self.table = {"scale": 1.0}
        self.tensor = torch.ones(1)
        self.array = np.ones(2)
        self.squash: Any = torch.tanh
        self.options = Options(1.0)
        self.times: Any = times(1.0)
        self._hidden = np.float32(1.0)
        self.first: float | None = None
        self.seen = 0
        self.last: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        self.last = x.detach()
        if self.first is None:
            self.first = 0.5**0.5
        made = super().forward(x) * self.scales[0][0] * self.table["scale"] * self.tensor
        made = self.times(made) * self.options.scale * float(self._hidden) * self.first
        return self.squash(made * float(self.array[1]))


def scaled() -> Any:
    torch.manual_seed(0)
    network: Any = hf_model("llama")
    for layer in network.model.layers:
        mlp = Scaled(network.config)
        mlp.load_state_dict(layer.mlp.state_dict())
        layer.mlp = mlp
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return network.eval()


def _array(mlp: Any) -> None:
    mlp.array[1] = 3.0


EDITS: dict[str, Callable[[Any], Any]] = {
    "list": lambda mlp: mlp.scales[0].__setitem__(0, 3.0),
    "dict": lambda mlp: mlp.table.update(scale=3.0),
    "tensor": lambda mlp: setattr(mlp, "tensor", torch.tensor([3.0])),
    "tensor in place": lambda mlp: mlp.tensor.fill_(3.0),
    "array": _array,
    "function": lambda mlp: setattr(mlp, "squash", torch.sin),
    "closure": lambda mlp: setattr(mlp, "times", times(3.0)),
    "default": lambda mlp: setattr(mlp.times, "__defaults__", (3.0,)),
    "object": lambda mlp: setattr(mlp.options, "scale", 3.0),
    "private": lambda mlp: setattr(mlp, "_hidden", np.float32(3.0)),
    "set by the first forward": lambda mlp: setattr(mlp, "first", 3.0),
    "lambda": lambda mlp: setattr(mlp, "squash", lambda made: made * 3.0),
}


@pytest.mark.parametrize("edit", EDITS)
def test_constants_of_any_kind_are_watched(edit: str, tmp_path: Path):
    network = scaled()
    model = lc.load(network)
    assert off(model, copy.deepcopy(network)) < 1e-5
    lc.extract(model, PROMPTS, "resid 1", store=tmp_path / "s", progress=False)
    EDITS[edit](network.model.layers[0].mlp)
    with pytest.raises(lc.InputError, match="other settings than when it was loaded"):
        lc.extract(model, PROMPTS, "resid 1", progress=False)
    again = lc.load(network)
    assert off(again, copy.deepcopy(network)) < 1e-5
    with pytest.raises(lc.InputError, match="holds settings"):
        lc.extract(again, PROMPTS, "resid 1", store=tmp_path / "s", resume=True, progress=False)


def test_what_forwards_write_is_no_setting(tmp_path: Path):
    network = scaled()
    model = lc.load(network)
    lc.extract(model, PROMPTS, "resid 1", store=tmp_path / "s", progress=False)
    with torch.no_grad():
        network(torch.tensor([LISTS[0]]))  # counts, and keeps what it saw
    lc.extract(model, PROMPTS, "resid 1", store=tmp_path / "s", resume=True, progress=False)
    assert lc.load(network) is model


@pytest.mark.parametrize(
    ("name", "method"), [("gptneo", "_attn"), ("gptj", "_attn"), ("gpt2", "_split_heads")]
)
def test_a_method_that_was_replaced_is_refused(name: str, method: str):
    small: dict[str, Any] = {"vocab_size": D_VOCAB, "hidden_size": 32}
    torch.manual_seed(0)
    if name == "gptneo":
        config: Any = transformers.GPTNeoConfig(
            **small, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
        )
    elif name == "gptj":
        config = transformers.GPTJConfig(
            vocab_size=D_VOCAB, n_embd=32, n_layer=2, n_head=4, rotary_dim=4
        )
    else:
        config = transformers.GPT2Config(vocab_size=D_VOCAB, n_embd=32, n_layer=2, n_head=4)
    network: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    attention = network.transformer.h[0].attn
    attention = getattr(attention, "attention", attention)
    if not hasattr(attention, method):
        pytest.skip(f"{name} has no {method} in this version of transformers")
    model = lc.load(network)
    before = getattr(attention, method)
    setattr(attention, method, lambda first, *more, **named: before(3 * first, *more, **named))
    with pytest.raises(lc.InputError, match=f"replaced {method} on transformer.h.0.attn"):
        lc.extract(model, PROMPTS, "resid", progress=False)


def test_a_hook_on_all_modules_is_refused():
    network = hf_model("llama")
    model = lc.load(network)
    double = nn.modules.module.register_module_forward_hook(
        lambda module, given, out: 2 * out if isinstance(module, LlamaMLP) else None
    )
    try:
        with pytest.raises(lc.InputError, match="global forward hook"):
            lc.extract(model, PROMPTS, "resid", progress=False)
    finally:
        double.remove()
    assert off(model, copy.deepcopy(network)) < 1e-5


def test_a_weight_that_was_none_is_refused_each_time():
    network: Any = hf_model("llama")
    model = lc.load(network)
    up = network.model.layers[0].mlp.up_proj
    up.bias = nn.Parameter(torch.ones(up.out_features))
    for _ in range(2):
        with pytest.raises(lc.InputError, match=r"'bias' of shape .* was none"):
            lc.extract(model, PROMPTS, "resid", progress=False)
    assert off(lc.load(network), copy.deepcopy(network)) < 1e-5


class Adapted(nn.Module):
    """A linear map and a low-rank one beside it, in the place of the first."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def test_a_module_of_ones_own_at_the_output_projection_keeps_all_but_heads():
    network: Any = hf_model("llama")
    attention = network.model.layers[1].self_attn
    attention.o_proj = Adapted(attention.o_proj)
    model = lc.load(network.eval())
    assert off(model, copy.deepcopy(network), 2) < 1e-5
    lc.extract(model, PROMPTS, ["z", "attn_out"], progress=False)
    probes.patch(model, PROMPTS.take([0]), PROMPTS.take([1]), "z", progress=False)
    with pytest.raises(lc.InputError, match="not a linear map with readable weight"):
        lc.extract(model, PROMPTS, "head", progress=False)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_number_type_changes_nothing(kind: torch.dtype):
    spans = {"relevant": [(1, 2)] * 2, "irrelevant": [(2, 3)] * 2}
    rows = pd.DataFrame({"task": list("ab")})
    prompts = lc.Prompts.from_token_lists(LISTS, rows, answers=[[3], [6]], spans=spans)
    network = hf_model("gpt2")

    def numbers() -> list[np.ndarray]:
        model = lc.load(copy.deepcopy(network))
        acts = lc.extract(model, prompts, ["resid", "head"], progress=False)
        ratio = probes.attention_ratio(model, prompts, block=None, draws=2, progress=False)
        parts = probes.decompose(model, prompts, {"a": 3, "b": 6}, label="task", progress=False)
        engaged = probes.head_activation(model, prompts, progress=False)
        moved = probes.patch(model, prompts.take([0]), prompts.take([1]), "resid", progress=False)
        frames = [parts.frame, engaged.frame, moved.frame]
        found = [each.select_dtypes("number").to_numpy(float) for each in frames]
        return [acts.resid.values, acts["head"].values, ratio.values.relevant.values, *found]

    right, before = numbers(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(kind)
        found = numbers()
    finally:
        torch.set_default_dtype(before)
    for one, other in zip(found, right, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_store_goes_on_when_the_folder_of_the_model_was_moved(tmp_path: Path):
    network = hf_model("llama")
    for name in ("one", "other"):
        network.save_pretrained(tmp_path / name)
    for name, resume in (("one", False), ("other", True)):
        model = lc.load(tmp_path / name, progress=False)
        lc.extract(model, PROMPTS, "resid", store=tmp_path / "s", resume=resume, progress=False)


def test_attributes_that_nobody_can_digest_do_no_harm():
    network: Any = hf_model("llama")
    mlp = network.model.layers[0].mlp
    mlp.mask = torch.eye(3).to_sparse()
    mlp.turned = torch.ones(2, dtype=torch.cfloat).conj()
    mlp.itself = [mlp]
    mlp.itself.append(mlp.itself)
    names = [*network.state_dict()]
    model = lc.load(network)
    assert [*network.state_dict()] == names
    assert off(model, copy.deepcopy(network)) < 1e-5


class Dropped(LlamaMLP):
    """Draws from Python's and numpy's generators in training mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and random.random() + np.random.rand() < 0:  # noqa: NPY002
            return x
        return super().forward(x)


def test_random_states_are_left_alone():
    network: Any = hf_model("llama")
    for layer in network.model.layers:
        mlp = Dropped(network.config)
        mlp.load_state_dict(layer.mlp.state_dict())
        layer.mlp = mlp
    lc.load(hf_model("gpt2"))
    # Python's generator too, but beartype, which runs in tests, draws from that.
    before = np.random.get_state(legacy=False), torch.get_rng_state()  # noqa: NPY002
    lc.load(network.eval())
    after = np.random.get_state(legacy=False), torch.get_rng_state()  # noqa: NPY002
    assert str(before[0]) == str(after[0])
    assert torch.equal(before[1], after[1])


def test_a_class_whose_forward_was_replaced_is_refused(monkeypatch: pytest.MonkeyPatch):
    network: Any = hf_model("llama")
    model, attention = lc.load(network), type(network.model.layers[0].self_attn)
    before = attention.forward

    def tripled(self: Any, *given: Any, **named: Any) -> Any:
        made, *more = before(self, *given, **named)
        return (3 * made, *more)

    monkeypatch.setattr(attention, "forward", tripled)
    with pytest.raises(lc.InputError, match="other settings"):
        lc.extract(model, PROMPTS, "resid", progress=False)
