"""A bridge must compute what its network computes."""

from __future__ import annotations

import logging
import re
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

import lensclust as lc
from lensclust.models import huggingface as pretrained
from tests.families.registry import FAMILIES, build
from tests.tiny import ARCHITECTURES, hf_model

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sound_networks_load_without_a_word(name, caplog):
    with caplog.at_level(logging.WARNING):
        lc.load(hf_model(name))
    assert not caplog.records


def test_a_part_that_computes_something_else_once_wrapped_is_refused(monkeypatch):
    build = pretrained.build_bridge_from_module

    def larger(_module: Any, _given: Any, out: Any) -> Any:
        return out * 1.01

    def mistaken(*args, **options):
        bridge = build(*args, **options)
        part = bridge.blocks[1].mlp
        assert isinstance(part, GeneralizedComponent)
        part.register_forward_hook(larger)
        return bridge

    monkeypatch.setattr(pretrained, "build_bridge_from_module", mistaken)
    with pytest.raises(lc.InputError, match="other logits once TransformerLens has wrapped it"):
        lc.load(hf_model("llama"))


def test_code_that_cannot_be_made_eager_is_refused():
    # Falcon's attention keeps the code it was built with, and its biases are scaled differently.
    config = transformers.FalconConfig(**SIZES, alibi=True)
    lc.load(perturbed(config, "eager"))
    with pytest.raises(lc.InputError, match="attn_implementation='eager'"):
        lc.load(perturbed(config, "sdpa"))


HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", list(FAMILIES)[0::4])
def test_rounding_in_half_precision_is_no_other_network(name, dtype):
    lc.load(build(FAMILIES[name], seed=1).to(dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_a_difference_beyond_rounding_is_refused_in_half_precision(dtype):
    # Both are below the tenth that rounding may make in bfloat16 at most.
    gpt2 = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, scale_attn_weights=False
    )
    falcon = transformers.FalconConfig(**SIZES, alibi=True)
    for config, attention, size in ((gpt2, "eager", 0.04), (falcon, "sdpa", 0.04)):
        network = perturbed(config, attention, size).to(dtype)
        with pytest.raises(lc.InputError, match=r"rounding explains 0\.0") as caught:
            lc.load(network)
        found = re.search(r"relative difference ([\d.]+), ", str(caught.value))
        assert found is not None
        assert float(found[1]) < 0.1, attention


def perturbed(config, attention: str, size: float = 0.2):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=attention
        )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * size)
    return network.eval()


def test_a_network_that_was_trained_is_loaded_again():
    network = hf_model("gpt2")
    first = lc.load(network)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.1)
    assert lc.load(network) is first


STACKS = {"gpt2": "transformer.h", "neox": "gpt_neox.layers", "opt": "model.decoder.layers"}


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "opt", "gemma2"])
@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_blocks_that_the_configuration_does_not_count_are_refused(name, blocks):
    network = hf_model(name)
    home, _, stack = STACKS.get(name, "model.layers").rpartition(".")
    parent = network.get_submodule(home)
    own = [*network.get_submodule(f"{home}.{stack}").children()]
    setattr(parent, stack, torch.nn.ModuleList((own + own)[:blocks]))
    for _ in range(2):
        with pytest.raises(lc.InputError, match=f"has {blocks} blocks, its configuration says 3"):
            lc.load(network)
    if blocks > len(own):
        return
    network.config.num_hidden_layers = blocks
    prompts = lc.Prompts.from_token_lists([[5, 6, 7]], {"task": ["a"]})
    acts = lc.extract(lc.load(network), prompts, "resid", progress=False)
    assert acts.layer.values.tolist() == [*range(blocks + 1)]
    seen = []
    own[blocks - 1].register_forward_hook(lambda module, given, out: seen.append(out))
    network(torch.tensor([[5, 6, 7]]))
    last = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    np.testing.assert_allclose(
        acts.resid.sel(layer=blocks, position="answer").values[0],
        last.detach()[0, -1],
        rtol=1e-4,
        atol=1e-5,
    )
