"""Whether a bridge computes what the network that it wraps computed before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from lensclust.added_code import added_code
from lensclust.agreement import agrees, relative_error, remembered
from lensclust.blocks import hooked_points
from lensclust.errors import InputError
from lensclust.wrapping import followed_network

# Two sequences of so many tokens are run.
_LENGTH = 9
_BARE = "logits before wrapping"


def bare_logits(network: nn.Module) -> Tensor | None:
    """Logits of a few tokens; None where weights lie off the devices or the network cannot run."""
    weights = list(network.parameters())
    if not weights or any(weight.is_meta for weight in weights):
        return None
    parts: Any = network
    ids = torch.arange(2 * _LENGTH).reshape(2, _LENGTH) * 7 + 3
    try:
        tokens = (ids % max(2, parts.config.get_text_config().vocab_size)).to(parts.device)
        with torch.no_grad():
            return parts(tokens, use_cache=False).logits.float()
    except Exception:  # whatever a network's own code raises; it shows that in use
        return None


def note_bare(bridge: TransformerBridge, logits: Tensor | None) -> None:
    """Keep what the network of a bridge gave before it was wrapped, for `require_faithful`."""
    remembered(bridge, _BARE, lambda: logits)


def require_faithful(bridge: TransformerBridge, *, caller: str = "load") -> None:
    """Refuse a bridge whose logits are not those of its network.

    Checked when it is made, and again when the weights are others: what a bridge leaves out may
    not show at initialisation.

    Raises:
        InputError: with the relative difference.
    """
    remembered(bridge, "faithful", lambda: _require(bridge, caller))


def _require(bridge: TransformerBridge, caller: str) -> None:
    expected = remembered(bridge, _BARE, lambda: _logits_of_own(bridge))
    if expected is None:
        return
    network: Any = bridge.original_model
    name, found = bridge.cfg.model_name, bare_logits(network)
    if found is None:
        raise InputError(
            f"{caller}: {name} runs alone and fails once TransformerLens has wrapped it: try "
            "another version of transformer-lens or transformers"
        )
    if not agrees(found, expected, dtype=network.dtype):
        raise InputError(
            f"{caller}: {name} gives other logits once TransformerLens has wrapped it (relative "
            f"difference {relative_error(found, expected):.2g}), so states would be another "
            "network's: build the network with attn_implementation='eager', or try another version "
            "of transformer-lens"
        )


def _logits_of_own(bridge: TransformerBridge) -> Tensor | None:
    """Logits of the network that a bridge was made of; None where they may rightly differ."""
    own = followed_network(bridge)
    if own is None or hooked_points(bridge) or added_code(bridge.original_model):
        return None
    return bare_logits(own)
