"""Run the tokens before an edited one once, and only the rest for every edit.

A causal model's states before a position do not depend on edits there. So the columns
before the cut are the same for every edit of a prompt:

- `packed`: one sequence holds a copy of the suffix for each edit, all continuing one prefix
  (`lensclust.inference.prefix_sharing.forwards`). Hugging Face models take the prefix from a
  key/value cache that is filled once. TransformerLens' native models have none: every sequence
  runs the prefix again, so an edit costs its suffix and ``1 / copies`` of the prefix.
- `stacked`: any other model. Every edit runs its whole prompt; nothing is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge.sources.native import NativeModel
from transformer_lens.model_protocol import TransformerLensModel
from transformers import PreTrainedModel

from lensclust.inference.prefix_sharing import PackedBatch, PackedForwards, visible
from lensclust.models import model_device, without_cache
from lensclust.prompts import Prompts
from probes.patching.edits import Edit, EditHooks

# Logits held at once, in numbers.
LOGITS = 2**26
# Maximum length of the copies: beyond it, scores between copies cost what sharing saves.
PACKED_TOKENS = 256


@dataclass(frozen=True)
class Batch:
    """Right-padded prompts, each cut into a prefix common to all edits and a suffix.

    Attributes:
        rows: indices of the prompts.
        tokens, lengths: token ids, and their number without padding.
        positions: the edited token of each prompt.
        cuts: number of tokens of the prefix.
    """

    rows: Int[Tensor, " prompt"]
    tokens: Int[Tensor, "prompt token"]
    lengths: Int[Tensor, " prompt"]
    positions: Int[Tensor, " prompt"]
    cuts: Int[Tensor, " prompt"]

    @classmethod
    def of(cls, prompts: Prompts, rows: Tensor, positions: Tensor) -> Batch:
        """Make the batch of the prompts ``rows``, edited at ``positions`` (one per prompt)."""
        lengths, edited = prompts.lengths[rows], positions[rows]
        # The suffix has the length of the longest rest, which minimises padding.
        rest = int((lengths - edited).max())
        return cls(
            rows=rows,
            tokens=prompts.tokens[rows, : int(lengths.max())],
            lengths=lengths,
            positions=edited,
            cuts=(lengths - rest).clamp(min=0),
        )

    @property
    def width(self) -> int:
        return self.tokens.shape[1]

    @property
    def prefix(self) -> int:
        return int(self.cuts.max())

    @property
    def suffix(self) -> int:
        return int((self.lengths - self.cuts).max())


@dataclass(frozen=True)
class Prepared:
    """A batch with its prefix already run.

    Attributes:
        at_once: number of edits in one forward.
        run: from edits (None: unedited) to the logits of the last token.
    """

    at_once: int
    run: Callable[[Sequence[Edit | None]], Float[Tensor, "edit prompt vocab"]]


Way = Callable[[Any, Batch, int], Prepared]


def ways(model: TransformerLensModel, columns: int) -> tuple[Way, ...]:
    """Candidate ways for a model, the cheapest first; `stacked` always works.

    Args:
        columns: length of the longest prompt with two copies of its suffix: a native model runs
            no sequence longer than its context.
    """
    network = getattr(model, "original_model", None)
    if isinstance(network, NativeModel):
        fits = network.layers[0].attn.causal and columns <= model.cfg.n_ctx
        return (packed, stacked) if fits else (stacked,)
    return (packed, stacked) if isinstance(network, PreTrainedModel) else (stacked,)


def batch_width(model: Any, edits: int) -> Callable[[int, int], int]:
    """Columns of a prompt in a forward, from its width and that of its suffix."""
    room = min(model.cfg.n_ctx, PACKED_TOKENS)
    if not isinstance(getattr(model, "original_model", None), NativeModel):
        room = 0
    return lambda width, suffix: max(width, min(room, width + (edits - 1) * suffix))


def packed(model: Any, batch: Batch, budget: int) -> Prepared:
    """One sequence per prompt: its prefix, continued by one copy of the suffix per edit."""
    native = isinstance(model.original_model, NativeModel)
    n, suffix, prefix = len(batch.rows), batch.suffix, batch.prefix if native else 0
    forward = _native_forward(model) if native else _cached_forward(model, batch)

    def run(edits: Sequence[Edit | None]) -> Tensor:
        begins = prefix + suffix * torch.arange(len(edits))[:, None] - batch.cuts
        row = torch.arange(n).expand(len(edits), n)
        hooks = EditHooks(model, edits, batch.rows, row, begins + batch.positions)
        last = _only(row.T, (begins + batch.lengths - 1).T)
        logits = forward(_copies(batch, len(edits), cached=not native), [*hooks.pairs, last])
        hooks.require_fired()
        return logits.transpose(0, 1)

    most = min(model.cfg.n_ctx, PACKED_TOKENS) if native else PACKED_TOKENS
    room = min(budget // n, most) - prefix
    return Prepared(_at_once(model, room // suffix, n), run)


def stacked(model: Any, batch: Batch, budget: int) -> Prepared:
    """Whole prompts for every edit, padded on the right, without a mask."""
    n, device = len(batch.rows), model_device(model)

    def run(edits: Sequence[Edit | None]) -> Tensor:
        place = torch.arange(n * len(edits)).unflatten(0, (len(edits), n))
        hooks = EditHooks(model, edits, batch.rows, place, batch.positions.expand_as(place))
        logits = model.run_with_hooks(
            batch.tokens.repeat(len(edits), 1).to(device),
            fwd_hooks=hooks.pairs,
            return_type="logits",
            **without_cache(model),
        )
        hooks.require_fired()
        return logits[place, (batch.lengths - 1).expand_as(place)]

    return Prepared(_at_once(model, budget // (n * batch.width), n), run)


def _only(
    row: Int[Tensor, "prompt edit"], place: Int[Tensor, "prompt edit"]
) -> tuple[str, Callable[[Tensor, Any], Tensor]]:
    """Unembed these positions only."""
    return "unembed.hook_in", lambda states, hook: states[
        row.to(states.device), place.to(states.device)
    ]


def _cached_forward(model: Any, batch: Batch) -> Callable[[PackedBatch, Sequence[Any]], Tensor]:
    """Run the prefixes once, and then only their continuations."""
    forwards = PackedForwards(model)
    if batch.prefix:
        nothing = torch.empty((len(batch.rows), 0), dtype=torch.int64)
        forwards.run(_prefixes(batch), [_only(nothing, nothing)])
    return lambda copies, hooks: forwards.run(copies, hooks).logits


def _native_forward(model: Any) -> Callable[[PackedBatch, Sequence[Any]], Tensor]:
    device = model_device(model)

    def forward(copies: PackedBatch, hooks: Sequence[Any]) -> Tensor:
        copies = copies.to(device)
        with model.hooks(fwd_hooks=list(hooks)):
            return model.original_model(
                copies.tokens,
                attention_mask=~visible(copies, None),
                position_ids=copies.positions,
            )

    return forward


def _prefixes(batch: Batch) -> PackedBatch:
    """The prefixes, which later forwards continue."""
    tokens = _Tokens.of(batch.cuts * 0, batch.cuts)
    return _laid_out(batch, [tokens], [batch.prefix], cached=tokens.real.nonzero(), fresh=True)


def _copies(batch: Batch, copies: int, *, cached: bool) -> PackedBatch:
    """Copies of the suffix, after the prefix where that is not cached."""
    prefix, suffix = _Tokens.of(batch.cuts * 0, batch.cuts), _Tokens.of(batch.cuts, batch.lengths)
    if cached:
        numbers = (prefix.real.flatten().cumsum(0) - 1).view_as(prefix.real)
        ends = [batch.suffix * (copy + 1) for copy in range(copies)]
        return _laid_out(
            batch, [suffix] * copies, ends, past=numbers * prefix.real, past_lengths=batch.cuts
        )
    ends = [batch.prefix + batch.suffix * copy for copy in range(copies + 1)]
    # All copies see the prefix.
    return _laid_out(batch, [prefix, *[suffix] * copies], [ends[-1], *ends[1:]])


@dataclass(frozen=True)
class _Tokens:
    """Right-padded token indices of every prompt, and their mask."""

    index: Int[Tensor, "prompt token"]
    real: Bool[Tensor, "prompt token"]

    @classmethod
    def of(cls, begin: Int[Tensor, " prompt"], end: Int[Tensor, " prompt"]) -> _Tokens:
        index = begin[:, None] + torch.arange(int((end - begin).max()))
        return cls(index, index < end[:, None])


def _laid_out(
    batch: Batch, pieces: Sequence[_Tokens], ends: Sequence[int], **given: Any
) -> PackedBatch:
    """Concatenate pieces into one sequence; each is visible up to its end."""
    index = torch.cat([piece.index for piece in pieces], dim=1)
    real = torch.cat([piece.real for piece in pieces], dim=1)
    seen = torch.cat([piece.real * end for piece, end in zip(pieces, ends, strict=True)], dim=1)
    n = len(batch.rows)
    unless_given = {
        "past": torch.empty((n, 0), dtype=torch.int64),
        "past_lengths": torch.zeros(n, dtype=torch.int64),
        "cached": torch.empty((0, 2), dtype=torch.int64),
        "wanted": torch.empty((0, 4), dtype=torch.int64),
        "fresh": False,
    }
    return PackedBatch(
        tokens=batch.tokens.gather(1, index.clamp(max=batch.width - 1)) * real,
        positions=index * real,
        ends=torch.maximum(seen, torch.arange(index.shape[1]) + 1),
        **{**unless_given, **given},
    )


def _at_once(model: Any, edits: int, prompts: int) -> int:
    vocabulary = max(model.cfg.d_vocab_out, model.cfg.d_vocab, 1)
    return max(1, min(edits, LOGITS // (vocabulary * prompts)))
