"""What checks found out with weights at which nothing can go wrong is found out again later.

Each network is first read with weights of 0, as initialisations have them, then given those with
which its peculiarity shows. The other side is a plain copy of it, with torch hooks.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from torch import nn

import lensclust as lc
from lensclust.models.agreement import forget_outdated, remembered
from lensclust.models.wrapping import own_network
from probes.steering.interventions import Intervention
from probes.steering.steering import steer
from tests.lensclust.inference.attentions import SIZES, attention_model
from tests.tiny import hf_model

TOKENS = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(1))
SHOTS = torch.randint(4, 60, (70,), generator=torch.Generator().manual_seed(2)).tolist()
PROMPTS = lc.Prompts.from_token_lists(
    [[*SHOTS, *range(5, 5 + n), n] for n in range(1, 25)], pd.DataFrame({"task": ["a"] * 24})
)


OUTPUTS = r"(o_proj|down_proj|out_proj|dense\w*|c_proj)\.(weight|bias)$"
ATTENTION = r"(attn|attention)\."


def zeroed(network: Any, pattern: str) -> dict[str, torch.Tensor]:
    """Set some weights to 0; returns all as they were."""
    before = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if re.search(pattern, name):
                weight.zero_()
    return before


def last_states(network: Any) -> np.ndarray:
    """What goes out of the last block at each prompt's last token."""
    network, found = copy.deepcopy(network), []
    blocks = next(
        module
        for module in network.modules()
        if isinstance(module, nn.ModuleList) and len(module) == network.config.num_hidden_layers
    )

    def keep(_block: Any, _given: Any, out: Any) -> None:
        found.append((out[0] if isinstance(out, tuple) else out)[0, -1].detach())

    blocks[-1].register_forward_hook(keep)
    for row in range(len(PROMPTS)):
        with torch.no_grad():
            network(PROMPTS.tokens[row : row + 1, : int(PROMPTS.lengths[row])])
    return torch.stack(found).numpy()


@pytest.mark.parametrize("name", ["mpt", "gpt-neo", "llama4"])
def test_whether_prefixes_can_be_shared(name: str) -> None:
    model: Any = attention_model(name)
    network: Any = own_network(model)
    weights = zeroed(network, ATTENTION)
    lc.extract(model, PROMPTS, "resid 2", progress=False)
    network.load_state_dict(weights)
    found = lc.extract(model, PROMPTS, "resid 2", progress=False)
    expected = last_states(network)
    np.testing.assert_allclose(found.resid.values[:, 0, 0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["Glm4", "Exaone4"])
def test_whether_heads_add_up(kind: str) -> None:
    """They go through a norm first."""
    config = getattr(transformers, f"{kind}Config")(
        **SIZES, num_key_value_heads=2, head_dim=8, attn_implementation="eager"
    )
    network: Any = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    weights = zeroed(network, OUTPUTS)
    model = lc.load(network)
    lc.extract(model, PROMPTS, "head", progress=False)
    network.load_state_dict(weights)
    with pytest.raises(lc.InputError, match="do not add up"):
        lc.extract(model, PROMPTS, "head", progress=False)


def test_whether_a_bridge_computes_what_its_network_does() -> None:
    """Falcon's own fused attention scales biases otherwise than the bridge."""
    config = transformers.FalconConfig(**SIZES, alibi=True)
    network: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    zeroed(network, OUTPUTS)
    model = lc.load(network.eval())
    lc.extract(model, PROMPTS, "resid", progress=False)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) / 5)
    with pytest.raises(lc.InputError, match=r"^extract: .* other logits"):
        lc.extract(model, PROMPTS, "resid", progress=False)


@pytest.mark.parametrize("name", ["qwen2", "neox"])
def test_whether_an_edit_takes_effect(name: str) -> None:
    network: Any = hf_model(name)
    weights = copy.deepcopy(network.state_dict())
    head = network.get_output_embeddings().weight
    with torch.no_grad():
        head.zero_()
    model: Any = lc.load(network)
    double = Intervention("twice", lambda site: lambda states: 2 * states)
    with steer(model, double, at="resid 2", positions="all"):
        assert not model(TOKENS).any()
    network.load_state_dict(weights)
    plain = copy.deepcopy(network)
    blocks = next(m for m in plain.modules() if isinstance(m, nn.ModuleList))
    blocks[2].register_forward_pre_hook(lambda _, given: (2 * given[0], *given[1:]))
    with torch.no_grad(), steer(model, double, at="resid 2", positions="all"):
        torch.testing.assert_close(model(TOKENS), plain(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_training_finds_verdicts_again_at_few_steps() -> None:
    network: Any = hf_model("opt")
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
    model = lc.load(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4)
    found = []
    for step in range(60):
        forget_outdated(model)
        found.append(remembered(model, "name", lambda step=step: step))
        network(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # Biases are 0 at first.
    assert found[:2] == [0, 1]
    assert len(set(found)) < 6
