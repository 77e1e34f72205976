"""Attention by the model's own fused kernel, for work in which nobody looks at a pattern.

The bridge computes attention step by step, so that scores and patterns have hooks; their matrices
then take most of the memory of a long prompt's backward, and much of its time. The code of the
model itself can do without them (`torch.nn.functional.scaled_dot_product_attention`), and the
bridge's output projection stands in it: the hook of ``z`` fires all the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Set
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from lensclust.partial_forwards import alike, forward_logits, running

_ALIKE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_log = logging.getLogger(__name__)


@contextmanager
def fused_attention(
    model: TransformerBridge, trial: Int[Tensor, "row length"], *, hooks: Iterable[str] = ()
) -> Iterator[bool]:
    """Inside, no attention matrix is made, if the model has such code and gives the same with it.

    Whether it gives the same is tried once for each model, by the logits of ``trial``. Attention is
    left as it is where a hook is on any part of it but its output projection, and where the model
    has no such code (native models; soft-capped scores).

    Args:
        model: a hooked model, in eval mode.
        trial: sequences to try it on, without padding.
        hooks: names of those that will be placed inside; they count as if they were there.

    Yields:
        Whether attention is fused.

    >>> import lensclust as lc
    >>> model = lc.load("native:sif-small")  # has no code but the bridge's
    >>> with fused_attention(model, torch.tensor([[1, 2, 3]])) as fused:
    ...     fused
    False
    """
    attentions = _own_code(model, hooks)
    if not attentions:
        yield False
        return
    if model not in _ALIKE:
        with torch.no_grad():
            plain = forward_logits(model, trial)
            with _swapped(model, attentions):
                _ALIKE[model] = alike(plain, forward_logits(model, trial))
        if not _ALIKE[model]:
            _log.info("attention is not fused: the model's own code gives other logits")
    if not _ALIKE[model]:
        yield False
        return
    with _swapped(model, attentions):
        yield True


def _own_code(model: Any, hooks: Iterable[str]) -> list[Any]:
    """The attention of every block, if all of it can be run by the model's own code."""
    network = model.original_model
    eager = getattr(getattr(network, "config", None), "_attn_implementation", None) == "eager"
    if not (eager and getattr(network, "_supports_sdpa", False)):
        return []
    attentions = [getattr(block, "attn", None) for block in model.blocks]
    points = model.hook_dict
    awaited = {points[name] for name in hooks}
    return attentions if all(_can_run(attention, awaited) for attention in attentions) else []


def _can_run(attention: Any, awaited: Set[HookPoint]) -> bool:
    original = getattr(attention, "original_component", None)
    output = getattr(attention, "o", None)
    if original is None or output is None or not hasattr(original, "config"):
        return False
    unseen = set(attention.modules()) - set(output.modules())
    points = {part for part in unseen if isinstance(part, HookPoint)}
    if points & awaited or any(point.fwd_hooks or point.bwd_hooks for point in points):
        return False
    return _place(original, output) is not None


def _place(original: nn.Module, output: Any) -> str | None:
    """Under which name the model's own code finds its output projection."""
    same = (output, output.original_component)
    return next((name for name, part in original.named_children() if part in same), None)


@contextmanager
def _swapped(model: Any, attentions: list[Any]) -> Iterator[None]:
    owners = [model.original_model, *(each.original_component for each in attentions)]
    configs = {id(owner.config): owner.config for owner in owners}
    own = {attention: attention.original_component.forward for attention in attentions}
    with ExitStack() as undo:
        for config in configs.values():
            undo.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            config._attn_implementation = "sdpa"
        for attention in attentions:
            original, output = attention.original_component, attention.o
            name = _place(original, output)
            # Its input is ``z``: the bridge's projection, whose hooks see it.
            undo.callback(original._modules.__setitem__, name, original._modules[name])
            original._modules[name] = output
        undo.enter_context(running(own))
        yield
