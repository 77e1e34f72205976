"""Edits of the state between attention and MLP that reach the residual stream.

TransformerLens places ``hook_resid_mid`` at the start of the MLP's branch (the input of its norm),
so an edit there changes the MLP's input but not the residual stream. Here the change is also
added to the block's output, which is equivalent to editing the state itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.errors import InputError
from lensclust.models import (
    BLOCK_HOOKS,
    Site,
    agrees,
    blocks_of,
    few_tokens,
    model_name,
    remembered,
    without_cache,
)


def require_editable(model: TransformerLensModel, sites: Iterable[Site], *, caller: str) -> None:
    """Refuse to edit ``resid_mid`` in blocks where the edit does not reach the residual stream.

    Args:
        caller: function name used in error messages.

    Raises:
        InputError: names the first such site.
    """
    middle = [site for site in sites if site.kind == "resid_mid"]
    if not middle:
        return
    reached = remembered(model, "edits of resid_mid", lambda: _carried(model))
    for site in middle:
        if site.layer not in reached:
            raise InputError(
                f"{caller}: an edit of {str(site)!r} does not reach the residual stream of "
                f"{model_name(model)}; edit 'resid {site.layer + 1}'"
            )


@torch.no_grad()
def _carried(model: Any) -> frozenset[int]:
    """Blocks in which an edit of ``resid_mid`` reaches the stream, if necessary by our hooks."""
    wanted = [
        number
        for number, block in enumerate(blocks_of(model))
        if BLOCK_HOOKS["resid_mid"].format(number) in model.hook_dict
        and "resid_mid" not in block.refused
    ]
    reached = {number for number in wanted if _reaches(model, number)}
    for number in wanted:
        inner = getattr(model.blocks[number], "original_component", None)
        if number not in reached and isinstance(inner, nn.Module):
            point = model.hook_dict[BLOCK_HOOKS["resid_mid"].format(number)]
            handles = _carry(point, inner)
            if _reaches(model, number):
                reached.add(number)
            else:
                for handle in handles:
                    handle.remove()
    return frozenset(reached)


def _reaches(model: Any, number: int) -> bool:
    """Whether the stream changes by the edit of the middle state plus its effect on the MLP."""
    seen: dict[str, Tensor] = {}
    names = {kind: f"blocks.{number}.hook_{kind}" for kind in ("mlp_out", "resid_post")}
    if any(name not in model.hook_dict for name in names.values()):
        return False

    def edit(value: Tensor, hook: Any) -> Tensor:
        noise = torch.randn(value.shape[-1], generator=torch.Generator().manual_seed(number))
        seen["middle"] = value + value.norm(dim=-1, keepdim=True) * noise.to(value)
        return seen["middle"]

    def keep(kind: str) -> Any:
        return lambda value, hook: seen.update({kind: value.clone()})

    model.run_with_hooks(
        few_tokens(model),
        fwd_hooks=[
            (BLOCK_HOOKS["resid_mid"].format(number), edit),
            *((name, keep(kind)) for kind, name in names.items()),
        ],
        return_type=None,
        **without_cache(model),
    )
    if len(seen) < 3:
        return False
    return agrees(seen["resid_post"], seen["middle"] + seen["mlp_out"])


def _carry(point: Any, block: nn.Module) -> list[Any]:
    """Add hooks that add the change at a hook point to its block's output."""
    before: list[Tensor] = []
    change: list[Tensor] = []

    def entered(_point: nn.Module, given: tuple[Tensor, ...]) -> None:
        before[:], change[:] = [given[0]], []
        # Moved after hooks that were placed later, so that it sees their result.
        point._forward_hooks.move_to_end(leaving.id)

    def left(_point: nn.Module, _given: Any, value: Tensor) -> None:
        if value is not before[0]:
            change[:] = [value - before[0]]
        before.clear()

    def add(_block: nn.Module, _given: Any, out: Any) -> Any:
        if not change:
            return None
        first = out if isinstance(out, Tensor) else out[0]
        first = first + change.pop().reshape(first.shape)
        return first if isinstance(out, Tensor) else (first, *out[1:])

    leaving = point.register_forward_hook(left)
    return [point.register_forward_pre_hook(entered), leaving, block.register_forward_hook(add)]
