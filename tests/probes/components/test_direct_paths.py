"""Scaling direct paths in a running model equals scaling label logits afterwards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lensclust.errors import InputError
from probes.components.decomposition import decompose
from probes.components.direct_paths import direct_paths
from tests.probes.components.test_components import CHOICES, TOKENS, model_of, prompts_of
from tests.tiny import ARCHITECTURES, D_VOCAB


@pytest.mark.parametrize("name", ["native", *ARCHITECTURES])
def test_running_with_weights_gives_the_weighted_sum(name: str) -> None:
    model, prompts = model_of(name), prompts_of()
    parts = decompose(model, prompts, CHOICES, progress=False)
    rng = np.random.default_rng(0)
    weights = rng.uniform(-1, 2, parts.logits.sizes["component"])
    names = parts.data["component"].values.tolist()
    expected = (parts.logits.values * weights[:, None]).sum(1)
    if cap := parts.data.attrs["soft_cap"]:
        expected = cap * np.tanh(expected / cap)
    with torch.no_grad(), direct_paths(model, dict(zip(names, weights.tolist(), strict=True))):
        found = model(prompts.tokens)
    last = found[torch.arange(len(prompts)), prompts.lengths - 1][:, TOKENS]
    np.testing.assert_allclose(last, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_weights_of_one_change_nothing_and_no_hook_is_left() -> None:
    model: Any = model_of("gpt2")
    tokens = prompts_of(3).tokens
    with torch.no_grad():
        before = model(tokens)
        with direct_paths(model, {"mlp 0": 1.0}):
            assert torch.allclose(model(tokens), before, atol=1e-6)
        with direct_paths(model, {"mlp 0": 0.0, "bias": 0.0}):
            assert not torch.allclose(model(tokens), before, atol=1e-3)
        with pytest.raises(IndexError), direct_paths(model, {"mlp 0": 0.0}):
            model(tokens + D_VOCAB)
        assert torch.equal(model(tokens), before)


def test_unknown_components_are_refused() -> None:
    with (
        pytest.raises(InputError, match=r"no component 'head 9\.0'"),
        direct_paths(model_of("gpt2"), {"head 9.0": 0.0}),
    ):
        pass
