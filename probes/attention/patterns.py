"""Attention patterns, their values and gradients, read block by block.

A forward passes each block's pattern to a callback inside the hook, and keeps none. Reading the
pattern is exact for every kind of position embedding, grouped heads, windows and soft-caps, and
costs nothing: hooked models compute it anyway.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.errors import InputError
from lensclust.models import (
    Site,
    agrees,
    attention_kernel,
    blocks_of,
    few_tokens,
    head_blocks,
    head_frames,
    hook_name,
    hooked_points,
    model_name,
    remembered,
    unhooked,
    without_cache,
)
from lensclust.prompts import Prompts

# Standard deviation of the values inserted by the check: larger than any clip.
LARGE = 1000.0

# Callback of one block, by its index among those with attention: gets its pattern and the norm of
# each value (None unless wanted). The callback that it returns gets the gradient of the loss with
# respect to the pattern in the backward.
Pattern = Float[Tensor, "row head query key"]
Lengths = Float[Tensor, "row head key"]
ShowGradient = Callable[[Pattern], None]
Show = Callable[[int, Pattern, Lengths | None], ShowGradient | None]
# From the logits at the last token of each row to a sum over rows.
Loss = Callable[[Float[Tensor, "row vocab"]], Float[Tensor, ""]]


class PatternReader:
    """Read the attention patterns of a model's forwards.

    Args:
        model: a hooked model, in eval mode, with eager attention.
        values: whether to read the norms of values: ``||v W_O||`` of each head and token,
            a head's bias ``b_V`` included (Kobayashi et al. 2020, section 3), of the values that
            the pattern weights (`value_readings`).
        caller: function name used in error messages.

    Attributes:
        blocks: the blocks that have attention.

    Raises:
        InputError: if there is no pattern to read, or no values with ``values``.
    """

    def __init__(self, model: TransformerLensModel, *, values: bool, caller: str) -> None:
        self.model: Any = model
        self.caller = caller
        self.blocks = head_blocks(model)
        for name in (self._hook(block, "hook_pattern") for block in self.blocks):
            if name not in self.model.hook_dict:
                raise InputError(f"{caller}: {model_name(model)} has no {name!r} to read")
        # z F has the norm of z W_O, in d_head numbers.
        self.readings = value_readings(model, self.blocks, caller=caller) if values else None
        frames = [head_frames(model, [block])[0] for block in self.blocks] if values else []
        self.frames = dict(zip(self.blocks, frames, strict=False))

    def run(
        self,
        tokens: Int[Tensor, "row token"],
        last: Int[Tensor, " row"],
        show: Show,
        loss: Loss | None = None,
    ) -> None:
        """Run right-padded prompts and read every block's pattern, and with a loss its gradient.

        Without a loss the forward ends at the last pattern. The loss is a sum over rows, so that
        its gradient separates by row; it stops at the input of the first block, and no parameter
        gets a gradient.

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


# Possible changes of values between their hook and the product with the pattern.
CHANGES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "none": lambda value, model: value,
    "clipped": lambda value, model: value.clamp(-_clip(model), _clip(model)),
    "heads first": lambda value, model: value.transpose(1, 2),
}
VALUES = ("hook_v", "v_norm.hook_out")
# Hooks between the product of pattern and values and the block's output.
_BEHIND_VALUES = re.compile(
    r"blocks\.(\d+)\.(attn\.(hook_z|hook_result|hook_out|o\..*)|hook_attn_out)$"
)


def value_readings(
    model: TransformerLensModel, blocks: Sequence[int], *, caller: str
) -> dict[int, tuple[str, str]]:
    """Hook of the values that a block's pattern weights, and their change after it.

    Large values are inserted at a hook; the pattern times these, changed or not, must be ``z``.
    This detects a clip or a norm of values, and refuses heads whose sum is gated or normed
    before ``z``. Checked once per model.

    Raises:
        InputError: if a block's ``z`` is not its pattern times readable values, its output is not
            ``z W_O``, or a hook of the caller changes either.

    >>> import lensclust as lc
    >>> value_readings(lc.load("native:sif-small"), [5], caller="f")
    {5: ('hook_v', 'none')}
    """
    with unhooked(model):
        found = remembered(
            model,
            ("values", attention_kernel(model)),
            lambda: _find_values(model, head_blocks(model)),
        )
    for point in hooked_points(model):
        if (match := _BEHIND_VALUES.match(point)) and int(match[1]) in blocks:
            raise InputError(
                f"{caller}: a hook stands at {point!r}, behind the values that are weighted: "
                "expected none there; remove it, or use another weighting"
            )
    for block in blocks:
        refused = blocks_of(model)[block].refused
        if found[block] is None or refused.keys() & {"attn_out", "value"}:
            reason = refused.get("value") or refused.get("attn_out")
            gated = (
                "its heads' output is not attention times values (it is gated or normed, or values "
                "are changed after they can be read)"
            )
            raise InputError(
                f"{caller}: values of block {block} of {model_name(model)} cannot be weighted: "
                f"{reason or gated}; use another weighting"
            )
    return {block: reading for block in blocks if (reading := found[block]) is not None}


@torch.no_grad()
def _find_values(model: Any, blocks: Sequence[int]) -> dict[int, tuple[str, str] | None]:
    found: dict[int, tuple[str, str] | None] = dict.fromkeys(blocks)
    changes = [change for change in CHANGES if change != "clipped" or _clip(model)]
    for name in VALUES:
        here = [block for block in blocks if f"blocks.{block}.attn.{name}" in model.hook_dict]
        for block in here if None in found.values() else []:
            shown = _shown_with_large_values(model, block, name)
            for change in changes:
                if found[block] is None and _weighted(*shown, CHANGES[change], model):
                    found[block] = (name, change)
    return found


def _shown_with_large_values(model: Any, block: int, name: str) -> tuple[Tensor, ...]:
    """A block's pattern and ``z`` with artificially large values, and these values."""
    tokens = few_tokens(model)
    shown: dict[str, Tensor] = {}

    def enlarge(value: Tensor, hook: Any) -> Tensor:
        shown[name] = value / value.float().std().to(value).clamp(min=1e-6) * LARGE
        return shown[name]

    def keep(kind: str) -> tuple[str, Callable[[Tensor, Any], None]]:
        def hook(value: Tensor, hook: Any) -> None:
            shown[kind] = value

        return f"blocks.{block}.attn.{kind}", hook

    model.run_with_hooks(
        tokens,
        fwd_hooks=[(f"blocks.{block}.attn.{name}", enlarge), keep("hook_pattern"), keep("hook_z")],
        return_type=None,
        **without_cache(model),
    )
    return tuple(shown[kind] for kind in ("hook_pattern", name, "hook_z") if kind in shown)


def _weighted(*given: Any) -> bool:
    """Whether ``z`` is the pattern times the values, after a change."""
    if len(given) != 5:  # one of them has not fired
        return False
    pattern, value, z, change, model = given
    heads = pattern.shape[1]
    value = change(value, model) if value.dim() == 4 else value
    if value.dim() != 4 or heads % value.shape[2] or z.shape[2] != heads:
        return False
    each = value.float().repeat_interleave(heads // value.shape[2], dim=2)
    dtype = min((pattern.dtype, z.dtype), key=lambda kind: torch.finfo(kind).bits)
    return agrees(torch.einsum("bhqk,bkhd->bqhd", pattern.float(), each), z.float(), dtype=dtype)


def _clip(model: Any) -> float:
    """Bound of the values, 0 if there is none."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    return float(getattr(config, "clip_qkv", None) or 0)


class _AllSeen(Exception):
    """Raised inside a hook to end a forward once everything is read."""


class _Showing:
    """The hooks of one forward, and the patterns not yet read."""

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
            # One sequence of the wanted states: unembedding is independent of order.
            row = torch.arange(len(last))
            only = lambda value, hook: value[row.to(value.device), last.to(value.device)][None]  # noqa: E731
            found.append(("unembed.hook_in", only))
        for block in reader.blocks:
            if reader.readings is not None:
                name, change = reader.readings[block]
                found.append((reader._hook(block, name), self._see_values(block, CHANGES[change])))
            found.append((reader._hook(block, "hook_pattern"), self._see_pattern(block)))
        return found

    def _enter(self, value: Tensor, hook: Any) -> Tensor:
        self.entering = value.detach().requires_grad_()
        return self.entering

    def _see_values(
        self, block: int, change: Callable[[Tensor, Any], Tensor]
    ) -> Callable[[Tensor, Any], None]:
        frame = self.reader.frames[block]

        def hook(value: Float[Tensor, "row key group d_head"], hook: Any) -> None:
            here = frame.to(value.device)
            value = change(value.detach(), self.reader.model)
            each = value.to(here).repeat_interleave(len(here) // value.shape[2], dim=2)
            self.lengths[block] = torch.einsum("bkhd,hdr->bhkr", each, here).norm(dim=-1)

        return hook

    def _see_pattern(self, block: int) -> Callable[[Tensor, Any], None]:
        name = self.reader._hook(block, "hook_pattern")
        place = self.reader.blocks.index(block)

        def hook(value: Tensor, hook: Any) -> None:
            if name not in self.awaited:
                raise RuntimeError(f"{self.reader.caller}: hook {name!r} fired twice")
            self.awaited.discard(name)
            show_gradient = self.show(place, value.detach(), self.lengths.pop(block, None))
            if show_gradient is not None and value.requires_grad:

                def backward(gradient: Tensor) -> None:
                    self.awaited_gradients.discard(name)
                    show_gradient(gradient)

                value.register_hook(backward)
            if not self.awaited and not self.wants_gradient:
                raise _AllSeen

        return hook


class AnswerLoss:
    """Cross-entropy of the first token of each prompt's answer.

    Args:
        prompts: with answers.
        labels: tokens of the softmax; default the whole vocabulary.
        caller: function name used in error messages.

    Raises:
        InputError: if a prompt has no answer, or one that is not among the labels.

    >>> import pandas as pd
    >>> prompts = Prompts.from_token_lists([[1]], pd.DataFrame({"task": ["a"]}), answers=[[2]])
    >>> loss = AnswerLoss(prompts, labels=[0, 2], caller="example").of(torch.tensor([0]))
    >>> round(float(loss(torch.tensor([[0.0, 9.0, 0.0]]))), 3)  # two labels, level
    0.693
    """

    def __init__(
        self, prompts: Prompts, *, labels: Sequence[int] | None = None, caller: str
    ) -> None:
        # The first token of each answer; an empty list where there is none.
        first = [list(answer[:1]) for answer in prompts.answers or ((),)]
        if without := [row for row, tokens in enumerate(first) if not tokens]:
            raise InputError(f"{caller}: prompt {without[0]} has no answer, needed for gradients")
        first = [token for tokens in first for token in tokens]
        self.labels = None if labels is None else torch.tensor(list(labels))
        if labels is not None:
            place = {token: index for index, token in enumerate(labels)}
            if other := [row for row, token in enumerate(first) if token not in place]:
                raise InputError(
                    f"{caller}: the answer of prompt {other[0]} begins with token "
                    f"{first[other[0]]}, expected one of the labels {list(labels)}"
                )
            first = [place[token] for token in first]
        self.right = torch.tensor(first)

    def of(self, rows: Int[Tensor, " row"]) -> Loss:
        """The summed loss of these prompts."""

        def loss(logits: Float[Tensor, "row vocab"]) -> Float[Tensor, ""]:
            if self.labels is not None:
                logits = logits[:, self.labels.to(logits.device)]
            right = self.right[rows].to(logits.device)
            # Rows are independent, so the gradient of the sum separates by row.
            return torch.nn.functional.cross_entropy(logits, right, reduction="sum")

        return loss
