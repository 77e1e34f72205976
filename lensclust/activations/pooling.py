"""Activations pooled over a span of tokens: one state per prompt.

States are pooled inside the hook, so memory grows with prompts, as in `lensclust.extract`, not
with tokens. Prompts run in full: no prefix is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.activations.reader import DTYPES, BatchReader
from lensclust.activations.skeleton import measured, rectangle, template
from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.inference import HostCopy, require_fits, upload
from lensclust.models import SiteSelector, batches, resolve, shard_ranges
from lensclust.progress import progress_bar
from lensclust.prompts import Prompts

SHARD = 512
WHOLE = "prompt"


def _reduced(how: str) -> Callable[[Tensor, Tensor, int], Tensor]:
    def reduce(values: Tensor, member: Tensor, n: int) -> Tensor:
        index = member.view(-1, *[1] * (values.ndim - 1)).expand_as(values)
        empty = values.new_zeros((n, *values.shape[1:]))
        return empty.scatter_reduce(0, index, values, how, include_self=False)

    return reduce


def _last(values: Tensor, member: Tensor, n: int) -> Tensor:
    order = torch.arange(len(member), device=member.device)
    return values[_reduced("amax")(order, member, n)]


# Values of tokens, the prompt of each, the number of prompts -> one value per prompt.
POOLS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "max": _reduced("amax"),
    "mean": _reduced("mean"),
    "last": _last,
}


@checked_arguments
def pooled(
    model: TransformerLensModel,
    prompts: Prompts,
    sites: SiteSelector,
    *,
    span: str,
    how: str | Sequence[str] = "max",
    batch_tokens: int | None = None,
    dtype: str = "float32",
    progress: bool = True,
) -> xr.Dataset:
    """Read activations pooled over a named span of every prompt, in one pass.

    Args:
        model: a hooked model, in eval mode.
        prompts: the prompts to run; their ``rows`` become coordinates of ``prompt``.
        sites: as in `lensclust.extract`.
        span: one of the prompts' spans, or ``"prompt"`` for all tokens, a beginning-of-sequence
            token included.
        how: ``max`` (of each feature over the tokens), ``mean`` or ``last``, one or several. For
            heads ``z`` is pooled, so its maximum is not that of the contributions.
        batch_tokens: upper bound of a batch's size, as in `lensclust.extract`.
        dtype: numpy type of the result; pooled in float32, or in float64 if that is the result's.
        progress: show a bar.

    Returns:
        A dataset like that of `lensclust.extract`, with a position ``SPAN_HOW`` (such as
        ``relevant_max``) for each way of pooling, in memory.

    Raises:
        InputError: if the span does not exist or is empty in a prompt, a way of pooling or a
            site does not exist, or a prompt is longer than the context.

    >>> import lensclust as lc
    >>> prompts = lc.tasks.sif().where(split="new_string")
    >>> acts = pooled(lc.load("native:sif-small"), prompts, "resid", span="prompt", how="mean")
    >>> acts.resid.sel(layer=6, position="prompt_mean").dims
    ('prompt', 'd_model')
    """
    ways = [how] if isinstance(how, str) else list(how)
    if not ways or len(set(ways)) < len(ways) or not set(ways) <= set(POOLS):
        raise InputError(f"pooled: how={ways}, expected some of {list(POOLS)}, each once")
    if dtype not in DTYPES:
        raise InputError(f"pooled: dtype {dtype!r} is not known: expected one of {DTYPES}")
    if batch_tokens is not None and batch_tokens < 1:
        raise InputError(f"pooled: batch_tokens={batch_tokens}, expected at least 1")
    starts, stops = _ranges(prompts, span)
    require_fits(model, prompts, caller="pooled")
    chosen = rectangle(model, resolve(model, sites))
    names = [f"{span}_{way}" for way in ways]
    frame = template(model, prompts, chosen, names, np.dtype(dtype))
    frame.attrs["span"] = span
    reader = _SpanReader(model, chosen, frame, batch_tokens, share_prefixes=False)
    reader.pools = [POOLS[way] for way in ways]
    out = {name: np.empty(frame[name].shape, frame[name].dtype) for name in measured(frame)}
    with torch.no_grad(), progress_bar("pool", len(prompts), enabled=progress) as advance:
        for rows in shard_ranges(0, len(prompts), SHARD):
            index = torch.arange(rows.start, rows.stop)
            found = reader.read_spans(prompts, index, starts[index], stops[index], advance)
            for name, values in found.values().items():
                if values.dtype == np.float16 and not np.isfinite(values).all():
                    raise InputError(f"pooled: {name!r} overflows float16; give dtype='float32'")
                out[name][rows.start : rows.stop] = values
    return frame.assign({name: (frame[name].dims, value) for name, value in out.items()})


class _SpanReader(BatchReader):
    """Reads all tokens of each prompt's span, and keeps the pooled values."""

    pools: Sequence[Callable[[Tensor, Tensor, int], Tensor]] = ()

    def read_spans(
        self,
        prompts: Prompts,
        index: Int[Tensor, " row"],
        starts: Int[Tensor, " row"],
        stops: Int[Tensor, " row"],
        advance: Callable[..., None],
    ) -> HostCopy:
        buffers = self._buffers(len(index))
        lengths = prompts.lengths[index]
        for rows in batches(self.model, lengths, self.batch_tokens):
            tokens = upload(prompts.tokens[index[rows], : int(lengths[rows].max())], self.device)
            sizes = stops[rows] - starts[rows]
            row = torch.arange(len(rows)).repeat_interleave(sizes)
            before = sizes.cumsum(0) - sizes
            place = torch.arange(len(row)) + (starts[rows] - before)[row]
            # The slot is the token's prompt, numbered from 0 as `_keep` needs it.
            self._gather(
                torch.stack([row, place, rows[row], row], dim=1),
                lambda hooks, tokens=tokens: self.model.run_with_hooks(
                    tokens, fwd_hooks=list(hooks), return_type=None, **self.arguments
                ),
                buffers,
            )
            advance(len(rows))
        return HostCopy(buffers)

    def _keep(self, buffer: Tensor, into: Tensor, slot: Tensor, layer: int, values: Tensor) -> None:
        # A batch holds complete prompts, so each pool is final.
        n = int(slot[-1]) + 1
        rows = _last(into, slot, n)
        wide = values.to(torch.float64 if buffer.dtype == torch.float64 else torch.float32)
        for index, pool in enumerate(self.pools):
            buffer[rows, index, layer] = pool(wide, slot, n).to(buffer)


def _ranges(prompts: Prompts, span: str) -> tuple[Int[Tensor, " prompt"], Int[Tensor, " prompt"]]:
    spans = prompts.spans or {}
    if span == WHOLE and span not in spans:
        return torch.zeros_like(prompts.lengths), prompts.lengths
    if span not in spans:
        raise InputError(f"pooled: span {span!r} does not exist: expected {[*spans, WHOLE]}")
    starts, stops = spans[span].unbind(-1)
    if bool((stops <= starts).any()):
        row = int((stops <= starts).nonzero()[0])
        raise InputError(f"pooled: span {span!r} of prompt {row} is empty")
    return starts, stops
