"""Attention patterns, the values they weight and their gradients, seen block by block.

A forward shows each block's pattern to whoever asked, inside the hook, and keeps none. Reading
the pattern itself is exact for every kind of position, grouped heads, windows and soft-caps, and
costs nothing: models that are hooked compute it anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.batching import without_cache
from lensclust.errors import InputError
from lensclust.sites import Site, head_frames, hook_name, model_name, resolve
from probes.answer_losses import Loss

# Of one block: its pattern, and how long each value is (None unless asked for). What comes back
# is shown the gradient of the loss with respect to the pattern, when the backward gets there.
Pattern = Float[Tensor, "row head query key"]
Lengths = Float[Tensor, "row head key"]
ShowGradient = Callable[[Pattern], None]
Show = Callable[[int, Pattern, Lengths | None], ShowGradient | None]


class PatternReader:
    """Shows the attention patterns of a model's forwards.

    Args:
        model: a hooked model, in eval mode, with eager attention.
        values: whether the lengths of values are wanted: ``||v W_O||`` of each head and token,
            a head's bias ``b_V`` included (Kobayashi et al. 2020, section 3).
        caller: in whose name errors speak.

    Raises:
        InputError: if a block has no pattern to read, or no values where they are wanted.
    """

    def __init__(self, model: TransformerLensModel, *, values: bool, caller: str) -> None:
        resolve(model, "z")
        self.model: Any = model
        self.caller = caller
        self.blocks = range(model.cfg.n_layers)
        hooks = self.model.hook_dict
        kinds = ["hook_pattern", *(["hook_v"] if values else [])]
        for name in (self._hook(block, kind) for block in self.blocks for kind in kinds):
            if name not in hooks:
                raise InputError(f"{caller}: {model_name(model)} has no {name!r} to read")
        # z F is as long as z W_O, in d_head numbers.
        self.frames = head_frames(model, self.blocks) if values else None

    def run(
        self,
        tokens: Int[Tensor, "row token"],
        last: Int[Tensor, " row"],
        show: Show,
        loss: Loss | None = None,
    ) -> None:
        """Run right-padded prompts and show every block's pattern, and with a loss its gradient.

        Without a loss the forward ends at the last pattern. The loss is a sum over rows, so that
        each row's gradient is its own; it is not taken through what enters the first block, and
        no parameter gets a gradient.

        Raises:
            InputError: if patterns do not lie between the states and the loss.
        """
        showing = _Showing(self, show, wants_gradient=loss is not None)
        try:
            with torch.set_grad_enabled(loss is not None):
                logits = self.model.run_with_hooks(
                    tokens,
                    fwd_hooks=showing.hooks(tokens, last),
                    return_type="logits",
                    **without_cache(self.model),
                )
        except _AllSeen:
            return
        if showing.awaited or loss is None:
            raise InputError(
                f"{self.caller}: {sorted(showing.awaited)} gave no pattern in "
                f"{model_name(self.model)}; load the model with eager attention"
            )
        torch.autograd.grad(loss(logits[0].float()), showing.entering)
        if showing.awaited_gradients:
            raise InputError(
                f"{self.caller}: {sorted(showing.awaited_gradients)} got no gradient in "
                f"{model_name(self.model)}: its patterns are copies that its answers do not "
                "depend on"
            )

    @staticmethod
    def _hook(block: int, kind: str) -> str:
        return f"blocks.{block}.attn.{kind}"


class _AllSeen(Exception):
    """Raised inside a hook to end a forward that has nothing left to show."""


class _Showing:
    """The hooks of one forward, and what they still wait for."""

    def __init__(self, reader: PatternReader, show: Show, *, wants_gradient: bool) -> None:
        self.reader, self.show, self.wants_gradient = reader, show, wants_gradient
        self.awaited = {reader._hook(block, "hook_pattern") for block in reader.blocks}
        self.awaited_gradients = set(self.awaited) if wants_gradient else set()
        self.lengths: dict[int, Lengths] = {}
        self.entering: Any = None

    def hooks(self, tokens: Tensor, last: Tensor) -> list[tuple[str, Callable[..., Any]]]:
        reader = self.reader
        found: list[tuple[str, Callable[..., Any]]] = []
        if self.wants_gradient:
            found.append((hook_name(reader.model, Site("resid", 0)), self._enter))
            # One sequence of the wanted states: unembedding sees no order.
            row = torch.arange(len(last))
            only = lambda value, hook: value[row.to(value.device), last.to(value.device)][None]  # noqa: E731
            found.append(("unembed.hook_in", only))
        for block in reader.blocks:
            if reader.frames is not None:
                found.append((reader._hook(block, "hook_v"), self._see_values(block)))
            found.append((reader._hook(block, "hook_pattern"), self._see_pattern(block)))
        return found

    def _enter(self, value: Tensor, hook: Any) -> Tensor:
        self.entering = value.detach().requires_grad_()
        return self.entering

    def _see_values(self, block: int) -> Callable[[Tensor, Any], None]:
        assert self.reader.frames is not None
        frame = self.reader.frames[block]

        def hook(value: Float[Tensor, "row key group d_head"], hook: Any) -> None:
            here = frame.to(value.device)
            each = value.detach().to(here).repeat_interleave(len(here) // value.shape[2], dim=2)
            self.lengths[block] = torch.einsum("bkhd,hdr->bhkr", each, here).norm(dim=-1)

        return hook

    def _see_pattern(self, block: int) -> Callable[[Tensor, Any], None]:
        name = self.reader._hook(block, "hook_pattern")

        def hook(value: Tensor, hook: Any) -> None:
            if name not in self.awaited:
                raise RuntimeError(f"{self.reader.caller}: hook {name!r} fired twice")
            self.awaited.discard(name)
            show_gradient = self.show(block, value.detach(), self.lengths.pop(block, None))
            if show_gradient is not None and value.requires_grad:

                def backward(gradient: Tensor) -> None:
                    self.awaited_gradients.discard(name)
                    show_gradient(gradient)

                value.register_hook(backward)
            if not self.awaited and not self.wants_gradient:
                raise _AllSeen

        return hook
