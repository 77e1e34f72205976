"""What is checked and noted of a model does not depend on where its frequencies change."""

from __future__ import annotations

import pytest
import torch

import lensclust as lc
from lensclust.causality import require_causal
from tests.longrope import NAMES, changing


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("step", [2, 5, 12, 13, 14, 32, 33])
def test_a_change_of_frequencies_is_not_sight_of_later_tokens(name: str, step: int):
    require_causal(lc.load(changing(name, step)))


def test_what_sees_later_tokens_is_refused_on_either_side():
    for step in (2, 5, 20):
        network = changing("qwen2", step)
        for layer in network.model.layers:
            layer.self_attn.is_causal = False
        network.model.config.is_causal = False
        network.register_forward_pre_hook(_all_seen, with_kwargs=True)
        with pytest.raises(lc.InputError, match="depend on later tokens"):
            lc.load(network)


def _all_seen(network, args, given):
    length = (args[0] if args else given["input_ids"]).shape[1]
    return args, given | {"attention_mask": torch.zeros(1, 1, length, length)}
