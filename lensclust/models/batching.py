"""Batching: which prompts run through a model together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from itertools import count, pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_protocol import TransformerLensModel
from transformer_lens.utilities.statistics import derive_generator

from lensclust.models.devices import model_device
from lensclust.models.frequencies import length_steps

BATCH_TOKENS = {"cpu": 2_048}
ACCELERATOR_TOKENS = 16_384
# A backward pass keeps every layer's states, so its batches are smaller.
BACKWARD = 4
# Few enough buckets to mix the training rows, enough rows in each to group by length.
_BUCKET_BATCHES = 16


class Rows(NamedTuple):
    """The caller's rows in a forward that the library runs.

    Attributes:
        which: index of each.
        total: number of the caller's rows; 0 if the forward runs other rows.
        whole: whether each row is run from its first token to its last, without padding.
    """

    which: Int[Tensor, " row"]
    total: int
    whole: bool


_RUNNING: ContextVar[Rows | None] = ContextVar("rows that are run", default=None)


def default_budget(model: TransformerLensModel) -> int:
    """The default number of tokens in one forward, padding included."""
    return BATCH_TOKENS.get(model_device(model).type, ACCELERATOR_TOKENS)


def batches(
    model: TransformerLensModel, lengths: Int[Tensor, " row"], budget: int
) -> Iterator[Int[Tensor, " row"]]:
    """Batches of row indices by falling length, for which batching does not change results.

    Longest first: a batch that does not fit in memory fails at once, not after an hour.

    Args:
        model: a batch never mixes rows on two sides of one of its `length_steps`.
        lengths: tokens of each row that are run: without the last of an answer, which is only
            predicted.
        budget: maximum of rows x longest row of a batch.

    >>> import lensclust as lc
    >>> model = lc.load("native:sif-small")
    >>> [rows.tolist() for rows in batches(model, torch.tensor([2, 5, 3]), budget=6)]
    [[1], [2, 0]]
    """
    return announced(cut_by_length(lengths, budget, length_steps(model)), len(lengths))


def cut_by_length(
    lengths: Int[Tensor, " row"], budget: int, apart: Sequence[int] = ()
) -> Iterator[Int[Tensor, " row"]]:
    """`batches` without a model; a batch never mixes rows on two sides of a length in ``apart``.

    >>> [rows.tolist() for rows in cut_by_length(torch.tensor([2, 5, 3]), 99, apart=[3])]
    [[1], [2, 0]]
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        least = max((step for step in apart if step < longest), default=0)
        stop = min(start + max(1, budget // longest), int((lengths > least).sum()))
        yield order[start:stop]
        start = stop


def shard_ranges(start: int, stop: int, size: int) -> list[range]:
    """The range ``start..stop`` split at multiples of ``size``.

    >>> shard_ranges(3, 10, 4)
    [range(3, 4), range(4, 8), range(8, 10)]
    """
    cuts = [start, *range((start // size + 1) * size, stop, size), stop]
    return [range(a, b) for a, b in pairwise(cuts) if a < b]


def announced(parts: Iterable[Tensor], total: int, *, whole: bool = False) -> Iterator[Tensor]:
    """Yield the given row indices; while each is in use, `rows_being_run` returns it.

    Args:
        total, whole: as in `Rows`.
    """
    before = _RUNNING.get()
    try:
        for rows in parts:
            _RUNNING.set(Rows(rows, total, whole))
            yield rows
    finally:
        _RUNNING.set(before)


def rows_being_run() -> Rows | None:
    """The rows of the current forward, for hooks of callers; None outside the library's loops.

    >>> import lensclust as lc
    >>> model, lengths = lc.load("native:sif-small"), torch.tensor([2, 5])
    >>> [rows_being_run().which.tolist() for rows in batches(model, lengths, budget=5)]
    [[1], [0]]
    >>> rows_being_run() is None
    True
    """
    return _RUNNING.get()


def few_tokens(
    model: TransformerLensModel, length: int = 8, *, rows: int = 1
) -> Int[Tensor, "row token"]:
    """Fixed test prompts for self-checks, within the model's context length.

    Tokens of a row differ as far as the vocabulary allows: attention to equal tokens could be
    swapped without effect.

    >>> import lensclust as lc
    >>> few_tokens(lc.load("native:sif-small"), 4, rows=2).tolist()
    [[3, 10, 17, 24], [8, 15, 22, 29]]
    """
    length = min(length, model.cfg.n_ctx or length)
    ids = 3 + 7 * torch.arange(length) + 5 * torch.arange(rows)[:, None]
    return (ids % max(model.cfg.d_vocab, 1)).to(model_device(model))


def without_cache(model: TransformerLensModel) -> dict[str, Any]:
    """Arguments that keep a Hugging Face model from building a cache; native ones have none."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    return {"use_cache": False} if hasattr(config, "use_cache") else {}


def training_batches(
    model: TransformerLensModel,
    lengths: Int[Tensor, " row"],
    batch_size: int,
    batch_tokens: int | None = None,
    *,
    seed: int,
) -> Iterator[Int[Tensor, " row"]]:
    """Endless batches of row indices; each epoch holds every row once.

    In each epoch the rows are shuffled and split into buckets; a bucket is batched by length, so
    that rows of a batch have similar lengths and little padding, and its batches are shuffled.

    Args:
        model: a batch never mixes rows on two sides of one of its `length_steps`.
        lengths: tokens of each row, the last of which is only predicted.
        batch_size: rows of a batch.
        batch_tokens: maximum of rows x longest row of a batch, instead of ``batch_size``.
        seed: of all epochs; the global random state is unchanged.

    >>> import lensclust as lc
    >>> model, lengths = lc.load("native:sif-small"), torch.tensor([2, 9, 2, 9])
    >>> plan = training_batches(model, lengths, 2, seed=0)
    >>> sorted(lengths[next(plan)].tolist() for _ in range(2))
    [[2, 2], [9, 9]]
    """
    side = torch.bucketize(lengths - 1, torch.tensor(sorted(length_steps(model))))
    for round_ in count():
        generator = derive_generator(seed, "batches", round_)
        order = torch.randperm(len(lengths), generator=generator)
        budget = batch_tokens or batch_size * int(lengths.max())
        bucket = _BUCKET_BATCHES * max(1, budget // int(lengths.max()))
        cut: list[Tensor] = []
        buckets = order.split(bucket)
        for rows in (b[side[b] == one] for b in buckets for one in side[b].unique()):
            if batch_tokens is None:
                cut += rows[torch.argsort(lengths[rows], stable=True)].split(batch_size)
            else:
                cut += [rows[some] for some in cut_by_length(lengths[rows], batch_tokens)]
        for index in torch.randperm(len(cut), generator=generator):
            yield cut[index]
