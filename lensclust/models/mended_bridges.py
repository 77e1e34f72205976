"""Workarounds for errors of TransformerLens in some architectures, applied at loading."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

_MENDED = "_mended_by_lensclust"


def mended(bridge: TransformerBridge) -> TransformerBridge:
    """Add hooks to a bridge that make it compute and expose the same as its network.

    - Some rotary embeddings (OLMo's) are float32. The network rounds rotated queries and keys
      back to its precision; the bridge does not, and its attention fails on mixed precisions
      (with a key/value cache it continues in float32).
    - GPT-1's blocks return lists, which the bridge's hook ignores.
    - Heads of latent attention (DeepSeek) have values of another size than queries, but
      ``hook_z`` is split by the size in the configuration.
    """
    if not getattr(bridge, _MENDED, False):
        for block in getattr(bridge, "blocks", ()):
            _return_tuples(block)
            attention = getattr(block, "attn", None)
            if isinstance(attention, AttentionBridge):
                _round_rotated(attention)
                _cut_by_value_size(attention)
        setattr(bridge, _MENDED, True)
    return bridge


def _return_tuples(block: Any) -> None:
    inner = getattr(block, "original_component", None)
    if isinstance(inner, nn.Module):
        inner.register_forward_hook(
            lambda _module, _given, out: tuple(out) if isinstance(out, list) else None
        )


def _round_rotated(attention: Any) -> None:
    values: Any = getattr(getattr(attention, "v", None), "hook_out", None)
    rotated: list[Any] = [getattr(attention, f"hook_rot_{part}", None) for part in "qk"]
    if values is None or None in rotated:
        return
    precision: list[torch.dtype] = []

    def note(_point: nn.Module, _given: Any, value: Tensor) -> None:
        precision[:] = [value.dtype]

    def round_back(_point: nn.Module, _given: Any, value: Tensor) -> Tensor | None:
        # TransformerLens computes values before it rotates.
        return value.to(precision[0]) if precision and value.dtype != precision[0] else None

    values.register_forward_hook(note)
    for point in rotated:
        point.register_forward_hook(round_back)


def _cut_by_value_size(attention: Any) -> None:
    size = getattr(getattr(attention, "original_component", None), "v_head_dim", None)
    output: Any = getattr(attention, "o", None)
    cut: Any = getattr(getattr(output, "hook_in", None), "hook_conversion", None)
    width = getattr(getattr(output, "original_component", None), "in_features", None)
    if size and width and hasattr(cut, "d_head") and width % size == 0:
        cut.n_heads, cut.d_head = width // size, size
