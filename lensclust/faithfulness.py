"""Whether a bridge computes what the network that it wraps computed before, block by block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from lensclust.agreement import agrees, relative_error, remembered
from lensclust.errors import InputError

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


def require_all_blocks(bridge: TransformerBridge) -> None:
    """Refuse a network whose configuration gives another number of blocks than it has.

    The last layer of the residual stream would be missing, or be looked for in a block that never
    runs.

    Raises:
        InputError: with both numbers, and how to make them agree.
    """
    there, said = len(getattr(bridge, "blocks", ())), bridge.cfg.n_layers
    if there and there != said:
        raise InputError(
            f"load: {bridge.cfg.model_name} has {there} blocks, its configuration says {said}; "
            f"where blocks were cut or added by hand, set config.num_hidden_layers = {there}"
        )


def called_not_causal(network: Any) -> str:
    """What to say of a network whose configuration itself turns causal attention off."""
    config = getattr(network, "config", None)
    if getattr(config, "is_causal", True) is False:
        return "its config.is_causal is False, so that states see later tokens"
    return ""


def require_faithful(bridge: TransformerBridge) -> None:
    """Refuse a bridge whose logits are not those of its network; checked once, when it is made.

    Raises:
        InputError: with the relative difference.
    """
    remembered(bridge, "faithful", lambda: _require(bridge))


def _require(bridge: TransformerBridge) -> None:
    expected = remembered(bridge, _BARE, lambda: None)
    if expected is None:
        return
    network: Any = bridge.original_model
    name, found = bridge.cfg.model_name, bare_logits(network)
    if found is None:
        raise InputError(
            f"load: {name} runs alone and fails once TransformerLens has wrapped it: try another "
            "version of transformer-lens or transformers"
        )
    if not agrees(found, expected, dtype=network.dtype):
        if reason := called_not_causal(network):
            raise InputError(
                f"load: {name} is not causal: {reason}; expected a decoder, such as ...ForCausalLM "
                "with is_causal=True"
            )
        raise InputError(
            f"load: {name} gives other logits once TransformerLens has wrapped it (relative "
            f"difference {relative_error(found, expected):.2g}), so states would be another "
            "network's: build the network with attn_implementation='eager', or try another version "
            "of transformer-lens"
        )
