"""Keep the question from looking at some of what came before it, and read the answer.

Attention knockout: every token from a given one on is kept from attending to the hidden tokens,
in all heads of the chosen blocks, by a mask before the softmax. States of the hidden tokens
themselves, and what other tokens before the question took from them, stay; so does what blocks
without attention (convolutions, state-space layers) carry along. That tokens are out of sight is
checked once for each model and block (`probes.attention.knockout`). As evidence, hide as many other
tokens beside.

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

# Which key is hidden from which query.
Gone = Bool[Tensor, "row 1 query key"]
Hook = tuple[str, Callable[[Tensor, Any], Tensor]]

# The check runs so many tokens, hides the two before the last two, and puts noise in their place,
# so many times as large as what was there. What reads them must move by so many rounding errors
# without the mask, and by so few with it.
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
    """What ``readout`` makes of the last token's logits while some tokens are out of sight.

    Args:
        model: a hooked model, in eval mode.
        prompts: what to run.
        readout: as in `lensclust.inference.answers`.
        hidden: tokens that are not to be looked at.
        since: read position of the first token that does not see them.
        blocks: where; all that have attention unless given.
        batch_tokens: upper bound of the tokens that one forward runs; default that of `extract`.

    Raises:
        InputError: if the tokens have another shape, one that is hidden does not stand before
            ``since``, there is no such position or block, a block has no attention or none
            that tokens can be hidden from, or the prompts do not fit the model.

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
    """Unembed the last token of each row, as one sequence."""
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
    """Where tokens can be hidden in each block; tried once for each model.

    Raises:
        InputError: if a block has no attention, or none of the places hides anything there.

    >>> import lensclust as lc
    >>> hiding_places(lc.load("native:sif-small"), [0, 5], caller="f")
    {0: 'pattern', 5: 'pattern'}
    """
    kernel = attention_kernel(model)
    with unhooked(model), warnings.catch_warnings():
        # What is found out here, TransformerLens says of some of the hooks.
        warnings.filterwarnings("ignore", message="A hook on", category=UserWarning)
        found = remembered(model, ("hiding places", kernel), lambda: _tried(model))
    chosen = list(blocks)
    for block in chosen:
        if block not in found:
            raise InputError(
                f"{caller}: block {block} of {model_name(model)} has no attention, expected some "
                f"of {list(found)}"
            )
        if found[block] is None:
            raise InputError(
                f"{caller}: tokens cannot be hidden from the attention of block {block} of "
                f"{model_name(model)}: what stands at them changes what later tokens take up, "
                f"whether its {', '.join(PLACES)} or none of them is changed"
            )
    return {block: place for block in chosen if (place := found[block]) is not None}


@contextmanager
def hidden_from(
    model: TransformerLensModel, places: Mapping[int, str], gone: Mapping[int, Gone]
) -> Iterator[None]:
    """Inside, attention of these blocks does not see some tokens.

    Args:
        places: where to hide them, by block (`hiding_places`).
        gone: which key is hidden from which query, by block.
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
    """What a network adds to its scores, or which keys it keeps, without those that are gone."""
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
    """Of every block with attention, the first place that hides tokens; None where none does."""
    check = _Check(model)
    found: dict[int, str | None] = dict.fromkeys(attention_blocks(model))
    for place in PLACES:
        left = [block for block, known in found.items() if known is None]
        if left:
            found |= dict.fromkeys(check.hidden_one_by_one(left, place), place)
    # Blocks that take keys and values from earlier ones see none of what enters them alone.
    for place in PLACES:
        known = {block: place if at is None else at for block, at in found.items()}
        left = [block for block, at in found.items() if at is None]
        if left:
            found |= dict.fromkeys(check.hidden_everywhere(left, known), place)
    return found


class _Check:
    """A few tokens, two of them hidden from the last two, with and without noise in their place."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.tokens = few_tokens(model, LENGTH)
        length = self.tokens.shape[1]
        self.since = max(1, length - 2)
        place = torch.arange(length, device=self.tokens.device)
        self.hidden = (place < self.since) & (place >= self.since - 2)
        self.gone = ((place >= self.since)[:, None] & self.hidden)[None, None]

    def hidden_one_by_one(self, blocks: Sequence[int], place: str) -> list[int]:
        """The blocks in which tokens are hidden there, each tried in a row of its own."""
        rows = {block: row for row, block in enumerate(blocks)}
        row = torch.arange(len(rows), device=self.tokens.device)[:, None, None, None]
        gone = {block: self.gone & (row == own) for block, own in rows.items()}
        try:
            return self._hidden(rows, dict.fromkeys(blocks, place), gone, dict(rows))
        except Exception:  # whatever the network's own code makes of a place that it does not have
            if len(blocks) == 1:
                return []
            return [b for block in blocks for b in self.hidden_one_by_one([block], place)]

    def hidden_everywhere(self, blocks: Sequence[int], places: Mapping[int, str]) -> list[int]:
        """Those of the blocks in which tokens are hidden, if they are in all others too."""
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
        """Which blocks hide tokens: noise at these moves what reads them, but not if hidden.

        Args:
            rows: where each block is read.
            noisy: in which row noise enters which block.
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
        """What each block's attention gives, in its row."""
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
