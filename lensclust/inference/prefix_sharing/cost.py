"""What forwards cost, estimated from a model's size and where it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.models import model_device

# A block's own cost, in operations that would take as long: fitted on CPUs (widths 64 to 768).
# Elsewhere about what a GPU could do while a block's kernels are launched.
BLOCK_OPERATIONS = {"cpu": 3.6e7}
ACCELERATOR_OPERATIONS = 3e10
# On a CPU a few tokens take as long as these: all weights have to be read.
READING_TOKENS = {"cpu": 25.0}
# Operations that would take as long as one score of one head, from its product to its softmax.
SCORE_OPERATIONS = 200
# Keys and values that are kept at once.
CACHE_BYTES = 2**30


@dataclass(frozen=True)
class Cost:
    """What forwards cost, in units of one token run through the model.

    Attributes:
        forward: of a forward, whatever it holds.
        key: of one key that one token looks at.

    >>> Cost(forward=20.0, key=0.01)(sequences=2, tokens=5, keys=100)
    40.0
    """

    forward: float
    key: float

    def __call__(self, *, sequences: int, tokens: int, keys: int) -> float:
        return self.forward + sequences * tokens * (1 + self.key * keys)


def forward_cost(model: TransformerLensModel) -> Cost:
    """The estimate for a model.

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
    """Tokens whose keys and values fit into the memory that is allowed for them."""
    cfg: Any = model.cfg
    heads = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    number = torch.finfo(cfg.dtype).bits // 8
    return CACHE_BYTES // (2 * cfg.n_layers * heads * cfg.d_head * number)
