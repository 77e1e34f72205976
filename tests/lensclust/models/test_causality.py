"""Which models `load` takes: those whose states do not depend on what follows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

import lensclust as lc
from lensclust.models.native import native_config
from tests.tiny import ARCHITECTURES, hf_model

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
# Whether there are later tokens that a state sees.
NETWORKS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "bert": ("BertForMaskedLM", _SIZES, True),
    "roberta": ("RobertaForMaskedLM", _SIZES, True),
    "bert as a decoder that is none": ("BertLMHeadModel", _SIZES, True),
    "bert as a decoder": ("BertLMHeadModel", {**_SIZES, "is_decoder": True}, False),
    "modernbert as a decoder": (
        "ModernBertDecoderForCausalLM",
        {**_SIZES, "pad_token_id": 0},
        False,
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        True,
    ),
}


def network_of(name: str) -> PreTrainedModel:
    kind, fields, _ = NETWORKS[name]
    model = getattr(transformers, kind)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return model(model.config_class(**fields)).eval()


def refusal(source: Any) -> str:
    with pytest.raises(lc.InputError) as caught:
        lc.load(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_an_encoder_whose_attention_adds_nothing_yet_is_refused(name: str) -> None:
    """As many are initialised: the states show nothing before they were trained."""
    network = network_of(name)
    for module in network.modules():
        if type(module).__name__.endswith("SelfOutput"):
            nn.init.zeros_(module.get_submodule("dense").weight)  # type: ignore[arg-type]
    assert "is not causal" in refusal(network)


@pytest.mark.parametrize("name", NETWORKS)
def test_encoders_are_refused_and_decoders_are_not(name: str) -> None:
    network, sees = network_of(name), NETWORKS[name][2]
    if not sees:
        lc.load(network)
        return
    message = refusal(network)
    # T5 is no transformers decoder, and TransformerLens may know no such class at all.
    assert any(word in message for word in ("causal", "encoder", "architecture", "Unsupported"))


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_encoders_are_refused_in_half_precision_too(name: str) -> None:
    network: Any = network_of(name)
    assert "not causal" in refusal(network.to(torch.bfloat16))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_configuration_that_turns_causality_off_is_named(name: str) -> None:
    network = hf_model(name)
    network.config.is_causal = False
    assert "is not causal" in (message := refusal(network))
    assert "its config.is_causal is False" in message


def test_bidirectional_native_models_are_refused() -> None:
    config = native_config("sif-small", attention_dir="bidirectional")
    assert "not causal" in refusal(config)
    assert "blocks.0" in refusal(
        native_config("sif-small", n_layers=1, attention_dir="bidirectional")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_decoders_are_taken_in_every_precision(name: str, dtype: torch.dtype) -> None:
    network: Any = hf_model(name)
    state = torch.get_rng_state()
    lc.load(network.to(dtype))
    assert torch.equal(torch.get_rng_state(), state)


class Leak(nn.Module):
    """An MLP that adds a little of the last token to every earlier one, in long sequences."""

    def __init__(self, inner: nn.Module, longest: int) -> None:
        super().__init__()
        self.inner, self.longest = inner, longest

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        seen = states[:, -1:] if states.shape[1] > self.longest else 0 * states[:, -1:]
        return self.inner(states + 0.01 * seen)


@pytest.mark.parametrize("longest", [0, 8, 20])
def test_a_leak_in_one_layer_is_found_where_it_begins_at_some_length(longest: int) -> None:
    network: Any = hf_model("llama")
    network.model.layers[1].post_attention_layernorm = Leak(
        network.model.layers[1].post_attention_layernorm, longest
    )
    message = refusal(network)
    assert "blocks.1" in message


class Crowded(nn.Module):
    """Experts with room for so many tokens of a batch: the others are passed by."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        out = self.inner(states)
        flat = out.flatten(0, 1).clone()
        flat[10:] = 0
        return flat.view_as(out)


def test_states_that_depend_on_the_batch_are_refused() -> None:
    network: Any = hf_model("llama")
    network.model.layers[0].input_layernorm = Crowded(network.model.layers[0].input_layernorm)
    assert "not causal" in refusal(network)
