"""Attention patterns reduced to one weight a span, inside the hook that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.attention_patterns import Lengths, Pattern, ShowGradient
from probes.attention_spans import OVER_HEADS, ComparedSpans
from probes.frozen_norms import exact


class SpanWeights:
    """The weight of each span at every head, and of random ones, for one batch of prompts.

    Attributes:
        weights: mean weight on a token of the relevant and of the irrelevant span
            ``(weighting, row, block, head, 2)``.
        null: sums over rows of the log ratios between random spans that are numbers, and how many
            are ``(2, weighting, block, heads, draw)``.
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
        self.weights = torch.empty(shape, device=device)
        # Sums over prompts of the log ratios that are numbers, and how many there were.
        heads += len(OVER_HEADS)
        self.null = torch.zeros((2, len(weightings), blocks, heads, draws), device=device)

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
        """A copy of the rows that look."""
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
