"""Packing of a trie's groups into batches of tensors, several groups per forward.

Within a sequence the nodes of a group are in depth-first order, so a token is visible from its
own place up to the end of its node's subtree: one number for each token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lensclust.inference.prefix_sharing.cost import Cost
from lensclust.inference.prefix_sharing.trie import Group, Trie, rounds
from lensclust.inference.transfers import upload

# Larger groups need fewer copies of their past, but each token has more scores.
GROUP_TOKENS = 128
# Every group has a copy of its past: the number of keys allowed per token of the budget.
KEYS = 8


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Groups of one forward.

    Attributes:
        tokens, positions: token ids and their positions in their prompts; 0 in the padding.
        ends: a token is visible from its own place up to this one.
        past: the tokens of each group's path, as indices of cached tokens.
        past_lengths: their number; the rest is padding.
        cached: group and place of tokens that later groups continue; their indices follow those
            of the previous batch.
        wanted: group, place, prompt and slot of the requested tokens.
        fresh: indices of cached tokens restart at 0.
    """

    tokens: Int[Tensor, "group place"]
    positions: Int[Tensor, "group place"]
    ends: Int[Tensor, "group place"]
    past: Int[Tensor, "group past"]
    past_lengths: Int[Tensor, " group"]
    cached: Int[Tensor, "token 2"]
    wanted: Int[Tensor, "read 4"]
    fresh: bool

    @property
    def keys(self) -> int:
        """Number of keys for which a token has scores, masked ones included."""
        return self.past.shape[1] + self.tokens.shape[1]

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch with the inputs of a forward on a device."""
        names = ("tokens", "positions", "ends", "past", "past_lengths", "cached")
        return replace(self, **{name: upload(getattr(self, name), device) for name in names})


@dataclass(frozen=True, eq=False)
class Layout:
    """Prompts, their requested tokens, and limits of batches and cache.

    Attributes:
        stops: the first token of each prompt that is not needed.
        budget: upper bound of a batch's tokens, padding included.
        most_cached: upper bound of the tokens whose keys and values are kept at once.
        group_tokens: upper bound of a sequence's tokens, unless one node has more.
    """

    tokens: Int[np.ndarray, "prompt token"]
    positions: Int[np.ndarray, "prompt slot"]
    stops: Int[np.ndarray, " prompt"]
    budget: int
    most_cached: int
    cost: Cost
    group_tokens: int = GROUP_TOKENS

    def batches(
        self, order: Int[np.ndarray, " some"], common: Int[np.ndarray, " some"]
    ) -> Iterator[PackedBatch]:
        """Batches of some prompts; halves them if all would need too large a cache.

        Args:
            order, common: from `lensclust.inference.prefix_sharing.trie.alphabetical`.
        """
        trie = Trie.of(order, common, self.stops)
        groups = rounds(trie, min(self.group_tokens, self.budget))
        continued = np.zeros(len(trie.stop), dtype=bool)
        for above in {group.above for some in groups for group in some}:
            continued[trie.path(above)] = True
        if (trie.stop - trie.start)[continued].sum() > self.most_cached:
            half = len(order) // 2
            for part in (slice(None, half), slice(half, None)):
                yield from self.batches(order[part], common[part])
            return
        forwards = [some for waiting in groups for some in self._forwards(waiting)]
        home = np.empty(len(trie.stop), dtype=np.int64)
        for number, some in enumerate(forwards):
            home[np.concatenate([group.nodes for group in some])] = number
        node = trie.node_of(trie.leaf, self.positions[order])
        prompt, slot = np.broadcast_arrays(order[:, None], np.arange(node.shape[1]))
        wanted = np.stack([node, self.positions[order], prompt, slot], axis=-1)
        writer = _Writer(self.tokens, trie, continued)
        for number, some in enumerate(forwards):
            yield writer.write(some, wanted[home[node] == number])

    def _forwards(self, groups: Sequence[Group]) -> Iterator[list[Group]]:
        """Batch groups of similar length, until padding costs more than another forward."""
        some: list[Group] = []
        total = waste = 0.0
        for group in sorted(groups, key=lambda group: (group.length, group.past), reverse=True):
            wider = [*some, group]
            longest = wider[0].length
            keys = longest + max(each.past for each in wider)
            padded = self.cost(sequences=len(wider), tokens=longest, keys=keys)
            alone = self.cost(sequences=1, tokens=group.length, keys=group.length + group.past)
            waste += padded - total - alone + self.cost.forward * bool(some)
            full = len(wider) * max(longest, keys / KEYS) > self.budget
            if some and (full or waste > self.cost.forward):
                yield some
                wider, padded, waste = [group], alone, 0.0
            some, total = wider, padded
        yield some


@dataclass(eq=False)
class _Writer:
    """Writes the batches of one trie, in the order in which they run.

    Attributes:
        continued: nodes that later groups continue.
        numbers: indices of their cached tokens, as far as they are written.
    """

    tokens: Int[np.ndarray, "prompt token"]
    trie: Trie
    continued: Bool[np.ndarray, " node"]
    numbers: dict[int, Int[np.ndarray, " token"]] = field(default_factory=dict)
    written: int = 0

    def write(self, groups: Sequence[Group], wanted: Int[np.ndarray, "read 4"]) -> PackedBatch:
        """One batch.

        Args:
            wanted: node, depth, prompt and slot of the tokens to read from these groups.
        """
        trie, fresh = self.trie, not self.numbers and not self.written
        past = [self._past(group.above) for group in groups]
        nodes = np.concatenate([group.nodes for group in groups])
        sizes = trie.stop[nodes] - trie.start[nodes]
        row = np.repeat(np.arange(len(groups)), [len(group.nodes) for group in groups])
        # Where each node begins in its sequence, and where its subtree ends.
        begins = np.concatenate([_begins(sizes[row == each]) for each in range(len(groups))])
        ends = np.concatenate(
            [
                np.append(begins[row == each], group.length)[
                    np.searchsorted(group.nodes, trie.after[group.nodes])
                ]
                for each, group in enumerate(groups)
            ]
        )
        # From here on, one entry per token.
        of = np.repeat(np.arange(len(nodes)), sizes)
        within = np.arange(len(of)) - np.repeat(_begins(sizes), sizes)
        place = row[of], begins[of] + within
        depth = trie.start[nodes][of] + within
        shape = len(groups), max(group.length for group in groups)
        tokens, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        tokens[place] = self.tokens[trie.row[nodes][of], depth]
        positions[place] = depth
        seen = np.broadcast_to(np.arange(shape[1]) + 1, shape).copy()
        seen[place] = ends[of]
        kept = self.continued[nodes]
        for node, size in zip(nodes[kept].tolist(), sizes[kept].tolist(), strict=True):
            self.numbers[node] = np.arange(self.written, self.written + size)
            self.written += size
        at = np.searchsorted(nodes, wanted[:, 0], sorter=(forth := np.argsort(nodes)))
        at = forth[at]
        there = begins[at] + wanted[:, 1] - trie.start[wanted[:, 0]]
        return PackedBatch(
            tokens=torch.from_numpy(tokens),
            positions=torch.from_numpy(positions),
            ends=torch.from_numpy(seen),
            past=torch.from_numpy(_padded(past)),
            past_lengths=torch.tensor([len(numbers) for numbers in past]),
            cached=torch.from_numpy(np.stack(place, axis=1)[kept[of]]),
            wanted=torch.from_numpy(np.stack([row[at], there, *wanted[:, 2:].T], axis=1)),
            fresh=fresh,
        )

    def _past(self, node: int) -> Int[np.ndarray, " token"]:
        empty = np.empty(0, dtype=np.int64)
        return np.concatenate([empty, *(self.numbers[each] for each in self.trie.path(node))])


def _begins(sizes: Int[np.ndarray, " each"]) -> Int[np.ndarray, " each"]:
    return np.cumsum(sizes) - sizes


def _padded(rows: Sequence[Int[np.ndarray, " _each"]]) -> Int[np.ndarray, "row longest"]:
    out = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for values, row in zip(out, rows, strict=True):
        values[: len(row)] = row
    return out
