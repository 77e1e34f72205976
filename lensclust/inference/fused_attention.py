"""Attention by the model's fused kernel, for forwards in which no pattern is needed.

The bridge computes attention step by step, so that scores and patterns have hooks; their matrices
take most of the memory of a long prompt's backward pass, and much of its time. The model's
original code does without them (`torch.nn.functional.scaled_dot_product_attention`). It runs here
with the bridge's output projection, so the hook of ``z`` still fires.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Set
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from lensclust.inference.partial_forwards import forward_logits, running
from lensclust.inference.prefix_sharing import FAILURES, States, named, ordinary_ids
from lensclust.models import SizedCheck, agrees, model_device, power_of_two, remembered

# Minimum number of tokens of checked sequences.
SHORT = 64
_log = logging.getLogger(__name__)


@contextmanager
def fused_attention(
    model: TransformerBridge, longest: int, *, hooks: Iterable[str] = ()
) -> Iterator[bool]:
    """Context in which attention is fused, if the model supports it with equal results.

    Equality is checked once for each model and length (rounded up), by every layer's states and
    the logits of two sequences, the shorter of them padded. Attention is unchanged if a hook is
    on any part of it except its output projection, or the model has no fused code (native models;
    soft-capped scores).

    Args:
        model: a hooked model, in eval mode.
        longest: number of tokens of the longest sequence that will be run.
        hooks: names of hooks that will be placed inside; they count as already placed.

    Yields:
        Whether attention is fused.

    >>> import lensclust as lc
    >>> model = lc.load("native:sif-small")  # has no code but the bridge's
    >>> with fused_attention(model, 3) as fused:
    ...     fused
    False
    """
    attentions = _own_code(model, hooks)
    if not attentions or _failure(model, attentions, longest) is not None:
        yield False
        return
    with _swapped(model, attentions):
        yield True


def _failure(model: Any, attentions: list[Any], longest: int) -> str | None:
    """Why the model's fused code cannot be used for sequences of a length; None if it can."""
    kind = (model.original_model.dtype, model_device(model).type)
    check: SizedCheck = remembered(model, ("fused attention", *kind), SizedCheck)
    context = model.cfg.n_ctx or longest
    larger = max(longest, min(power_of_two(max(longest, SHORT)), context))

    def find(size: tuple[int, ...]) -> str | None:
        why_not = _difference(model, attentions, *size)
        if why_not is not None:
            _log.info("attention is not fused: %s in sequences of %d tokens", why_not, *size)
        return why_not

    return check.reason((longest,), larger=(larger,), find=find)


@torch.no_grad()
def _difference(model: Any, attentions: list[Any], length: int) -> str | None:
    """How the results of the model's fused code differ from the bridge's; None if they agree."""
    generator, ids = torch.Generator().manual_seed(0), torch.from_numpy(ordinary_ids(model))
    tokens = ids[torch.randint(len(ids), (2, length), generator=generator)]
    ends = [length - 1, length // 3]
    tokens[1, ends[1] + 1 :] = 0
    wanted = [
        [row, place // (slot + 1), row, slot] for row, place in enumerate(ends) for slot in (0, 1)
    ]
    rows, places = torch.tensor(wanted)[:, :2].unbind(1)
    only = ("unembed.hook_in", lambda value, hook: value[rows, places][None])

    def read() -> dict[str, torch.Tensor]:
        states = States(model, len(ends))
        with model.hooks(fwd_hooks=[*states.hooks(torch.tensor(wanted)), only]):
            logits = forward_logits(model, tokens.to(model_device(model)))
        return {**states.found, "logits": logits[0]}

    plain = read()
    try:
        with _swapped(model, attentions):
            fused = read()
    except FAILURES as failure:
        return named(failure)
    # Hooks that fused code does not reach may stay silent: none is used (see `_can_run`).
    for name, found in fused.items():
        if not agrees(found, plain[name], dtype=model.original_model.dtype):
            return f"{name} differs"
    return None


def _own_code(model: Any, hooks: Iterable[str]) -> list[Any]:
    """The attention of every block, if all of them can be run by the model's fused code."""
    network = model.original_model
    if _capped(getattr(network, "config", None)):
        return []
    eager = getattr(getattr(network, "config", None), "_attn_implementation", None) == "eager"
    if not (eager and getattr(network, "_supports_sdpa", False)):
        return []
    attentions = [getattr(block, "attn", None) for block in model.blocks]
    points = model.hook_dict
    awaited = {points[name] for name in hooks}
    return attentions if all(_can_run(attention, awaited) for attention in attentions) else []


def _capped(config: Any) -> bool:
    """Whether scores are soft-capped, which fused code omits; small scores do not reveal it."""
    fields = config.get_text_config().to_dict() if config is not None else {}
    return any("attn" in name and "cap" in name and bool(fields[name]) for name in fields)


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
    """The attribute of the model's attention that holds its output projection."""
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
            # The bridge's projection, whose hooks see its input ``z``.
            undo.callback(original._modules.__setitem__, name, original._modules[name])
            original._modules[name] = output
        undo.enter_context(running(own))
        yield
