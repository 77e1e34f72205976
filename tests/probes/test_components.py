"""Components add up to the model's own label logits, and each is what it is said to be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import lensclust as lc
from probes.components import decompose
from tests.tiny import ARCHITECTURES, D_VOCAB, hf_model

CHOICES = {"a": 5, "b": 9, "c": 31}
NATIVE = "native:sif-small"


def model_of(name: str) -> Any:
    return lc.load(NATIVE if name == "native" else hf_model(name))


def prompts_of(n: int = 12, seed: int = 0, shared: int = 0) -> lc.Prompts:
    rng = np.random.default_rng(seed)
    prefix = rng.integers(3, D_VOCAB, shared).tolist()
    ids = [[*prefix, *rng.integers(3, D_VOCAB, rng.integers(2, 9)).tolist()] for _ in range(n)]
    return lc.Prompts.from_token_lists(ids, pd.DataFrame({"label": [*"abc"] * (n // 3)}))


@pytest.mark.parametrize("name", ["native", *ARCHITECTURES])
def test_parts_add_up_to_the_models_own_logits(name: str) -> None:
    model, prompts = model_of(name), prompts_of()
    found = decompose(model, prompts, CHOICES, progress=False)
    with torch.no_grad():
        for row, length in enumerate(prompts.lengths.tolist()):
            own = model(prompts.tokens[row : row + 1, :length])[0, -1, list(CHOICES.values())]
            np.testing.assert_allclose(found.model_logits[row], own, rtol=1e-4, atol=1e-5)
    assert found.error < 1e-4
