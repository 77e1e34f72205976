"""Networks with modules of a user's classes, whose code may do anything.

The modules of transformers are known: TransformerLens runs attention by code of its own, and
prompts in a batch do not see each other. A user's attention may have a window that TransformerLens
does not know, and a user's MLP may hold so many tokens and no more. Such faults begin at some size,
so they are looked for at the size of each call.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from lensclust.errors import InputError
from lensclust.models.added_code import added_code
from lensclust.models.agreement import (
    Size,
    SizedCheck,
    power_of_two,
    relative_error,
    remembered,
    rounding_tolerance,
)
from lensclust.models.batching import few_tokens, without_cache
from lensclust.models.blocks import hooked_points, unhooked
from lensclust.models.network_settings import is_of_user
from lensclust.models.wrapping import followed_network

# Packages whose modules take the place of single layers: adapters and quantised weights.
_LAYERS = {
    *("lensclust", "peft", "bitsandbytes", "torchao", "optimum", "auto_gptq", "gptqmodel", "awq"),
    *("hqq", "compressed_tensors"),
}


@cache
def _is_own(kind: type) -> bool:
    return is_of_user(kind) and kind.__module__.partition(".")[0] not in _LAYERS


def own_classes(network: nn.Module) -> list[str]:
    """Names of the classes of a network's modules that are none of a library's.

    >>> Gate = type("Gate", (nn.ReLU,), {"__module__": "mine"})
    >>> own_classes(nn.Sequential(nn.Linear(1, 1), Gate()))
    ['Gate']
    """
    kinds = {type(module) for module in network.modules()}
    return sorted(kind.__qualname__ for kind in kinds if _is_own(kind))


def sees_whole_prompts(model: Any) -> str | None:
    """The first class of a user's that is attention, or contains it; None if there is none."""
    attention = {
        id(getattr(getattr(block, "attn", None), "original_component", None))
        for block in getattr(model, "blocks", ())
    }
    for module in model.original_model.modules():
        if _is_own(type(module)) and any(id(each) in attention for each in module.modules()):
            return type(module).__qualname__
    return None


def require_own_code_right(
    model: TransformerBridge, *, longest: int, tokens: int, caller: str
) -> None:
    """Refuse a network whose own code makes states wrong at the size of a call.

    Test prompts of that size (rounded up) are run: the last one of a batch must have the states
    that it has alone, and there the logits of the network itself.

    Args:
        longest: tokens of the longest prompt.
        tokens: of a forward, padding included.

    Raises:
        InputError: names the classes, the size and the difference.
    """
    if not (kinds := own_classes(model.original_model)):
        return
    context = model.cfg.n_ctx or longest
    length = min(power_of_two(longest), context)
    check: SizedCheck = remembered(model, "own code", SizedCheck)
    why_not = check.reason(
        (longest, tokens),
        larger=(length, power_of_two(max(tokens, length))),
        find=lambda size: _fault(model, size),
    )
    if why_not is not None:
        raise InputError(
            f"{caller}: {model.cfg.model_name} has modules of your own ({', '.join(kinds[:3])}), "
            f"and at {longest} tokens, {tokens} in a batch, {why_not}"
        )


@torch.no_grad()
def _fault(model: TransformerBridge, size: Size) -> str | None:
    longest, tokens = size
    rows = few_tokens(model, longest, rows=max(2, tokens // longest))
    network: Any = model.original_model
    kind = next(network.parameters()).dtype
    with unhooked(model):
        try:
            together, alone = _last_states(model, rows), _last_states(model, rows[-1:])
            logits = network(rows[-1:], **without_cache(model)).logits[0].float()
        except Exception as error:  # a network's code may raise anything
            return f"a forward fails ({(str(error) or repr(error)).splitlines()[0]})"
        error = max(relative_error(together[name], alone[name]) for name in alone)
        if error > rounding_tolerance(kind):
            return (
                f"a prompt has other states in a batch than alone (relative difference {error:.2g})"
            )
        own = followed_network(model)
        if own is None or hooked_points(model) or added_code(network):
            return None
        error = relative_error(logits, own(rows[-1:], use_cache=False).logits[0].float())
    if error > rounding_tolerance(kind):
        return (
            "TransformerLens gives other logits than the network itself (relative difference "
            f"{error:.2g}): it runs attention by its own code, not by that of your class"
        )
    return None


class _LastBlock(Exception):
    """Raised inside a hook: nothing behind the last block is needed."""


def _last_states(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Every layer's states of the last prompt."""
    found: dict[str, Tensor] = {}
    names = [f"blocks.{block}.hook_resid_post" for block in range(model.cfg.n_layers)]
    names = [name for name in names if name in model.hook_dict]

    def keep(value: Tensor, hook: Any) -> None:
        found[hook.name] = value[-1].detach().float()
        if len(found) == len(names):
            raise _LastBlock

    with model.hooks(fwd_hooks=[(name, keep) for name in names]), suppress(_LastBlock):
        model.original_model(tokens, **without_cache(model))
    return found
