"""Gradient functions give the numbers of a plain call wherever gradients are switched off."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

import lensclust as lc
import probes
from tests.tiny import hf_model

ROWS = {"task": list("abab"), "input": list("xxyy"), "label": list("abab")}
SPANS = {"relevant": (1, 2), "irrelevant": (2, 3), "label_words": (1, 2)}


def some(first: int = 5) -> lc.Prompts:
    ids = [[1, first + i, 7 + i, 9] for i in range(4)]
    spans = {name: [span] * 4 for name, span in SPANS.items()}
    return lc.Prompts.from_token_lists(
        ids, ROWS, answers=[[20 + i % 2] for i in range(4)], spans=spans
    )


QUIET: dict[str, Any] = {"progress": False}
CALLS = {
    "head_activation": lambda m: probes.head_activation(m, some(), **QUIET).signed.values,
    "rank": lambda m: probes.rank(
        m, some(), some(6), "head", m=1, metric="probability", **QUIET
    ).frame["attributed"],
    "attention_ratio": lambda m: (
        probes.attention_ratio(
            m, some(), draws=2, block=None, weighting="gradient", **QUIET
        ).values.relevant.values
    ),
    "label_word_flow": lambda m: (
        probes.label_word_flow(m, some(), draws=1, **QUIET).values.wp.values
    ),
    "finetune": lambda m: lc.finetune(m, some(), steps=3, **QUIET).losses,
    "train": lambda m: lc.train("sif-small", some(), steps=2, **QUIET).frame["loss"],
}


@pytest.mark.parametrize("family", ["llama", "neox"])
@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_there_wherever_the_caller_has_none(name, family):
    expected = CALLS[name](lc.load(hf_model(family)))
    assert np.isfinite(expected).all()
    for off in (torch.no_grad, torch.inference_mode, nullcontext):
        network = hf_model(family).requires_grad_(off is not nullcontext)
        with off():
            found = CALLS[name](lc.load(network))
        np.testing.assert_array_equal(found, expected)
        asked = {weight.requires_grad for weight in network.parameters()}
        assert asked == {off is not nullcontext}
