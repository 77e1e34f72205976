"""Token sequences as a trie, split into groups that each run as one sequence.

A causal model's states at a token depend on earlier tokens only, so of sequences with common
prefixes only the distinct tokens have to be computed: those of their trie. A *group* is one
sequence that packs subtrees and continues one *past*, the path above them.

Groups are removed from the trie bottom-up: every subtree up to a maximum size is removed, those
under one node are packed into groups, and a smaller trie remains. So any nesting (instruction,
demonstrations, query) takes few rounds, and every token is in exactly one group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int


def alphabetical(
    tokens: Int[np.ndarray, "row token"], lengths: Int[np.ndarray, " row"]
) -> tuple[Int[np.ndarray, " row"], Int[np.ndarray, " row"]]:
    """The rows in lexicographic order, and the length of each one's prefix shared with the last.

    >>> order, common = alphabetical(np.array([[5, 6], [5, 0], [5, 6]]), np.array([2, 1, 2]))
    >>> order.tolist(), common.tolist()
    ([1, 0, 2], [0, 1, 2])
    """
    width = int(lengths.max())
    real = np.arange(width) < lengths[:, None]
    # Big-endian numbers compare like their bytes; the padding comes before every token.
    spelled = np.where(real, tokens[:, :width] + 1, 0).astype(">u4")
    order = np.argsort(spelled.view(np.dtype((np.void, 4 * width)))[:, 0], kind="stable")
    equal = (spelled[order[1:]] == spelled[order[:-1]]) & real[order[1:]]
    return order, np.concatenate([[0], np.cumprod(equal, axis=1).sum(axis=1)])


@dataclass(frozen=True, eq=False)
class Trie:
    """Nodes in depth-first order, parents before children; node 0 is the empty prefix.

    Attributes:
        parent: of each node; 0's is 0.
        start, stop: a node holds the tokens ``start .. stop`` of its row.
        row: one of the rows that pass through the node.
        after: the first node after the subtree of each node.
        leaf: the node at which each row ends, in the order given to `of`.
    """

    parent: Int[np.ndarray, " node"]
    start: Int[np.ndarray, " node"]
    stop: Int[np.ndarray, " node"]
    row: Int[np.ndarray, " node"]
    after: Int[np.ndarray, " node"]
    leaf: Int[np.ndarray, " some"]

    @classmethod
    def of(
        cls,
        order: Int[np.ndarray, " some"],
        common: Int[np.ndarray, " some"],
        lengths: Int[np.ndarray, " row"],
    ) -> Trie:
        """Build from rows in lexicographic order and the length of each one's shared prefix.

        >>> trie = Trie.of(np.array([1, 0, 2]), np.array([0, 1, 1]), np.array([2, 3, 4]))
        >>> trie.start.tolist(), trie.stop.tolist(), trie.parent.tolist()
        ([0, 0, 1, 1, 1], [0, 1, 3, 2, 4], [0, 0, 1, 1, 1])
        """
        stop, parent, first, leaf = [0], [0], [0], []
        path = [0]
        # The first row shares nothing.
        alike = [0, *common[1:].tolist()]
        for place, shared in enumerate(alike):
            length, below = int(lengths[order[place]]), 0
            while stop[path[-1]] > shared:
                below = path.pop()
            if stop[path[-1]] < shared:  # the two rows diverge inside the node `below`
                stop.append(shared)
                parent.append(path[-1])
                first.append(first[below])
                parent[below] = len(stop) - 1
                path.append(len(stop) - 1)
            if length > shared:
                stop.append(length)
                parent.append(path[-1])
                first.append(place)
                path.append(len(stop) - 1)
            leaf.append(path[-1])
        forth = np.lexsort([stop, first])
        number = np.argsort(forth)
        ends, above = np.array(stop)[forth], number[np.array(parent)[forth]]
        after = list(range(1, len(forth) + 1))
        for node in range(len(forth) - 1, 0, -1):
            after[above[node]] = max(after[above[node]], after[node])
        return cls(
            parent=above,
            start=ends[above],
            stop=ends,
            row=order[np.array(first)[forth]],
            after=np.array(after),
            leaf=number[leaf],
        )

    def node_of(
        self, leaf: Int[np.ndarray, " some"], depth: Int[np.ndarray, "some slot"]
    ) -> Int[np.ndarray, "some slot"]:
        """The node, on the path to a leaf, that holds the token at each depth."""
        node = np.broadcast_to(leaf[:, None], depth.shape)
        while (beyond := self.start[node] > depth).any():
            node = np.where(beyond, self.parent[node], node)
        return node

    def path(self, node: int) -> list[int]:
        """The nodes from the root to ``node``, without the empty prefix."""
        nodes = []
        while node:
            nodes.append(node)
            node = int(self.parent[node])
        return nodes[::-1]


@dataclass(frozen=True, eq=False)
class Group:
    """Nodes that are packed into one sequence.

    Attributes:
        nodes: in depth-first order; a node's parent is among them, or is ``above``.
        length: number of their tokens.
        above: the node whose path they continue.
        past: number of tokens in that path.
    """

    nodes: Int[np.ndarray, " node"]
    length: int
    above: int
    past: int


def rounds(trie: Trie, most: int) -> list[list[Group]]:
    """Groups of at most ``most`` tokens, in an order in which they can run.

    Each continues a path that earlier rounds have run. A node longer than ``most`` is a separate
    group.

    >>> trie = Trie.of(np.array([0, 1, 2]), np.array([0, 4, 4]), np.array([6, 7, 5]))
    >>> [[group.nodes.tolist() for group in groups] for groups in rounds(trie, 6)]
    [[[1]], [[2, 3, 4]]]
    """
    left = np.arange(len(trie.stop)) > 0
    found = []
    while left.any():
        size = _below(trie, np.where(left, trie.stop - trie.start, 0))
        bare = _below(trie, left.astype(int)) == 1
        fits = size <= most
        fits[0] = False
        # Whole subtrees, as large as allowed, and leaves that are too long.
        tops = np.flatnonzero(left & ~fits[trie.parent] & (fits | bare))
        found.append(list(_groups(trie, tops, size, left, most)))
        for top in tops:
            left[top : trie.after[top]] = False
    return found[::-1]


def _below(trie: Trie, values: Int[np.ndarray, " node"]) -> Int[np.ndarray, " node"]:
    """Sums over the subtree of each node."""
    sums = np.concatenate([[0], np.cumsum(values)])
    return sums[trie.after] - sums[:-1]


def _groups(
    trie: Trie,
    tops: Int[np.ndarray, " top"],
    size: Int[np.ndarray, " node"],
    left: Bool[np.ndarray, " node"],
    most: int,
) -> Iterator[Group]:
    """Split the subtrees under each node, in order, into few groups of similar length."""
    tops = tops[np.argsort(trie.parent[tops], kind="stable")]
    above, begins = np.unique(trie.parent[tops], return_index=True)
    for node, family in zip(above.tolist(), np.split(tops, begins[1:]), strict=True):
        grouped = _balanced(size[family], most)
        for number in np.unique(grouped):
            some = family[grouped == number]
            nodes = [top + np.flatnonzero(left[top : trie.after[top]]) for top in some]
            yield Group(
                np.concatenate(nodes), int(size[some].sum()), node, past=int(trie.stop[node])
            )


def _balanced(sizes: Int[np.ndarray, " each"], most: int) -> Int[np.ndarray, " each"]:
    """A group for each size, in order: as few groups of at most ``most`` as possible, balanced.

    >>> _balanced(np.array([3, 3, 3, 3, 9]), 8).tolist()
    [0, 0, 1, 1, 2]
    """
    total, middle = int(sizes.sum()), np.cumsum(sizes) - sizes / 2
    for groups in range(-(-total // most), len(sizes)):
        grouped = (middle * groups / total).astype(int)
        held = np.bincount(grouped, weights=sizes)
        if (held[grouped] <= np.maximum(most, sizes)).all():
            return grouped
    return np.arange(len(sizes))
