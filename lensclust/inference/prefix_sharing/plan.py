"""Plans of prefix sharing: which tokens are computed in which forwards, and whether it is cheaper.

Prompts with common prefixes form a trie of tokens (`lensclust.inference.prefix_sharing.trie`).
Each distinct token is computed once, in groups that continue a path whose keys and values an
earlier forward has cached (`lensclust.inference.prefix_sharing.packing`), if the estimated cost is
below that of running every prompt in full. `lensclust.inference.prefix_sharing.forwards` runs the
plan.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lensclust.inference.prefix_sharing.cost import Cost
from lensclust.inference.prefix_sharing.packing import GROUP_TOKENS, Layout, PackedBatch
from lensclust.inference.prefix_sharing.trie import alphabetical
from lensclust.models import cut_by_length

# The estimated cost must fall by at least this share, since estimates err.
GAIN = 0.1


@dataclass(frozen=True)
class PrefixPlan:
    """Savings of prefix sharing, counted in tokens and estimated in time; print it.

    Attributes:
        prompts: number of prompts.
        tokens: number of their tokens.
        distinct: tokens that must be computed: those of the trie, up to the last requested one.
        computed: tokens computed by the plan, padding included.
        groups, forwards: number of sequences and of forwards.
        sharing: prompts that share a prefix; the others are cheaper to run in full.
        cost, plain_cost: estimates for this plan, and for running every prompt in full, in tokens.
        refused: why the model cannot share prefixes; None if it can or was not checked.
    """

    prompts: int
    tokens: int
    distinct: int
    computed: int
    groups: int
    forwards: int
    sharing: int
    cost: float
    plain_cost: float
    refused: str | None = None

    @property
    def limit(self) -> float:
        """Tokens of all prompts over tokens that must be computed: the maximum speed-up."""
        return self.tokens / self.distinct

    def __add__(self, other: PrefixPlan) -> PrefixPlan:
        names = [field.name for field in fields(self) if field.name != "refused"]
        return PrefixPlan(
            *(getattr(self, name) + getattr(other, name) for name in names),
            refused=self.refused or other.refused,
        )

    def __str__(self) -> str:
        return (
            f"{self.prompts:,} prompts, {self.tokens:,} tokens\n"
            f"must be computed  {self.distinct:,} (limit: {self.limit:.3g} times fewer)\n"
            f"are computed      {self.computed:,}, padding included, "
            f"in {self.groups:,} groups and {self.forwards:,} forwards\n"
            f"share a prefix    {self.sharing:,} prompts\n"
            f"estimated cost    {self.cost / self.plain_cost:.2f} of running all in full"
            + (f"\ncannot share      {self.refused}" if self.refused else "")
        )


@dataclass(frozen=True, eq=False)
class Packing:
    """A plan and its batches; none if it is not cheaper."""

    plan: PrefixPlan
    batches: tuple[PackedBatch, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Tokens of the longest path, and the largest number of keys in a batch."""
        longest = max(int(batch.positions.max()) + 1 for batch in self.batches)
        return longest, max(longest, *(batch.keys for batch in self.batches))

    @property
    def farthest(self) -> int:
        """The prompt whose read token lies farthest, among the keys, from its own position.

        That is a late continuation, with other tokens between it and its prefix.
        """
        apart = []
        for batch in self.batches:
            group, place, prompt, _ = batch.wanted.unbind(1)
            position = batch.positions[group, place]
            shift = batch.past.shape[1] + place - position
            apart += torch.stack([shift, position, prompt], dim=1).tolist()
        return max(apart)[2]


def pack(
    tokens: Int[Tensor, "prompt token"],
    lengths: Int[Tensor, " prompt"],
    positions: Int[Tensor, "prompt slot"],
    *,
    budget: int,
    most_cached: int,
    cost: Cost,
    allowed: bool = True,
    group_tokens: int = GROUP_TOKENS,
    gain: float = GAIN,
) -> Packing:
    """Plan how to compute right-padded prompts with every distinct token run once.

    Args:
        positions: the requested tokens; tokens after the last of them are not computed.
        budget: upper bound of a forward's tokens, padding included.
        most_cached: upper bound of the tokens whose keys and values are kept at once.
        allowed: False for a model that cannot share.
        group_tokens: upper bound of a sequence's tokens, unless one node has more.
        gain: share of the estimated cost that must be saved.

    >>> import torch
    >>> prompts, lengths = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 6, 0]]), torch.tensor([5, 4])
    >>> found = pack(prompts, lengths, lengths[:, None] - 1, budget=99, most_cached=99,
    ...              cost=Cost(forward=1.0, key=0.01))
    >>> found.plan.tokens, found.plan.distinct, found.batches[0].tokens.tolist()
    (9, 6, [[1, 2, 3, 4, 5, 6]])
    """
    stops = positions.max(1).values.numpy() + 1
    order, common = alphabetical(tokens.numpy(), stops)
    full = [(len(rows), int(lengths[rows].max())) for rows in cut_by_length(lengths, budget)]
    plain_cost = sum(cost(sequences=n, tokens=longest, keys=longest) for n, longest in full)
    counted: dict[str, Any] = {
        "prompts": len(tokens),
        "tokens": int(lengths.sum()),
        "distinct": int((stops[order] - common).sum()),
        "plain_cost": plain_cost,
    }
    plain = Packing(
        PrefixPlan(
            **counted,
            computed=sum(n * longest for n, longest in full),
            groups=len(tokens),
            forwards=len(full),
            sharing=0,
            cost=plain_cost,
        )
    )
    # No plan can be cheaper, or not because of sharing.
    most = (1 - gain) * min(plain_cost, plain.plan.tokens)
    if not allowed or plain.plan.distinct > most:
        return plain
    layout = Layout(
        tokens.numpy(), positions.numpy(), stops, budget, most_cached, cost, group_tokens
    )
    found = tuple(layout.batches(order, common))
    shapes = [(*batch.tokens.shape, batch.keys) for batch in found]
    shared = Packing(
        PrefixPlan(
            **counted,
            computed=sum(n * places for n, places, _ in shapes),
            groups=sum(n for n, _, _ in shapes),
            forwards=len(found),
            sharing=len(tokens),
            cost=sum(cost(sequences=n, tokens=places, keys=keys) for n, places, keys in shapes),
        ),
        found,
    )
    return shared if shared.plan.cost <= (1 - gain) * plain_cost else plain
