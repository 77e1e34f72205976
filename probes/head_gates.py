"""A gate on every head: one multiplier a prompt and head, 1 unless said otherwise.

A head's output is ``z_q = sum_k A_qk v_k``, so with the gate g in front of it

    dL/dg = sum_q <z_q, dL/dz_q> = sum_qk A_qk dL/dA_qk

the attention matrix times its gradient, summed. No attention matrix is asked for, and one
backward to ``prompt x block x head`` numbers gives all of them, with grouped keys and any mask.

Source: Michel, Levy & Neubig (arXiv 1905.10650), equation 2, for the gate; the second equality
holds because z is linear in A.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from lensclust.agreement import remembered
from lensclust.errors import InputError
from lensclust.partial_forwards import scored_logits
from lensclust.sites import Site, hook_name, model_name

# From logits at the scored places, row by row, and the row of each to one loss a row.
RowLosses = Callable[[Float[Tensor, "place vocab"], Int[Tensor, " place"]], Float[Tensor, " row"]]
Gates = Sequence[Float[Tensor, "row head"]]

# The check moves all gates by so much that the loss should change by this many nats each way (or
# by so many rounding errors, where these are large), and by this share of a gate at most. What it
# finds may differ from the gradient by this share, and by some rounding errors.
CHANGE, CHANGE_ROUNDING, FARTHEST, TOLERANCE, ROUNDING = 0.05, 32, 0.05, 0.05, 8


def gate_gradients(
    model: TransformerBridge,
    tokens: Int[Tensor, "row length"],
    scored: Bool[Tensor, "row length"],
    losses: RowLosses,
) -> tuple[Float[Tensor, " row"], Float[Tensor, "row block head"]]:
    """Loss of every row and its gradient with respect to the gates, all at 1.

    Args:
        model: a hooked model in eval mode; no parameter needs a gradient, nor gets one.
        tokens: sequences padded on the right.
        scored: where logits are made.
        losses: of each row alone, so that the gradient of their sum is each row's own.

    Raises:
        InputError: if the gates of a block are no part of what the loss was computed from.

    >>> import lensclust as lc
    >>> model, tokens = lc.load("native:sif-small"), torch.tensor([[5, 6, 7], [8, 9, 0]])
    >>> scored = torch.tensor([[False, False, True], [False, True, False]])
    >>> found, gradients = gate_gradients(model, tokens, scored, lambda logits, _: -logits[:, 3])
    >>> found.shape, gradients.shape
    (torch.Size([2]), torch.Size([2, 6, 4]))
    """
    gates = [gate.requires_grad_() for gate in _open(model, len(tokens))]
    with torch.inference_mode(False), torch.enable_grad(), frozen(model):
        found = gated_losses(model, tokens, scored, losses, gates)
        if not found.requires_grad:
            raise InputError(
                f"head gates: the loss of {model_name(model)} has no gradient: it was computed "
                "without its logits, or no gate on a head reaches them"
            )
        slopes = torch.autograd.grad(found.sum(), gates, allow_unused=True)
    for block, slope in enumerate(slopes):
        if slope is None:
            raise InputError(
                f"head gates: the gates of block {block} of {model_name(model)} do not reach the "
                f"loss: what is changed at {_hook(model, block)} is not what it goes on with, or "
                "what comes later has no backward, as some quantised weights have none"
            )
    gathered = [slope.to(tokens.device) for slope in slopes if slope is not None]
    return found.detach(), torch.stack(gathered, dim=1)


def gated_losses(
    model: TransformerBridge,
    tokens: Int[Tensor, "row length"],
    scored: Bool[Tensor, "row length"],
    losses: RowLosses,
    gates: Gates,
) -> Float[Tensor, " row"]:
    """Loss of every row with each head's output times its gate, a tensor of gates a block.

    Products are taken in the precision of the gates, so that gradients of half-precision models
    add up in float32.
    """
    hooks = [(_hook(model, block), _times(gate)) for block, gate in enumerate(gates)]
    with model.hooks(fwd_hooks=hooks):
        logits = scored_logits(model, tokens, scored)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return losses(logits, scored.nonzero()[:, 0].to(logits.device))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter of the model asks for a gradient; afterwards each does as before."""
    asked = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        for weight in asked:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in asked:
            weight.requires_grad_(True)


def require_reach(
    model: TransformerBridge,
    tokens: Int[Tensor, "2 length"],
    scored: Bool[Tensor, "2 length"],
    losses: RowLosses,
) -> None:
    """Refuse a model whose loss does not follow its gates as its gradient says; checked once.

    Of one prompt, given twice, all gates are moved along the signs of the gradient, and against
    them. Attention that is
    delegated to code which fires hooks beside the computation does not move the loss, and
    weights whose code has no right backward (some quantised ones) move it otherwise.

    Raises:
        InputError: if the loss changes by less or more than it should.
    """
    network: Any = model.original_model
    attention = getattr(getattr(network, "config", None), "_attn_implementation", None)
    # With the code that it attends with; a loss that no gate can move shows nothing.
    checked: set[Any] = remembered(model, "gradients of head gates", set)
    if (kind := (attention, *sorted(map(str, _kinds(model))))) in checked:
        return
    found, slopes = gate_gradients(model, tokens, scored, losses)
    steepness = float(slopes[0].abs().sum())
    if torch.isfinite(found).all() and steepness > 0:
        rounding = max(torch.finfo(kind).eps for kind in _kinds(model))
        step = min(FARTHEST, max(CHANGE, CHANGE_ROUNDING * rounding) / steepness)
        away = step * slopes[0].sign()
        gates = torch.stack([1 + away, 1 - away]).unbind(1)
        with torch.no_grad():
            ahead, behind = gated_losses(model, tokens, scored, losses, gates)
        changed, expected = float(ahead - behind), 2 * step * steepness
        allowed = TOLERANCE * expected + ROUNDING * rounding * max(1.0, float(found[0].abs()))
        if not abs(changed - expected) <= allowed:
            raise InputError(
                f"head gates: the gradient of {model_name(model)} is not that of its loss: gates "
                f"moved along it change the loss by {changed:.3g}, expected {expected:.3g}; is its "
                "attention or its quantised arithmetic without a backward of its own?"
            )
        checked.add(kind)


def _open(model: TransformerBridge, rows: int) -> list[Float[Tensor, "row head"]]:
    dtype = reduce(torch.promote_types, _kinds(model), torch.float32)
    shape = (rows, model.cfg.n_heads)
    with torch.inference_mode(False):
        return [
            torch.ones(shape, dtype=dtype, device=model.cfg.device)
            for _ in range(model.cfg.n_layers)
        ]


def _kinds(model: nn.Module) -> set[torch.dtype]:
    """In which precisions a model computes, as far as its parameters tell."""
    found = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
    return found or {torch.float32}


def _times(gate: Float[Tensor, "row head"]) -> Callable[[Tensor, Any], Tensor]:
    def hook(value: Tensor, hook: Any) -> Tensor:
        factor = gate[:, None, :, None].to(value.device)
        return (value.to(gate.dtype) * factor).to(value.dtype)

    return hook


def _hook(model: TransformerBridge, block: int) -> str:
    return hook_name(model, Site("z", block, 0))
