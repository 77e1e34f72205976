"""Forwards over sequences that pack several continuations of one cached prefix.

An attention mask separates the continuations, position ids give each token's position in its
prompt, and keys and values from earlier forwards are passed as a cache, so that no model has to be
changed. This works for Hugging Face models whose attention depends only on mask and positions,
which a self-check tests (`lensclust.inference.prefix_sharing.sharing`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from lensclust.inference.prefix_sharing.packing import PackedBatch
from lensclust.models import model_device

Hooks = Sequence[tuple[str, Callable[..., Any]]]


class PackedForwards:
    """Runs the batches of a plan in order and keeps the keys and values that they share.

    Args:
        model: a bridge around a Hugging Face model.
    """

    def __init__(self, model: TransformerBridge) -> None:
        self.model = model
        self.network: Any = model.original_model
        self.layers = [CachedTokens() for _ in range(model.cfg.n_layers)]

    def run(self, batch: PackedBatch, hooks: Hooks) -> Any:
        """The network's output on a batch; hooks see ``(group, place, ...)``."""
        longest = int(batch.positions.max()) + 1
        # Uploaded once, not in every layer, where an upload would delay the next kernels.
        batch = batch.to(model_device(self.model))
        for layer in self.layers:
            layer.prepare(batch)
        with self.model.hooks(fwd_hooks=list(hooks)):
            return self.network(
                batch.tokens,
                attention_mask=attention_masks(
                    self.network, lambda window: visible(batch, window), longest
                ),
                position_ids=batch.positions,
                past_key_values=Cache(layers=list(self.layers)),
                use_cache=True,
            )


def visible(batch: PackedBatch, window: int | None) -> Bool[Tensor, "group 1 place key"]:
    """The keys that each token may attend to: its past and its path, within a window."""
    n, width = batch.tokens.shape
    device = batch.tokens.device
    places = torch.arange(width, device=device)
    path = torch.arange(batch.past.shape[1], device=device)
    past = (path < batch.past_lengths[:, None])[:, None].expand(n, width, len(path))
    own = (places <= places[:, None]) & (batch.ends[:, None] > places[:, None])
    seen = torch.cat([past, own], dim=2)
    if window is not None:
        # The tokens of a path are at the positions of their indices.
        stands = torch.cat([path.expand(n, -1), batch.positions], dim=1)
        seen &= stands[:, None] > batch.positions[:, :, None] - window
    return seen[:, None]


def attention_masks(
    network: PreTrainedModel,
    visible: Callable[[int | None], Bool[Tensor, "row 1 query key"]],
    longest: int,
) -> Tensor | dict[str, Tensor]:
    """Additive attention masks; one for each type of layer if some layers use a window.

    Args:
        visible: from a window (None: unbounded) to the visible keys.
        longest: tokens of the longest prompt; windows of at least this size hide nothing.
    """
    config: Any = network.config

    def added(seen: Tensor) -> Tensor:
        lowest = torch.finfo(network.dtype).min
        scores = torch.zeros(seen.shape, dtype=network.dtype, device=seen.device)
        return scores.masked_fill_(~seen, lowest)

    full = added(visible(None))
    window = getattr(config, "sliding_window", None)
    if window is None or window >= longest:
        return full
    types = getattr(config, "layer_types", None)
    sliding = added(visible(window))
    return {"full_attention": full, "sliding_attention": sliding} if types else sliding


class CachedTokens(DynamicLayer):
    """Keys and values of single tokens in one layer, reassembled for every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True
        self.keys = self.values = None

    def prepare(self, batch: PackedBatch) -> None:
        """Set which cached tokens the next forward continues, and which new ones to cache."""
        if batch.fresh:
            self.keys = self.values = None
        self.batch = batch

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        before = self.keys, self.values
        self.keys = self._with_new(self.keys, key_states)
        self.values = self._with_new(self.values, value_states)
        return self._after_past(before[0], key_states), self._after_past(before[1], value_states)

    def get_seq_length(self) -> int:
        return self.batch.past.shape[1]

    def _with_new(
        self,
        cached: Float[Tensor, "token head d"] | None,
        states: Float[Tensor, "group head place d"],
    ) -> Float[Tensor, "more head d"] | None:
        if not len(self.batch.cached):
            return cached
        group, place = self.batch.cached.to(states.device).unbind(1)
        new = states[group, :, place]
        return new if cached is None else torch.cat([cached, new])

    def _after_past(
        self,
        cached: Float[Tensor, "token head d"] | None,
        states: Float[Tensor, "group head place d"],
    ) -> Float[Tensor, "group head key d"]:
        past = self.batch.past
        if not past.shape[1]:
            return states
        assert cached is not None  # a past is cached by earlier batches
        found = cached.index_select(0, past.flatten().to(cached.device))
        return torch.cat([found.unflatten(0, past.shape).transpose(1, 2), states], dim=2)
