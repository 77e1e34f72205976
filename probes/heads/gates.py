"""Gates on heads: one multiplier per prompt and head, 1 by default.

A head's output is ``z_q = sum_k A_qk v_k``, so with the gate g in front of it

    dL/dg = sum_q <z_q, dL/dz_q> = sum_qk A_qk dL/dA_qk

the attention matrix times its gradient, summed. No attention matrix is needed, and one backward
to ``prompt x block x head`` numbers gives all of them, with grouped keys and any mask.

Source: Michel, Levy & Neubig (arXiv 1905.10650), equation 2, for the gate; the second equality
holds where z is linear in A, and is checked once per model: a norm over heads before
``hook_z`` (BitNet) breaks it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import reduce
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from lensclust.errors import InputError
from lensclust.inference import scored_logits
from lensclust.models import Site, blocks_of, head_blocks, hook_name, model_name, remembered

# From logits at the scored positions and the row of each to one loss per row.
RowLosses = Callable[[Float[Tensor, "place vocab"], Int[Tensor, " place"]], Float[Tensor, " row"]]
Gates = Sequence[Float[Tensor, "row head"]]

# The check moves all gates such that the loss should change by this many nats each way (or by this
# many rounding errors, where these are large), and by at most this share of a gate; where that
# crosses a kink of the network or routes a token to other experts, by less. The result may differ
# from the gradient by this share plus some rounding errors, of which the change must be a multiple.
CHANGE, CHANGE_ROUNDING, FARTHEST, TOLERANCE, ROUNDING = 0.05, 32, 0.05, 0.05, 8
STEPS, LEAST = (1.0, 1 / 8, 1 / 64), 4
# Tolerance between the gates' gradients and attention times its gradient, in single and in half
# precision: where z is not linear in attention, the two are unrelated.
DEFINITION, DEFINITION_HALF = 1e-2, 0.05


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
        scored: positions of logits.
        losses: of each row alone, so that the gradient of their sum separates by row.

    Raises:
        InputError: if no block has heads, or the loss does not depend on the gates of a block.

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
    for block, slope in zip(head_blocks(model), slopes, strict=True):
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
    """Loss of every row with each head's output times its gate (one tensor per block).

    Products are taken in the precision of the gates, so that gradients of half-precision models
    add up in float32.
    """
    blocks = head_blocks(model)
    hooks = [(_hook(model, b), _times(gate)) for b, gate in zip(blocks, gates, strict=True)]
    return _losses(model, tokens, scored, losses, hooks)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Disable the gradients of all parameters inside the block, and restore them after."""
    asked = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        for weight in asked:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in asked:
            weight.requires_grad_(True)


def require_attention_times_gradient(
    model: TransformerBridge,
    tokens: Int[Tensor, "2 length"],
    scored: Bool[Tensor, "2 length"],
    losses: RowLosses,
) -> None:
    """Check once per model that gate gradients equal attention times its gradient.

    They differ where ``hook_z`` is not a sum over attended tokens.

    Args:
        tokens, scored, losses: as in `gate_gradients`, with eager attention.

    Raises:
        InputError: if they differ, or attention or its gradient cannot be read.
    """

    def check() -> bool:
        found = gate_gradients(model, tokens, scored, losses)[1].double()
        expected = _attention_times_gradient(model, tokens, scored, losses)
        size = float(expected.norm())
        if not size > 0:  # a loss without a gradient, or a NaN: undecided
            raise _Undecided
        error = float((found - expected).norm()) / size
        half = any(torch.finfo(kind).bits < 32 for kind in _kinds(model))
        if not error <= (DEFINITION_HALF if half else DEFINITION):
            raise InputError(
                f"head gates: the heads of {model_name(model)} cannot be gated: a gate's gradient "
                f"is not attention times its gradient (relative difference {error:.2g}), as where "
                "hook_z lies behind a norm"
            )
        return True

    with suppress(_Undecided):
        remembered(model, "attention times gradient", check)


def require_reach(
    model: TransformerBridge,
    tokens: Int[Tensor, "2 length"],
    scored: Bool[Tensor, "2 length"],
    losses: RowLosses,
    *,
    path: Hashable = None,
) -> None:
    """Check once per model that the loss changes with the gates as their gradient predicts.

    For one prompt, given twice, all gates are moved along the signs of the gradient and against
    them, by decreasing steps until the two agree. The loss does not change if attention is
    delegated to code that fires hooks beside the computation, and changes otherwise for weights
    whose code has a wrong backward (some quantised ones).

    Args:
        tokens, scored, losses: as in `gate_gradients`.
        path: the attention code in use; each is checked.

    Raises:
        InputError: if the loss changes by less or more than it should at every step.
    """

    def check() -> bool:
        found, slopes = gate_gradients(model, tokens, scored, losses)
        steepness = float(slopes[0].abs().sum())
        if not (torch.isfinite(found).all() and steepness > 0):
            raise _Undecided
        rounding = max(torch.finfo(kind).eps for kind in _kinds(model))
        noise = ROUNDING * rounding * max(1.0, float(found[0].abs()))
        whole = min(FARTHEST, max(CHANGE, CHANGE_ROUNDING * rounding) / steepness)
        changes = []
        for step in (share * whole for share in STEPS):
            expected = 2 * step * steepness
            if changes and expected < LEAST * noise:
                break
            away = step * slopes[0].sign()
            gates = torch.stack([1 + away, 1 - away]).unbind(1)
            with torch.no_grad():
                ahead, behind = gated_losses(model, tokens, scored, losses, gates)
            changes.append((float(ahead - behind), expected))
            if abs(changes[-1][0] - expected) <= TOLERANCE * expected + noise:
                return True
        changed, expected = changes[-1]
        raise InputError(
            f"head gates: the gradient of {model_name(model)} is not that of its loss: gates "
            f"moved along it change the loss by {changed:.3g}, expected {expected:.3g}; is its "
            "attention or its quantised arithmetic without a backward?"
        )

    with suppress(_Undecided):
        remembered(model, ("head gates", path), check)


class _Undecided(Exception):
    """Raised where a prompt cannot decide a check, so that the next one is used."""


def _losses(
    model: TransformerBridge,
    tokens: Int[Tensor, "row length"],
    scored: Bool[Tensor, "row length"],
    losses: RowLosses,
    hooks: Sequence[tuple[str, Callable[[Tensor, Any], Tensor | None]]],
) -> Float[Tensor, " row"]:
    with model.hooks(fwd_hooks=list(hooks)):
        logits = scored_logits(model, tokens, scored)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return losses(logits, scored.nonzero()[:, 0].to(logits.device))


def _attention_times_gradient(
    model: TransformerBridge,
    tokens: Int[Tensor, "row length"],
    scored: Bool[Tensor, "row length"],
    losses: RowLosses,
) -> Float[Tensor, "row block head"]:
    """``sum_qk A dL/dA`` of each head, from attention matrices."""
    blocks, patterns = head_blocks(model), {}

    def enter(states: Tensor, hook: Any) -> Tensor:
        return states.detach().requires_grad_()

    def keep(block: int) -> Callable[[Tensor, Any], None]:
        def hook(pattern: Tensor, hook: Any) -> None:
            patterns[block] = pattern

        return hook

    hooks = [(hook_name(model, Site("resid", 0)), enter)]
    hooks += [(f"blocks.{block}.attn.hook_pattern", keep(block)) for block in blocks]
    with torch.inference_mode(False), torch.enable_grad(), frozen(model):
        loss = _losses(model, tokens, scored, losses, hooks).sum()
        if silent := [block for block in blocks if block not in patterns]:
            raise InputError(
                f"head gates: block {silent[0]} of {model_name(model)} shows no attention pattern "
                "to check its gates with; load the model with eager attention"
            )
        if not loss.requires_grad:
            raise _Undecided
        read = [patterns[block] for block in blocks]
        slopes = torch.autograd.grad(loss, read, allow_unused=True)
    if (unused := next((i for i, slope in enumerate(slopes) if slope is None), None)) is not None:
        raise InputError(
            f"head gates: the loss of {model_name(model)} does not depend on the attention pattern "
            f"that block {blocks[unused]} shows; load the model with eager attention"
        )
    parts = [
        (pattern.detach().double() * slope.double()).sum((-1, -2)).to(tokens.device)
        for pattern, slope in zip(read, slopes, strict=True)
        if slope is not None
    ]
    return torch.stack(parts, dim=1)


def _open(model: TransformerBridge, rows: int) -> list[Float[Tensor, "row head"]]:
    dtype = reduce(torch.promote_types, _kinds(model), torch.float32)
    blocks = blocks_of(model)
    counts = {block: blocks[block].heads for block in head_blocks(model)}
    if len({*counts.values()}) > 1:
        raise InputError(
            f"head gates: blocks of {model_name(model)} differ in their number of heads, expected "
            f"as many in each: block -> heads {counts}"
        )
    with torch.inference_mode(False):
        return [
            torch.ones((rows, heads), dtype=dtype, device=model.cfg.device)
            for heads in counts.values()
        ]


def _kinds(model: nn.Module) -> set[torch.dtype]:
    """Floating-point types of a model's parameters."""
    found = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
    return found or {torch.float32}


def _times(gate: Float[Tensor, "row head"]) -> Callable[[Tensor, Any], Tensor]:
    def hook(value: Tensor, hook: Any) -> Tensor:
        factor = gate[:, None, :, None].to(value.device)
        return (value.to(gate.dtype) * factor).to(value.dtype)

    return hook


def _hook(model: TransformerBridge, block: int) -> str:
    return hook_name(model, Site("z", block, 0))
