"""What is checked and noted of a model does not depend on where its frequencies change."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import lensclust as lc
from lensclust.models.causality import require_causal
from lensclust.models.network_settings import settings_digest
from tests.longrope import NAMES, changing


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("step", [2, 5, 12, 13, 14, 32, 33])
def test_a_change_of_frequencies_is_not_sight_of_later_tokens(name: str, step: int):
    require_causal(lc.load(changing(name, step)))


def test_what_sees_later_tokens_is_refused_on_either_side():
    for step in (2, 5, 20):
        network: Any = changing("qwen2", step)
        for layer in network.model.layers:
            layer.self_attn.is_causal = False
        network.model.config.is_causal = False
        network.register_forward_pre_hook(_all_seen, with_kwargs=True)
        with pytest.raises(lc.InputError, match="depend on later tokens"):
            lc.load(network)


def _all_seen(network, args, given):
    length = (args[0] if args else given["input_ids"]).shape[1]
    return args, given | {"attention_mask": torch.zeros(1, 1, length, length)}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("phi3", "longrope"), ("gemma3", "longrope"), ("llama", "dynamic"), ("gemma3", "dynamic")],
)
def test_a_store_is_appended_to_whatever_ran_before(name: str, kind: str, tmp_path: Path):
    network: Any = changing(name, 24, kind=kind)
    plain: Any = copy.deepcopy(network)
    model = lc.load(network)
    rows = torch.arange(4 * 12).reshape(4, 12).remainder(50).add(5).tolist()
    prompts = lc.Prompts.from_token_lists(rows, pd.DataFrame({"task": list("abab")}))
    lc.extract(model, prompts.take([0, 1]), "resid", store=tmp_path / "s", progress=False)
    seen = settings_digest(model)
    for length in (40, 9, 50):
        tokens = torch.arange(length)[None] + 5
        model(tokens)
        network(tokens)
        assert settings_digest(model) == seen
    found = lc.extract(
        model, prompts.take([2, 3]), "resid", store=tmp_path / "s", append=True, progress=False
    )
    for row, ids in enumerate(rows):
        with torch.no_grad():
            states = plain(torch.tensor([ids]), output_hidden_states=True).hidden_states
        # The last of these is behind the final norm.
        for layer, expected in enumerate(states[:-1]):
            assert np.allclose(found.resid.values[row, ..., layer, :], expected[0, -1], atol=1e-5)


def test_other_frequencies_are_another_setting():
    digests = {settings_digest(lc.load(changing("qwen2", step))) for step in (20, 24)}
    network: Any = changing("qwen2", 24)
    network.get_decoder().rotary_emb.original_inv_freq.mul_(2)
    digests.add(settings_digest(lc.load(network)))
    usual: Any = changing("qwen2", 24, kind="dynamic")
    digests.add(settings_digest(lc.load(usual)))
    usual.get_decoder().rotary_emb.rope_type = "default"
    for _ in range(2):
        usual.get_decoder().rotary_emb.inv_freq.mul_(2)
        digests.add(settings_digest(usual))
    assert len(digests) == 6
