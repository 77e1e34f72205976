"""What comes before an edited token is run once, and every edit runs only what follows.

A causal model's states before a position do not depend on what is put there. So the columns
before the cut are the same for every edit of a prompt:

- `packed`: one sequence holds the prefix and then, side by side, a copy of the suffix for each
  edit; a mask lets a copy see the prefix and itself, and position ids tell it where it stands.
  Hugging Face models take the prefix from a key/value cache that is filled once. TransformerLens'
  native models have none: every sequence runs the prefix again, so an edit costs its suffix and
  ``1 / copies`` of the prefix.
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
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from lensclust.prompts import Prompts
from lensclust.sites import Site, hook_name, model_name

Edit = tuple[Site, Float[Tensor, "_prompt _d"]]
# Logits held at once, in numbers.
LOGITS = 2**26
# Copies side by side grow up to here: beyond, scores between them cost what sharing saves.
PACKED_TOKENS = 256


@dataclass(frozen=True)
class Batch:
    """Prompts padded on the left, so that all end in one column, and cut in one column.

    Attributes:
        rows: which prompts.
        tokens, real, position_ids: token ids, which of them are no padding, their positions.
        cut: columns before it are the same for every edit.
        columns: the edited column of each prompt.
    """

    rows: Int[Tensor, " prompt"]
    tokens: Int[Tensor, "prompt column"]
    real: Bool[Tensor, "prompt column"]
    position_ids: Int[Tensor, "prompt column"]
    cut: int
    columns: Int[Tensor, " prompt"]

    @classmethod
    def of(cls, prompts: Prompts, rows: Tensor, positions: Tensor, device: torch.device) -> Batch:
        """Lay out the prompts ``rows``, edited at ``positions`` (one for every prompt)."""
        lengths = prompts.lengths[rows]
        padding = lengths.max() - lengths
        index = torch.arange(int(lengths.max())) - padding[:, None]
        columns = positions[rows] + padding
        return cls(
            rows=rows,
            tokens=prompts.tokens[rows].gather(1, index.clamp(min=0)).to(device),
            real=(index >= 0).to(device),
            position_ids=index.clamp(min=0).to(device),
            cut=int(columns.min()),
            columns=columns.to(device),
        )

    @property
    def width(self) -> int:
        return self.tokens.shape[1]

    @property
    def suffix(self) -> int:
        return self.width - self.cut


@dataclass(frozen=True)
class Prepared:
    """A batch whose prefix has been dealt with.

    Attributes:
        at_once: how many edits one forward holds.
        run: from edits (None: leave the model alone) to the logits of the last token.
    """

    at_once: int
    run: Callable[[Sequence[Edit | None]], Float[Tensor, "edit prompt vocab"]]


Way = Callable[[Any, Batch, int], Prepared]


def ways(model: TransformerLensModel, columns: int) -> tuple[Way, ...]:
    """The ways that may suit a model, the cheapest first; `stacked` always does.

    Args:
        columns: the longest prompt with two copies of its suffix: a native model runs no
            sequence longer than its context.
    """
    network = getattr(model, "original_model", None)
    if isinstance(network, NativeModel):
        fits = network.layers[0].attn.causal and columns <= model.cfg.n_ctx
        return (packed, stacked) if fits else (stacked,)
    return (packed, stacked) if isinstance(network, PreTrainedModel) else (stacked,)


def batch_width(model: Any, edits: int) -> Callable[[int, int], int]:
    """Columns that a prompt takes in a forward, from its width and that of its suffix."""
    room = min(model.cfg.n_ctx, PACKED_TOKENS)
    if not isinstance(getattr(model, "original_model", None), NativeModel):
        room = 0
    return lambda width, suffix: max(width, min(room, width + (edits - 1) * suffix))


def packed(model: Any, batch: Batch, budget: int) -> Prepared:
    """The prefix of each prompt, then a copy of its suffix for each edit, in one sequence."""
    network, n, cut, suffix = model.original_model, len(batch.rows), batch.cut, batch.suffix
    device = batch.tokens.device
    native = isinstance(network, NativeModel)
    cached = cut > 0 and not native

    def forward(layout: _Layout, hooks: Sequence[Any], keep: Tensor, **cache: Any) -> Tensor:
        last = ("unembed.hook_in", lambda value, hook: value[:, keep])
        with model.hooks(fwd_hooks=[*hooks, last]):
            out = network(
                batch.tokens[:, layout.run],
                attention_mask=_native_mask(layout) if native else _mask(network, layout),
                position_ids=batch.position_ids[:, layout.run],
                **cache,
            )
        return out if native else out.logits

    prefix = DynamicCache()
    if cached:
        alone = _Layout.of(batch, copies=0, begin=0)
        forward(alone, [], torch.tensor([cut - 1]), past_key_values=prefix, use_cache=True)
    begin = cut if cached else 0

    def run(edits: Sequence[Edit | None]) -> Tensor:
        steps = suffix * torch.arange(len(edits), device=device)[:, None]
        row = torch.arange(n, device=device).expand(len(edits), n)
        hooks = EditHooks(model, edits, batch.rows, row, batch.columns + steps - begin)
        cache: dict[str, Any] = {}
        if not native:
            layers: list[Any] = [_SharedPrefix(layer) for layer in prefix.layers]
            cache = {"past_key_values": Cache(layers=layers) if cached else None}
            cache["use_cache"] = cached
        layout = _Layout.of(batch, copies=len(edits), begin=begin)
        ends = batch.width - 1 - begin + steps[:, 0]
        logits = forward(layout, hooks.pairs, ends, **cache)
        hooks.require_fired()
        return logits.transpose(0, 1)

    if cached:
        room = min(budget // n, PACKED_TOKENS)
    else:
        most = min(model.cfg.n_ctx, PACKED_TOKENS) if native else PACKED_TOKENS
        room = min(budget // n, most) - cut
    return Prepared(_at_once(model, room // suffix, n), run)


def stacked(model: Any, batch: Batch, budget: int) -> Prepared:
    """Every edit with its whole prompt, padded on the right, which needs no mask."""
    n, width = len(batch.rows), batch.width
    padding = width - batch.real.sum(1)
    index = torch.arange(width, device=padding.device) + padding[:, None]
    tokens = batch.tokens.gather(1, index.clamp(max=width - 1))
    config = getattr(getattr(model, "original_model", None), "config", None)
    arguments = {"use_cache": False} if hasattr(config, "use_cache") else {}

    def run(edits: Sequence[Edit | None]) -> Tensor:
        steps = torch.arange(len(edits), device=padding.device)[:, None]
        place = torch.arange(n, device=padding.device) + n * steps
        column = (batch.columns - padding).expand_as(place)
        hooks = EditHooks(model, edits, batch.rows, place, column)
        logits = model.run_with_hooks(
            tokens.repeat(len(edits), 1),
            fwd_hooks=hooks.pairs,
            return_type="logits",
            **arguments,
        )
        hooks.require_fired()
        last = (width - 1 - padding).repeat(len(edits))
        rows = torch.arange(len(last), device=last.device)
        return logits[rows, last].unflatten(0, (len(edits), n))

    return Prepared(_at_once(model, budget // (n * width), n), run)


class EditHooks:
    """One hook for each hook point that the edits touch, whatever their number.

    Args:
        rows: the prompt behind each column of ``place``.
        place, column: where in the batch dimension and in the sequence each edit of each prompt
            goes ``(edit, prompt)``.
    """

    def __init__(
        self,
        model: Any,
        edits: Sequence[Edit | None],
        rows: Int[Tensor, " prompt"],
        place: Int[Tensor, "edit prompt"],
        column: Int[Tensor, "edit prompt"],
    ) -> None:
        self.model = model
        by_hook: dict[str, list[int]] = {}
        for number, edit in enumerate(edits):
            if edit is not None:
                by_hook.setdefault(hook_name(model, edit[0]), []).append(number)
        self.fired = dict.fromkeys(by_hook, 0)
        self.pairs = []
        for name, numbers in by_hook.items():
            chosen = [edit for number in numbers if (edit := edits[number]) is not None]
            where: list[Tensor] = [place[numbers], column[numbers]]
            if chosen[0][0].head is not None:
                heads = torch.tensor([[site.head] for site, _ in chosen], device=place.device)
                where.append(heads.expand_as(where[0]))
            values = torch.stack([value[rows.to(value.device)] for _, value in chosen])
            self.pairs.append((name, self._hook(name, where, values)))

    def _hook(self, name: str, where: list[Tensor], values: Tensor) -> Callable[..., Tensor]:
        def hook(value: Tensor, hook: Any) -> Tensor:
            self.fired[name] += 1
            edited = value.clone()  # the model may still use the tensor it passed
            index = tuple(axis.to(value.device) for axis in where)
            edited[index] = values.to(edited)
            return edited

        return hook

    def require_fired(self) -> None:
        odd = [name for name, times in self.fired.items() if times != 1]
        if odd:
            raise RuntimeError(
                f"replay: hook {odd[0]!r} of {model_name(self.model)} fired "
                f"{self.fired[odd[0]]} times in one forward, expected once"
            )


@dataclass(frozen=True)
class _Layout:
    """Which column of the batch stands where in a packed sequence, and who sees whom.

    Attributes:
        batch: the prompts.
        take: the batch's column at each place, prefix first.
        copy: which copy of the suffix a place belongs to; -1 in the prefix.
        begin: places before it are not run, their keys and values come from a cache.
    """

    batch: Batch
    take: Int[Tensor, " place"]
    copy: Int[Tensor, " place"]
    begin: int

    @classmethod
    def of(cls, batch: Batch, *, copies: int, begin: int) -> _Layout:
        device, cut = batch.tokens.device, batch.cut
        prefix = torch.arange(cut, device=device)
        suffix = torch.arange(cut, batch.width, device=device)
        numbers = torch.arange(copies, device=device).repeat_interleave(batch.suffix)
        copy = torch.cat([torch.full_like(prefix, -1), numbers])
        return cls(batch, torch.cat([prefix, suffix.repeat(copies)]), copy, begin)

    @property
    def run(self) -> Int[Tensor, " place"]:
        return self.take[self.begin :]

    def visible(self, window: int | None = None) -> Bool[Tensor, "prompt 1 query key"]:
        """Causal inside a copy and into the prefix; padding sees itself, so no row is empty."""
        place = torch.arange(len(self.take), device=self.take.device)
        query = place[self.begin :, None]
        own = (self.copy < 0) | (self.copy == self.copy[self.begin :, None])
        seen = ((place <= query) & own) & self.batch.real[:, None, self.take]
        if window is not None:
            ids = self.batch.position_ids
            seen &= ids[:, None, self.take] > ids[:, self.run, None] - window
        return (seen | (place == query))[:, None]


def _native_mask(layout: _Layout) -> Bool[Tensor, "prompt 1 query key"]:
    return ~layout.visible()


def _mask(network: PreTrainedModel, layout: _Layout) -> Tensor | dict[str, Tensor]:
    """What is added to the scores; for each type of layer where some see a window only."""
    config: Any = network.config

    def added(visible: Tensor) -> Tensor:
        lowest = torch.finfo(network.dtype).min
        return torch.zeros(visible.shape, dtype=network.dtype, device=visible.device).masked_fill(
            ~visible, lowest
        )

    full = added(layout.visible())
    window = getattr(config, "sliding_window", None)
    if window is None or window >= layout.batch.width:
        return full
    types = getattr(config, "layer_types", None)
    sliding = added(layout.visible(window))
    return {"full_attention": full, "sliding_attention": sliding} if types else sliding


class _SharedPrefix(DynamicLayer):
    """Keys and values of a prefix that no forward adds to."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = layer.keys, layer.values, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        keys = torch.cat([self.keys, key_states], dim=-2)
        return keys, torch.cat([self.values, value_states], dim=-2)


def _at_once(model: Any, edits: int, prompts: int) -> int:
    vocabulary = max(model.cfg.d_vocab_out, model.cfg.d_vocab, 1)
    return max(1, min(edits, LOGITS // (vocabulary * prompts)))
