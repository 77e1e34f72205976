"""How many prompts go through a model at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_protocol import TransformerLensModel

BATCH_TOKENS = {"cpu": 2_048}
ACCELERATOR_TOKENS = 16_384


def default_budget(model: TransformerLensModel) -> int:
    """Tokens of one forward, padding included, unless the caller says otherwise."""
    return BATCH_TOKENS.get(model_device(model).type, ACCELERATOR_TOKENS)


def batches(lengths: Int[Tensor, " row"], budget: int) -> Iterator[Int[Tensor, " row"]]:
    """Row indices by falling length, cut so that rows x longest stays within the budget.

    Longest first: what does not fit in memory fails at once, not after an hour.

    >>> [rows.tolist() for rows in batches(torch.tensor([2, 5, 3]), budget=6)]
    [[1], [2, 0]]
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        stop = start + max(1, budget // longest)
        yield order[start:stop]
        start = stop


def model_device(model: TransformerLensModel) -> torch.device:
    """Where a model takes its tokens."""
    return torch.device(model.cfg.device or "cpu")


def without_cache(model: TransformerLensModel) -> dict[str, Any]:
    """Hugging Face models build a key/value cache unless told not to; native ones have none."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    return {"use_cache": False} if hasattr(config, "use_cache") else {}
