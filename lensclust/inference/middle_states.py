"""Edits of the state between attention and MLP, carried on by the residual stream.

TransformerLens places ``hook_resid_mid`` where the MLP's branch begins (the input of its norm), so
that an edit there changes what the MLP reads, and the stream goes on as it was. Here the change
is added to what the block gives, which is what editing the state itself does.
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
    """Refuse to edit ``resid_mid`` where the change does not go on in the residual stream.

    Raises:
        InputError: in the name of ``caller``, naming the first such site.
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
    """Blocks in which an edit of ``resid_mid`` reaches the stream, if need be by our doing."""
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
    """Whether the stream moves by an edit of the middle state and what the MLP makes of it."""
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
    """Hooks that add what was changed at a point to what its block gives."""
    before: list[Tensor] = []
    change: list[Tensor] = []

    def entered(_point: nn.Module, given: tuple[Tensor, ...]) -> None:
        before[:], change[:] = [given[0]], []
        # Behind the hooks that were placed since: what the last of them leaves is seen.
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
