"""Estimated cost of forwards, from a model's size and device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.models import model_device

# Fixed cost of a block, in operations of equal duration: fitted on CPUs (widths 64 to 768).
# Elsewhere about the operations of a GPU while a block's kernels are launched.
BLOCK_OPERATIONS = {"cpu": 3.6e7}
ACCELERATOR_OPERATIONS = 3e10
# Fewer tokens take as long as this many on a CPU, since all weights are read.
READING_TOKENS = {"cpu": 25.0}
# Operations of the same duration as one score of one head, from its product to its softmax.
SCORE_OPERATIONS = 200
# Memory for keys and values that are kept at once.
CACHE_BYTES = 2**30


@dataclass(frozen=True)
class Cost:
    """Cost of forwards, in units of one token run through the model.

    Attributes:
        forward: fixed cost of a forward.
        key: cost of one key that one token attends to.

    >>> Cost(forward=20.0, key=0.01)(sequences=2, tokens=5, keys=100)
    40.0
    """

    forward: float
    key: float

    def __call__(self, *, sequences: int, tokens: int, keys: int) -> float:
        return self.forward + sequences * tokens * (1 + self.key * keys)


def forward_cost(model: TransformerLensModel) -> Cost:
    """The cost estimate for a model.

    >>> import lensclust as lc
    >>> from lensclust.models import native_config
    >>> small = forward_cost(lc.load("native:sif-small", device="cpu"))
    >>> large = native_config("sif-small", d_model=768, n_heads=12, n_layers=1)
    >>> small.forward > 10 * forward_cost(lc.load(large, device="cpu")).forward
    True
    """
    cfg, device = model.cfg, model_device(model).type
    # A block has about 12 d² weights, each used for one product and one sum.
    block = 24 * cfg.d_model**2
    overhead = BLOCK_OPERATIONS.get(device, ACCELERATOR_OPERATIONS) / block
    return Cost(
        forward=overhead + READING_TOKENS.get(device, 0.0),
        key=SCORE_OPERATIONS * cfg.n_heads / block,
    )


def most_cached(model: TransformerLensModel) -> int:
    """Number of tokens whose keys and values fit into the allowed memory."""
    cfg: Any = model.cfg
    heads = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    number = torch.finfo(cfg.dtype).bits // 8
    return CACHE_BYTES // (2 * cfg.n_layers * heads * cfg.d_head * number)
