"""Spans of an attention ratio: two spans of one text, and random ones for the null.

The first token of a prompt is left out: with or without a BOS it is an attention sink, whatever its
content.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lensclust.errors import InputError
from lensclust.prompts import Prompts
from probes.attention.patterns import Lengths, Pattern, ShowGradient
from probes.components import exact

# Reductions over the heads of a block, for each span, before the ratio.
OVER_HEADS = ("mean", "max")

DEMONSTRATIONS = "demonstrations"


@dataclass(frozen=True, eq=False)
class ComparedSpans:
    """Half-open token ranges ``[start, stop)`` of each prompt, first tokens left out.

    Attributes:
        relevant, irrelevant: key tokens.
        text: the block of text that both lie in, up to the query tokens.
        queries: query tokens.
    """

    relevant: Int[np.ndarray, "prompt 2"]
    irrelevant: Int[np.ndarray, "prompt 2"]
    text: Int[np.ndarray, "prompt 2"]
    queries: Int[np.ndarray, "prompt 2"]

    @classmethod
    def of(
        cls,
        prompts: Prompts,
        *,
        relevant: str,
        irrelevant: str,
        query: str,
        block: str | None,
        caller: str,
    ) -> ComparedSpans:
        """The spans of these names, checked against each other.

        Raises:
            InputError: if a span does not exist, is empty or outside its prompt; if the two
                overlap, leave the block, or do not end before the query tokens; or if the
                demonstrations reach into the block. ``caller`` is named in the message.
        """
        lengths = prompts.lengths.numpy()
        whole = np.stack([np.zeros_like(lengths), lengths], axis=1)
        text = whole if block is None else named_span(prompts, block, caller=caller)
        queries = query_span(prompts, query, caller=caller)
        pair = {
            name: named_span(prompts, name, caller=caller)
            for name in dict.fromkeys((relevant, irrelevant))
        }
        _refuse_shared_demonstrations(prompts, text, block, caller)
        first, second = pair[relevant], pair[irrelevant]
        _refuse(
            (first[:, 0] < second[:, 1]) & (second[:, 0] < first[:, 1]),
            f"{caller}: spans {relevant!r} and {irrelevant!r} of prompt {{row}} overlap: "
            "{0} to {1} and {2} to {3}",
            first,
            second,
        )
        for name, span in pair.items():
            _refuse(
                (span[:, 0] < text[:, 0]) | (span[:, 1] > text[:, 1]),
                f"{caller}: span {name!r} of prompt {{row}} is {{0}} to {{1}}, expected inside "
                f"the block {block!r}, {{2}} to {{3}}",
                span,
                text,
            )
            _refuse(
                span[:, 1] > queries[:, 0],
                f"{caller}: span {name!r} of prompt {{row}} is {{0}} to {{1}}, expected before "
                f"the tokens of {query!r}, {{2}} to {{3}}",
                span,
                queries,
            )
        seen = np.stack([text[:, 0], np.minimum(text[:, 1], queries[:, 0])], axis=1)
        return cls(first, second, np.maximum(seen, 1), queries)

    def columns(
        self, rows: Int[np.ndarray, " row"], width: int, *, draws: int, seed: int
    ) -> Float[Tensor, "row token column"]:
        """Columns that average over a span each: relevant ones first, then irrelevant ones.

        Of either kind the first is the span itself and ``draws`` more lie at random positions in
        the text, with the same lengths and disjoint like the two. Positions depend on the seed
        and the prompt, not on the batch.
        """
        found = torch.zeros(len(rows), width, 2 * (1 + draws), dtype=torch.float32)
        token = np.arange(width)[:, None]
        for place, row in enumerate(rows.tolist()):
            own = np.stack([self.relevant[row], self.irrelevant[row]])
            size = own[:, 1] - own[:, 0]
            starts = random_places(size, self.text[row], draws, np.random.default_rng([seed, row]))
            starts = np.concatenate([own[:, :1], starts], axis=1)
            for kind in range(2):
                inside = (token >= starts[kind]) & (token < starts[kind] + size[kind])
                mean = torch.from_numpy(inside / size[kind])
                found[place, :, kind * (1 + draws) : (kind + 1) * (1 + draws)] = mean
        return found


def named_span(prompts: Prompts, name: str, *, caller: str) -> Int[np.ndarray, "prompt 2"]:
    """A span of every prompt, without the prompt's first token.

    Raises:
        InputError: if there is no such span, or it is empty or outside its prompt.
    """
    spans = prompts.spans or {}
    if name not in spans:
        raise InputError(f"{caller}: no span {name!r}: these prompts have {sorted(spans)}")
    found, lengths = spans[name].numpy(), prompts.lengths.numpy()
    _refuse(
        (found[:, 0] < 0) | (found[:, 1] > lengths),
        f"{caller}: span {name!r} of prompt {{row}} is {{0}} to {{1}}, expected places within its "
        "{2} tokens",
        found,
        lengths[:, None],
    )
    found = np.stack([np.maximum(found[:, 0], 1), found[:, 1]], axis=1)
    _refuse(
        found[:, 1] <= found[:, 0],
        f"{caller}: span {name!r} of prompt {{row}} is empty (a prompt's first token is left out)",
    )
    return found


def query_span(prompts: Prompts, query: str, *, caller: str) -> Int[np.ndarray, "prompt 2"]:
    """The query tokens: the one that predicts the answer, or those of a span.

    Raises:
        InputError: as `named_span`.
    """
    if query == "answer":
        last = prompts.lengths.numpy() - 1
        return np.stack([last, last + 1], axis=1)
    return named_span(prompts, query, caller=caller)


def random_places(
    size: Int[np.ndarray, " 2"],
    text: Int[np.ndarray, " 2"],
    draws: int,
    generator: np.random.Generator,
) -> Int[np.ndarray, "2 draw"]:
    """Starts of two spans of these sizes in a text, every disjoint pair equally likely.

    >>> starts = random_places(np.array([1, 2]), np.array([5, 9]), 99, np.random.default_rng(0))
    >>> sorted(set(zip(*starts.tolist())))
    [(5, 6), (5, 7), (6, 7), (7, 5), (8, 5), (8, 6)]
    """
    free = int(text[1] - text[0] - size.sum())
    # Free tokens before, between and after the spans: two bars among free + 2 positions.
    bars = generator.integers([free + 2, free + 1], size=(draws, 2))
    bars[:, 1] += bars[:, 1] >= bars[:, 0]
    before, between = bars.min(1), np.abs(bars[:, 1] - bars[:, 0]) - 1
    first = generator.integers(2, size=draws)
    lead = text[0] + before
    follow = lead + size[first] + between
    return np.where(first == np.arange(2)[:, None], lead, follow)


def _refuse_shared_demonstrations(
    prompts: Prompts, text: Int[np.ndarray, "prompt 2"], block: str | None, caller: str
) -> None:
    if DEMONSTRATIONS not in (prompts.spans or {}):
        return
    shown = (prompts.spans or {})[DEMONSTRATIONS].numpy()
    where = "prompt" if block is None else f"block {block!r}"
    _refuse(
        (shown[:, 0] < shown[:, 1]) & (shown[:, 0] < text[:, 1]) & (text[:, 0] < shown[:, 1]),
        f"{caller}: the demonstrations of prompt {{row}}, {{0}} to {{1}}, overlap the {where}, "
        "{2} to {3}, expected a block that holds the last question alone",
        shown,
        text,
    )


def _refuse(wrong: np.ndarray, message: str, *ranges: Int[np.ndarray, "prompt _"]) -> None:
    """Raise InputError for the first wrong prompt, with its numbers."""
    if wrong.any():
        row = int(wrong.argmax())
        numbers = [number for each in ranges for number in each[row].tolist()]
        raise InputError(message.format(*numbers, row=row))


class SpanWeights:
    """Weights of the spans and of random ones at every head, for one batch of prompts.

    Attributes:
        weights: mean weight on a token of the relevant and of the irrelevant span
            ``(weighting, row, block, head, 2)``.
        null: sums over rows of the finite log ratios between random spans, and their count
            ``(2, weighting, block, heads, draw)``.
    """

    def __init__(
        self,
        weightings: Sequence[str],
        spans: ComparedSpans,
        rows: Int[np.ndarray, " row"],
        tokens: Int[Tensor, "row token"],
        model: Any,
        blocks: int,
        draws: int,
        seed: int,
    ) -> None:
        heads, device = model.cfg.n_heads, tokens.device
        self.place = {name: index for index, name in enumerate(weightings)}
        self.draws = draws
        columns = spans.columns(rows, tokens.shape[1], draws=draws, seed=seed)
        self.columns = columns.to(device)
        queries = torch.from_numpy(spans.queries[rows])
        offsets = torch.arange(int((queries[:, 1] - queries[:, 0]).max()))
        places = queries[:, :1] + offsets
        inside = places < queries[:, 1:]
        self.queries = torch.minimum(places, queries[:, 1:] - 1).to(device)
        self.shares = (inside / inside.sum(1, keepdim=True)).to(device)
        shape = (len(weightings), len(rows), blocks, heads, 2)
        self.weights = torch.empty(shape, device=device, dtype=torch.float32)
        # Sums over prompts of the finite log ratios, and their count.
        heads += len(OVER_HEADS)
        self.null = torch.zeros(
            (2, len(weightings), blocks, heads, draws), device=device, dtype=torch.float32
        )

    def show(self, block: int, pattern: Pattern, lengths: Lengths | None) -> ShowGradient | None:
        looks = self._of_queries(pattern)
        if "attention" in self.place:
            self._keep("attention", block, looks)
        if lengths is not None:
            self._keep("value", block, looks * lengths[:, None].to(looks))
        if "gradient" not in self.place:
            return None
        return lambda gradient: self._keep(
            "gradient", block, (looks * self._of_queries(gradient)).abs()
        )

    def _of_queries(self, pattern: Pattern) -> Float[Tensor, "row looking head key"]:
        """A copy of the query rows."""
        queries = self.queries.to(pattern.device)
        row = torch.arange(len(queries), device=pattern.device)[:, None]
        return pattern[row, :, queries].to(exact(pattern.dtype))

    def _keep(self, name: str, block: int, looks: Float[Tensor, "row looking head key"]) -> None:
        looked = torch.einsum("rqhk,rq->rhk", looks, self.shares.to(looks))
        found = (looked @ self.columns.to(looks)).unflatten(-1, (2, 1 + self.draws))
        place = self.place[name]
        self.weights[place, :, block] = found[..., 0].to(self.weights)
        drawn = found[..., 1:]
        over = [drawn, drawn.mean(1, keepdim=True), drawn.amax(1, keepdim=True)]
        relevant, irrelevant = torch.cat(over, dim=1).unbind(2)
        ratio = relevant.log() - irrelevant.log()
        number = ratio.isfinite()
        self.null[0, place, block] = ratio.where(number, 0).sum(0).to(self.null)
        self.null[1, place, block] = number.sum(0).to(self.null)
