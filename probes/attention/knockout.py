"""Attention knockout: hide tokens from later ones in chosen blocks and read the answer.

A mask before the softmax keeps every token from a given one on from attending to the hidden tokens,
in all heads of the chosen blocks. States of the hidden tokens, and information that earlier tokens
took from them, remain; so does information that blocks without attention (convolutions, state-space
layers) carry. That the mask works is checked once per model and block
(`probes.attention.knockout`). As a control, hide as many other tokens.

Source: attention knock-out, Geva et al. 2023 (arXiv 2304.14767).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.errors import InputError
from lensclust.inference import Readout, one_a_row, require_fits
from lensclust.models import (
    BLOCK_HOOKS,
    Site,
    agrees,
    attention_kernel,
    batches,
    blocks_of,
    default_budget,
    few_tokens,
    hook_name,
    model_device,
    model_name,
    relative_error,
    remembered,
    unhooked,
    without_cache,
)
from lensclust.prompts import Prompts

# Mask of the keys hidden from each query.
Gone = Bool[Tensor, "row 1 query key"]
Hook = tuple[str, Callable[[Tensor, Any], Tensor]]

# The check runs this many tokens, hides the two before the last two and replaces them by noise,
# this many times as large. Without the mask later tokens must change by at least the first number
# of rounding errors, with it by at most the second.
LENGTH, NOISE, MOVED, STILL = 7, 4.0, 32, 8


def answers_cut_off(
    model: TransformerLensModel,
    prompts: Prompts,
    readout: Readout,
    hidden: Bool[Tensor, "prompt position"],
    *,
    since: str = "query_start",
    blocks: int | Sequence[int] | None = None,
    batch_tokens: int | None = None,
) -> Tensor:
    """Readout of the last token's logits under attention knockout of some tokens.

    Args:
        model: a hooked model, in eval mode.
        prompts: prompts to run.
        readout: as in `lensclust.inference.answers`.
        hidden: mask of the tokens to hide.
        since: read position of the first token they are hidden from.
        blocks: blocks of the knockout; default all with attention.
        batch_tokens: upper bound of the tokens that one forward runs; default that of `extract`.

    Raises:
        InputError: if the mask has another shape, a hidden token is not before ``since``, a
            position or block does not exist, a block has no attention or none that tokens can be
            hidden from, or the prompts are incompatible with the model.

    >>> import lensclust as lc
    >>> model, prompts = lc.load("native:sif-small"), lc.tasks.sif().where(split="new_string")
    >>> hidden = torch.zeros_like(prompts.tokens, dtype=torch.bool)
    >>> cuts = []
    >>> for seen in (True, False):
    ...     hidden[:, 0] = not seen
    ...     cuts += [answers_cut_off(model, prompts, lambda x, _: x, hidden, since="answer")]
    >>> bool((cuts[0] - cuts[1]).abs().max() > 1e-3)
    True
    """
    require_fits(model, prompts, caller="answers_cut_off")
    begin = prompts.position(since)
    hidden = torch.as_tensor(hidden)
    if hidden.dtype != torch.bool:
        raise InputError(
            f"answers_cut_off: hidden tokens of type {hidden.dtype}, expected a mask of "
            "true and false"
        )
    if hidden.shape != prompts.tokens.shape:
        raise InputError(
            f"answers_cut_off: hidden tokens of shape {tuple(hidden.shape)}, expected "
            f"{tuple(prompts.tokens.shape)} as of the prompts"
        )
    late = (hidden & (torch.arange(hidden.shape[1]) >= begin[:, None])).nonzero()
    if len(late):
        row, place = late[0].tolist()
        raise InputError(
            f"answers_cut_off: token {place} of prompt {row} is hidden, expected tokens before "
            f"{since!r}, which is {int(begin[row])}"
        )
    given = [blocks] if isinstance(blocks, int) else blocks
    chosen = attention_blocks(model) if given is None else list(given)
    if unknown := [block for block in chosen if not 0 <= block < model.cfg.n_layers]:
        raise InputError(
            f"answers_cut_off: block {unknown[0]} does not exist: {model_name(model)} has blocks "
            f"0..{model.cfg.n_layers - 1}"
        )
    if blocks is None and not chosen:
        raise InputError(
            f"answers_cut_off: {model_name(model)} has no block whose attention can be reached"
        )
    places = hiding_places(model, chosen, caller="answers_cut_off")
    hooked: Any = model
    device = model_device(model)
    parts, order = [], []
    with torch.no_grad():
        for rows in batches(model, prompts.lengths, batch_tokens or default_budget(model)):
            last = prompts.lengths[rows] - 1
            width = int(last.max()) + 1
            looks = torch.arange(width) >= begin[rows][:, None]
            gone = (looks[:, :, None] & hidden[rows, None, :width])[:, None].to(device)
            with hidden_from(model, places, dict.fromkeys(places, gone)):
                logits = hooked.run_with_hooks(
                    prompts.tokens[rows, :width].to(device),
                    fwd_hooks=[_only_last(last)],
                    return_type="logits",
                    **without_cache(model),
                )[0]
            parts.append(one_a_row(readout(logits.float(), rows), rows).cpu())
            order.append(rows)
    return torch.cat(parts)[torch.cat(order).argsort()]


def _only_last(last: Int[Tensor, " row"]) -> tuple[str, Callable[[Tensor, Any], Tensor]]:
    """Hook that unembeds the last token of each row, as one sequence."""
    row = torch.arange(len(last))
    return "unembed.hook_in", lambda states, hook: states[
        row.to(states.device), last.to(states.device)
    ][None]


def attention_blocks(model: TransformerLensModel) -> list[int]:
    """The blocks of a model that have attention.

    >>> import lensclust as lc
    >>> attention_blocks(lc.load("native:sif-small"))
    [0, 1, 2, 3, 4, 5]
    """
    hooks: Any = getattr(model, "hook_dict")  # noqa: B009 - outside the protocol
    blocks = range(model.cfg.n_layers)
    return [block for block in blocks if f"blocks.{block}.attn.hook_pattern" in hooks]


def hiding_places(
    model: TransformerLensModel, blocks: Iterable[int], *, caller: str
) -> dict[int, str]:
    """Hook point at which tokens can be hidden in each block, checked once per model.

    Raises:
        InputError: if a block has no attention, or no hook point hides tokens there.

    >>> import lensclust as lc
    >>> hiding_places(lc.load("native:sif-small"), [0, 5], caller="f")
    {0: 'pattern', 5: 'pattern'}
    """
    kernel = attention_kernel(model)
    with unhooked(model), warnings.catch_warnings():
        # The check finds out what TransformerLens warns about for some of the hooks.
        warnings.filterwarnings("ignore", message="A hook on", category=UserWarning)
        found = remembered(model, ("hiding places", kernel), lambda: _tried(model))
    chosen = list(blocks)
    for block in chosen:
        if block not in found:
            raise InputError(
                f"{caller}: block {block} of {model_name(model)} has no attention, expected some "
                f"of {list(found)}"
            )
        if reason := blocks_of(model)[block].refused.get("pattern"):
            raise InputError(f"{caller}: attention of block {block} cannot be cut: {reason}")
        if found[block] is None:
            raise InputError(
                f"{caller}: tokens cannot be hidden from the attention of block {block} of "
                f"{model_name(model)}: hidden tokens still change later ones, whichever of its "
                f"{', '.join(PLACES)} is edited"
            )
    return {block: place for block in chosen if (place := found[block]) is not None}


@contextmanager
def hidden_from(
    model: TransformerLensModel, places: Mapping[int, str], gone: Mapping[int, Gone]
) -> Iterator[None]:
    """Hide tokens from the attention of these blocks inside the context.

    Args:
        places: hook points, by block (`hiding_places`).
        gone: mask of the keys hidden from each query, by block.
    """
    hooked: Any = model
    with ExitStack() as stack:
        for block, place in places.items():
            stack.enter_context(PLACES[place](hooked, block, gone[block]))
        yield


# -- places -------------------------------------------------------------------------------


def _at_scores(model: Any, block: int, gone: Gone) -> Any:
    def hide(scores: Float[Tensor, "row head query key"], hook: Any) -> Tensor:
        return scores.masked_fill(gone.to(scores.device), torch.finfo(scores.dtype).min)

    return model.hooks(fwd_hooks=[(f"blocks.{block}.attn.hook_attn_scores", hide)])


def _at_pattern(model: Any, block: int, gone: Gone) -> Any:
    def hide(pattern: Float[Tensor, "row head query key"], hook: Any) -> Tensor:
        left = pattern.masked_fill(gone.to(pattern.device), 0)
        return left / left.sum(-1, keepdim=True).clamp(min=torch.finfo(left.dtype).tiny)

    return model.hooks(fwd_hooks=[(f"blocks.{block}.attn.hook_pattern", hide)])


@contextmanager
def _at_mask(model: Any, block: int, gone: Gone) -> Iterator[None]:
    attention = model.blocks[block].attn
    network: Any = getattr(attention, "original_component", None)
    given = list(inspect.signature(network.forward).parameters) if network is not None else []
    if "attention_mask" not in given:
        raise InputError(f"block {block} takes no attention mask")
    place = given.index("attention_mask")

    def hide(_part: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        states = named.get("hidden_states", args[0] if args else None)
        if place < len(args):
            masked = _masked(args[place], gone, states)
            return (*args[:place], masked, *args[place + 1 :]), named
        return args, {**named, "attention_mask": _masked(named.get("attention_mask"), gone, states)}

    handle = attention.register_forward_pre_hook(hide, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _masked(mask: Tensor | None, gone: Gone, states: Any) -> Tensor:
    """A network's additive or boolean attention mask, with the hidden keys masked."""
    gone = gone.to(states.device)
    if mask is None:  # its kernel is causal without one
        mask = torch.ones(gone.shape[-2:], dtype=torch.bool, device=gone.device).tril()
        mask = torch.zeros_like(mask, dtype=states.dtype).masked_fill(
            ~mask, torch.finfo(states.dtype).min
        )
    if mask.shape[-2:] != gone.shape[-2:]:
        raise InputError(f"mask of shape {tuple(mask.shape)}, expected {tuple(gone.shape)}")
    if mask.dtype == torch.bool:
        return mask & ~gone
    return mask.masked_fill(gone, torch.finfo(mask.dtype).min)


PLACES: dict[str, Callable[[Any, int, Gone], Any]] = {
    "scores": _at_scores,
    "pattern": _at_pattern,
    "mask": _at_mask,
}


# -- the check ----------------------------------------------------------------------------


@torch.no_grad()
def _tried(model: TransformerLensModel) -> dict[int, str | None]:
    """The first hook point that hides tokens in each block with attention, or None."""
    check = _Check(model)
    found: dict[int, str | None] = dict.fromkeys(attention_blocks(model))
    for place in PLACES:
        left = [block for block, known in found.items() if known is None]
        if left:
            found |= dict.fromkeys(check.hidden_one_by_one(left, place), place)
    # Blocks that share keys and values with earlier ones do not read their own input.
    for place in PLACES:
        known = {block: place if at is None else at for block, at in found.items()}
        left = [block for block, at in found.items() if at is None]
        if left:
            found |= dict.fromkeys(check.hidden_everywhere(left, known), place)
    return found


class _Check:
    """The self-check: a few tokens, two hidden from the last two, with and without noise."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.tokens = few_tokens(model, LENGTH)
        length = self.tokens.shape[1]
        self.since = max(1, length - 2)
        place = torch.arange(length, device=self.tokens.device)
        self.hidden = (place < self.since) & (place >= self.since - 2)
        self.gone = ((place >= self.since)[:, None] & self.hidden)[None, None]

    def hidden_one_by_one(self, blocks: Sequence[int], place: str) -> list[int]:
        """Blocks in which this hook point hides tokens, each checked in a separate row."""
        rows = {block: row for row, block in enumerate(blocks)}
        row = torch.arange(len(rows), device=self.tokens.device)[:, None, None, None]
        gone = {block: self.gone & (row == own) for block, own in rows.items()}
        try:
            return self._hidden(rows, dict.fromkeys(blocks, place), gone, dict(rows))
        except Exception:  # a network may raise anything for a hook point it lacks
            if len(blocks) == 1:
                return []
            return [b for block in blocks for b in self.hidden_one_by_one([block], place)]

    def hidden_everywhere(self, blocks: Sequence[int], places: Mapping[int, str]) -> list[int]:
        """Blocks in which tokens are hidden while they are hidden in all others, too."""
        try:
            return self._hidden(
                dict.fromkeys(blocks, 0), places, dict.fromkeys(places, self.gone), {0: 0}
            )
        except Exception:  # as above
            return []

    def _hidden(
        self,
        rows: Mapping[int, int],
        places: Mapping[int, str],
        gone: Mapping[int, Gone],
        noisy: Mapping[int, int],
    ) -> list[int]:
        """Blocks that hide tokens: noise there changes later tokens, but not if hidden.

        Args:
            rows: row in which each block is read.
            noisy: row -> block that the noise enters.
        """
        plain, moved = self._read(rows, {}), self._read(rows, noisy)
        with hidden_from(self.model, places, gone):
            cut, still = self._read(rows, {}), self._read(rows, noisy)
        ok = []
        for block in rows:
            before, after = slice(None, self.since), slice(self.since, None)
            rounding = torch.finfo(plain[block].dtype).eps
            sees = relative_error(moved[block][after], plain[block][after]) > MOVED * rounding
            blind = relative_error(still[block][after], cut[block][after]) < STILL * rounding
            if sees and blind and agrees(cut[block][before], plain[block][before]):
                ok.append(block)
        return ok

    def _read(self, rows: Mapping[int, int], noisy: Mapping[int, int]) -> dict[int, Tensor]:
        """Output of each block's attention, in its row."""
        found: dict[int, Tensor] = {}

        def disturb(row: int) -> Callable[[Tensor, Any], Tensor]:
            def hook(states: Tensor, hook: Any) -> Tensor:
                states, hidden = states.clone(), self.hidden.to(states.device)
                there = states[row, hidden]
                generator = torch.Generator().manual_seed(row)
                added = torch.randn(there.shape, generator=generator).to(there)
                states[row, hidden] = there + NOISE * there.float().std().to(there) * added
                return states

            return hook

        def keep(block: int) -> Callable[[Tensor, Any], None]:
            def hook(states: Tensor, hook: Any) -> None:
                found[block] = states[rows[block]].flatten(1)

            return hook

        def reads(block: int) -> str:
            z = BLOCK_HOOKS["z"].format(block)
            return z if z in self.model.hook_dict else BLOCK_HOOKS["attn_out"].format(block)

        hooks: list[tuple[str, Any]] = [(reads(block), keep(block)) for block in rows]
        for block, row in noisy.items():
            hooks.append((hook_name(self.model, Site("resid", block)), disturb(row)))
        self.model.run_with_hooks(
            self.tokens.repeat(max(rows.values()) + 1, 1),
            fwd_hooks=hooks,
            return_type=None,
            **without_cache(self.model),
        )
        return found
