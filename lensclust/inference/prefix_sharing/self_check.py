"""Self-check: branching reference prompts with shared prefixes, against each run alone.

A token's states must not depend on other tokens in its batch. That can fail if a token's place
among the keys is not its position in its prompt (ALiBi and windows that count places,
convolutions), if a prefix comes from another forward (states other than keys and values), and if
the longest prompt of a forward affects the others (frequencies that depend on the length). The
reference prompts cover all these cases, at a chosen length::

    trunk ─┬─ short prompts, which leave it at depth 2, 8, 32, ...
           └─ ... ─┬─ sibling ─┬─ one
                   │           └─ nested: a second continuation
                   ├─ siblings, as many as needed for the number of keys
                   └─ tail: the last continuation, of the longest prompt

The trunk is run first; then siblings and tail side by side; then the short prompts. Every
layer's residual stream and heads are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lensclust.inference.prefix_sharing.cost import Cost
from lensclust.inference.prefix_sharing.forwards import PackedForwards
from lensclust.inference.prefix_sharing.packing import Layout
from lensclust.inference.prefix_sharing.trie import alphabetical
from lensclust.models import agrees, model_device, relative_error, without_cache

# Errors of a forward that a model does not support.
FAILURES = (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
# Maximum tokens of the tail and of a sibling: those of one sequence of a plan.
TAIL = 128
STATES = ("blocks.{}.hook_resid_pre", "blocks.{}.hook_resid_post", "blocks.{}.attn.hook_z")
# In half precision states may differ by this multiple of the effect of the smallest change of the
# first layer's input, since every layer rounds.
AMPLIFIED = 3
# Large enough for everything in one batch.
UNBOUNDED = 10**12


@torch.no_grad()
def branching_failure(model: TransformerBridge, longest: int, keys: int) -> str | None:
    """Why prompts of a length cannot share prefixes; None if they can.

    Args:
        model: a bridge around a Hugging Face model.
        longest: tokens of the longest prompt.
        keys: minimum number of keys for its last token, those of its siblings included.
    """
    prompts = _Prompts.branching(longest, keys, ordinary_ids(model))
    network: Any = model.original_model
    kind: torch.dtype = network.dtype
    try:
        found, expected = prompts.shared(model), prompts.alone(model)
        # In half precision, a real fault may be as small as rounding.
        moved = prompts.alone(model, jitter=torch.finfo(kind).eps) if kind.itemsize < 4 else {}
    except FAILURES as failure:
        return named(failure)
    if found.keys() != expected.keys() or not found:
        return "other hooks fire"
    errors = {
        name: relative_error(found[name], expected[name])
        for name in found
        if not agrees(found[name], expected[name], dtype=kind)
    }
    for name, value in moved.items():
        error = relative_error(found[name], expected[name])
        if error > AMPLIFIED * relative_error(value, expected[name]):
            errors[name] = error
    return f"relative error {max(errors.values()):.2g} in prompts that branch" if errors else None


def ordinary_ids(model: Any) -> Int[np.ndarray, " id"]:
    """The middle third of a vocabulary, in order.

    Special ids are mostly the first or the last; after some of them, states are so large that
    rounding dominates.
    """
    n = model.cfg.d_vocab
    return np.arange(n)[n // 3 : n - n // 3]


def named(failure: Exception) -> str:
    """An exception in one line."""
    return f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"


@dataclass(frozen=True, eq=False)
class _Prompts:
    """Right-padded prompts.

    Attributes:
        positions: the compared tokens of each: the last, and the one in the middle.
        compared: the compared prompts; the others are placed between them.
        beside: tokens after the trunk, which are in one sequence.
    """

    tokens: Int[np.ndarray, "prompt token"]
    lengths: Int[np.ndarray, " prompt"]
    compared: Int[np.ndarray, " some"]
    beside: int

    @classmethod
    def branching(cls, longest: int, keys: int, ids: Int[np.ndarray, " id"]) -> _Prompts:
        """Fixed reference prompts of a size."""
        rng, longest = np.random.default_rng(0), max(longest, 8)
        tail = max(4, min(longest // 4, TAIL))
        trunk, end = rng.choice(ids, longest - tail), rng.choice(ids, tail)
        # The greatest id, so that the tail is last.
        end[0] = ids[-1]
        between = max(keys - longest, 3)
        beside = _beginning_differently(between, rng, ids[:-1], tail)
        nested = beside[0].copy()
        beside[0, -2], nested[-2] = ids[:2]
        # No more keys than needed: the last sibling is shortened, unless it is the nested one.
        spare = beside.size + 2 - between if len(beside) > 1 else 0
        *others, last = beside
        last = last[: len(last) - min(max(spare, 0), tail - 2)]
        family = [np.append(trunk, some) for some in (*others, last, nested, end)]
        short = [
            [*trunk[:depth], ids[int(trunk[depth] == ids[0])], *ids[: number % 2]]
            for number, depth in enumerate(2 * 4 ** np.arange(12))
            if depth < len(trunk)
        ]
        rows = [*family, *short]
        lengths = np.array([len(row) for row in rows])
        tokens = np.zeros((len(rows), longest), dtype=np.int64)
        for padded, row in zip(tokens, rows, strict=True):
            padded[: len(row)] = row
        n = len(family)
        _, common = alphabetical(tokens[:n], lengths[:n])
        distinct = int(lengths[:n].sum() - common.sum())
        return cls(tokens, lengths, np.arange(n - 2, len(rows)), distinct - len(trunk))

    @property
    def positions(self) -> Int[np.ndarray, "prompt 2"]:
        return np.stack([self.lengths - 1, self.lengths // 2], axis=1)

    def shared(self, model: Any) -> dict[str, Tensor]:
        """States of the compared prompts, from forwards that share: hook -> (prompt, slot, d)."""
        layout = Layout(
            self.tokens,
            self.positions,
            self.lengths,
            budget=UNBOUNDED,
            most_cached=UNBOUNDED,
            # Few forwards, but those of the short prompts are not padded to the tail's length.
            cost=Cost(forward=float(len(self.compared)), key=0.0),
            group_tokens=self.beside,
        )
        states = States(model, len(self.tokens))
        forwards = PackedForwards(model)
        for batch in layout.batches(*alphabetical(self.tokens, self.lengths)):
            forwards.run(batch, states.hooks(batch.wanted))
        return {name: found[self.compared] for name, found in states.found.items()}

    def alone(self, model: Any, *, jitter: float = 0.0) -> dict[str, Tensor]:
        """The same states, with each prompt run alone.

        Args:
            jitter: relative change, up or down, of each input of the first block.
        """
        states, tokens = States(model, len(self.compared)), torch.from_numpy(self.tokens)
        generator = torch.Generator().manual_seed(0)

        def moved(value: Tensor, hook: Any) -> Tensor:
            signs = torch.randint(2, value.shape, generator=generator).to(value) * 2 - 1
            return value * (1 + jitter * signs)

        edit = [(STATES[0].format(0), moved)] if jitter else []
        for row, prompt in enumerate(self.compared):
            wanted = [[0, place, row, slot] for slot, place in enumerate(self.positions[prompt])]
            model.run_with_hooks(
                tokens[prompt, : self.lengths[prompt]][None].to(model_device(model)),
                fwd_hooks=[*edit, *states.hooks(torch.tensor(wanted))],
                return_type=None,
                **without_cache(model),
            )
        return states.found


class States:
    """Every layer's states at two tokens of some prompts, collected by hooks."""

    def __init__(self, model: Any, prompts: int) -> None:
        names = [name.format(block) for block in range(model.cfg.n_layers) for name in STATES]
        points = model.hook_dict
        self.names = [name for name in names if name in points]
        self.prompts = prompts
        self.found: dict[str, Tensor] = {}

    def hooks(self, wanted: Int[Tensor, "read 4"]) -> list[tuple[str, Callable[..., None]]]:
        """Hooks for a forward with these requested tokens: row, place, prompt and slot."""
        row, place, prompt, slot = wanted.unbind(1)

        def keep(value: Tensor, hook: Any) -> None:
            some = value[row.to(value.device), place.to(value.device)].flatten(1)
            new = some.new_full((self.prompts, 2, some.shape[1]), torch.nan)
            self.found.setdefault(hook.name, new)[prompt, slot] = some

        return [(name, keep) for name in self.names]


def _beginning_differently(
    total: int, rng: np.random.Generator, ids: Int[np.ndarray, " id"], size: int
) -> Int[np.ndarray, "row size"]:
    """Rows that each have ``size`` tokens beyond their common prefixes."""
    digits = 1
    while len(ids) ** digits * (size - digits) < total and digits < size - 3:
        digits += 1
    n = min(-(-total // (size - digits)), len(ids) ** digits)
    rows = rng.choice(ids, (n, size))
    rows[:, :digits] = ids[np.stack(np.unravel_index(np.arange(n), [len(ids)] * digits), axis=1)]
    return rows
