"""Which parameters a training updates, and restoring the model afterwards."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from lensclust.errors import InputError
from lensclust.models.sites import Site, model_name, resolve

_log = logging.getLogger(__name__)

WRAPPED = "._original_component"


def parameter_names(
    model: TransformerBridge, blocks: Sequence[int] | range | None = None
) -> list[str]:
    """Names of a model's parameters, or of those in some blocks.

    >>> import lensclust as lc
    >>> parameter_names(lc.load("native:sif-small"), [5])[:2]
    ['layers.5.ln1.weight', 'layers.5.ln1.bias']
    """
    named = named_parameters(model)
    if blocks is None:
        return list(named)
    stacked: Any = model
    inside = {id(p) for block in blocks for p in stacked.blocks[block].parameters()}
    return [name for name, parameter in named.items() if id(parameter) in inside]


def named_parameters(model: TransformerBridge) -> dict[str, nn.Parameter]:
    """A model's parameters under their names before TransformerLens wrapped it."""
    return {name.replace(WRAPPED, ""): p for name, p in model.named_parameters()}


def chosen_parameters(
    model: TransformerBridge,
    named: dict[str, nn.Parameter],
    only: str | Sequence[str | Site] | None,
    *,
    caller: str,
) -> dict[str, Tensor | None]:
    """Names of the trained parameters, each with the mask of its gradient, or None for all of it.

    Args:
        named: the model's parameters (`named_parameters`).
        only: a regular expression that is searched in the names, or names, or heads
            (``"head 3.1"``, or sites); all parameters by default.
        caller: function name used in error messages.

    Raises:
        InputError: if no parameter is chosen, a head does not exist, the model cannot be
            trained head by head, or a chosen parameter is quantised or offloaded.
    """
    masks = _named_masks(model, named, only, caller)
    if isinstance(only, str):
        modules = {name.rpartition(".")[0] for name in masks}
        size, whole = (sum(named[name].numel() for name in some) for some in (masks, named))
        found = f"{len(modules)} modules, {size:,} of {whole:,} parameters"
        _log.info("%s: only=%r is in the names of %s", caller, only, found)
    quantised = [name for name in masks if not named[name].is_floating_point()]
    if quantised or getattr(model.original_model, "is_quantized", False):
        name = next(iter(quantised or masks))
        raise InputError(
            f"{caller}: {model_name(model)} is quantised: {name!r} holds {named[name].dtype}, "
            "expected floating-point weights, which have gradients"
        )
    elsewhere = [name for name in masks if named[name].device.type == "meta"]
    if elsewhere:
        raise InputError(
            f"{caller}: {elsewhere[0]!r} of {model_name(model)} is offloaded, expected all trained "
            "parameters on a device"
        )
    return masks


@contextmanager
def restored_afterwards(
    model: TransformerBridge, parameters: Iterable[nn.Parameter]
) -> Iterator[None]:
    """Restore these parameters and all buffers when the block ends.

    Every parameter's ``grad`` and ``requires_grad`` are restored too; the model is in eval mode.
    """
    held = [*parameters, *model.original_model.buffers()]
    saved = [(tensor, tensor.detach().clone()) for tensor in held]
    gradients = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, values in saved:
                tensor.copy_(values)
        for parameter, free, gradient in gradients:
            parameter.requires_grad_(free)
            parameter.grad = gradient
        model.eval()


def _named_masks(
    model: TransformerBridge,
    named: dict[str, nn.Parameter],
    only: str | Sequence[str | Site] | None,
    caller: str,
) -> dict[str, Tensor | None]:
    if only is None:
        return dict.fromkeys(named)
    if isinstance(only, str):
        try:
            found = [name for name in named if re.search(only, name)]
        except re.error as error:
            raise InputError(f"{caller}: only={only!r} is no regular expression: {error}") from None
        if not found:
            raise InputError(
                f"{caller}: only={only!r} matches no name: expected one of {[*named][:8]}"
            )
        return dict.fromkeys(found)
    heads = [item for item in only if str(item).startswith("head ")]
    if heads and len(heads) == len(only):
        return _head_masks(model, named, resolve(model, heads), caller)
    unknown = [item for item in only if item not in named]
    if unknown or not only:
        raise InputError(
            f"{caller}: only={list(map(str, unknown))}, expected names of parameters, such as "
            f"{next(iter(named))!r}, or heads, such as 'head 0.1'"
        )
    return {str(name): None for name in only}


def _head_masks(
    model: TransformerBridge, named: dict[str, nn.Parameter], heads: Sequence[Site], caller: str
) -> dict[str, Tensor | None]:
    stacked: Any = model
    names = {id(parameter): name for name, parameter in named.items()}
    masks: dict[str, Tensor | None] = {}
    for block in sorted({site.layer for site in heads}):
        attention = stacked.blocks[block].attn
        chosen = [site.head for site in heads if site.layer == block]
        for part in "qkvo":
            weights = getattr(attention, f"W_{part.upper()}", None)
            parameter = next(iter(getattr(attention, part, nn.Module()).parameters()), None)
            # With grouped queries several heads share a key and a value.
            if part in "kv" and weights is not None and len(weights) < model.cfg.n_heads:
                continue
            turn = None if weights is None or parameter is None else _layout(weights, parameter)
            if weights is None or turn is None or id(parameter) not in names:
                raise InputError(
                    f"{caller}: {model_name(model)} cannot be trained head by head: its weights "
                    f"W_{part.upper()} of block {block} are not a separate parameter"
                )
            mask = torch.zeros_like(weights)
            mask[chosen] = 1
            masks[names[id(parameter)]] = turn(mask).contiguous()
    return masks


def _layout(weights: Tensor, parameter: Tensor) -> Callable[[Tensor], Tensor] | None:
    """The layout of heads' weights in their parameter, found by comparing values."""
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda w: w.flatten(0, 1),  # (head, d_head, d_model) as (in, out)
        lambda w: w.flatten(0, 1).T,
        lambda w: w.transpose(0, 1).flatten(1),  # (head, d_model, d_head) as (in, out)
        lambda w: w.transpose(0, 1).flatten(1).T,
    ]
    with torch.no_grad():
        for layout in layouts:
            if torch.equal(layout(weights), parameter):
                return layout
    return None
