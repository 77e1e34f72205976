"""Partial forwards: changed blocks and requested logits only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.gated_mlp import GatedMLPBridge
from transformer_lens.model_bridge.generalized_components.mlp import MLPBridge

from lensclust.models import agrees, default_budget, remembered, without_cache

Output = Tensor | tuple[Any, ...]

# Number of tokens in the check that an MLP acts on each token separately.
CHECKED = 48


@dataclass(frozen=True, eq=False)
class FrozenBlocks:
    """Cached output of a model's first blocks on some sequences, valid while they are frozen.

    Attributes:
        blocks: the first blocks of the model.
        output: output of the last of them, one row per sequence.
    """

    blocks: tuple[nn.Module, ...]
    output: Output

    @classmethod
    def run(
        cls, model: TransformerBridge, tokens: Int[Tensor, "prompt length"], n: int
    ) -> FrozenBlocks:
        """Run the first ``n`` blocks (at least 1) on right-padded sequences.

        For `lensclust.training.finetuned` these are prompts followed by their answers without
        the last token: ``prompts.with_answers()[0][:, :-1]``.
        """
        stacked: Any = model
        blocks = tuple(stacked.blocks[block] for block in range(n))
        parts: list[Output] = []

        def keep(_block: nn.Module, _given: Any, found: Output) -> None:
            parts.append(found)
            raise _Read

        rows = max(1, default_budget(model) // tokens.shape[1])
        handle = blocks[-1].register_forward_hook(keep)
        try:
            for some in tokens.split(rows):
                try:
                    with torch.no_grad():
                        forward_logits(model, some)
                except _Read:
                    continue
        finally:
            handle.remove()
        return cls(blocks, _joined(parts))

    @contextmanager
    def reused(self, rows: Int[Tensor, " row"] | None = None) -> Iterator[None]:
        """Context in which the model runs these rows from the first block that is not frozen."""
        output = self.output if rows is None else _rows(self.output, rows)
        # Only the last one's output is read; the others return any tensor.
        with running({block: lambda *_given, **_named: output for block in self.blocks}):
            yield


@contextmanager
def running(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Context in which the forwards of these modules of a bridge are replaced."""
    try:
        for part, forward in forwards.items():
            # Set in ``__dict__``: the bridge would pass the attribute on to the wrapped module.
            part.__dict__["forward"] = forward
        yield
    finally:
        for part in forwards:
            part.__dict__.pop("forward", None)


def scored_logits(
    model: TransformerBridge,
    tokens: Int[Tensor, "prompt length"],
    scored: Bool[Tensor, "prompt length"],
) -> Float[Tensor, "token vocab"]:
    """Logits at the chosen positions of right-padded sequences, row by row, and no others.

    The last block's MLP also runs at these positions only, unless a hook reads its output.

    >>> import lensclust as lc
    >>> model, tokens = lc.load("native:sif-small"), torch.tensor([[1, 2, 3], [4, 5, 0]])
    >>> scored = torch.tensor([[False, True, True], [False, True, False]])
    >>> with torch.no_grad():
    ...     found = scored_logits(model, tokens, scored)
    >>> torch.allclose(found, model(tokens)[scored], atol=1e-6)
    True
    """
    # One sequence of the chosen states: unembedding acts on each token separately.
    chosen = ("unembed.hook_in", lambda value, hook: value[scored.to(value.device)][None])
    with _last_mlp_at(model, scored), model.hooks(fwd_hooks=[chosen]):
        return forward_logits(model, tokens)[0]


@contextmanager
def _last_mlp_at(model: Any, scored: Bool[Tensor, "prompt length"]) -> Iterator[None]:
    """Context in which the last block's MLP runs at these positions only, and adds 0 elsewhere."""
    block = model.blocks[-1]
    mlp: Any = getattr(block, "mlp", None)
    attention = getattr(block, "attn", None)
    norm = getattr(model, "ln_final", None)  # GPT-1 has none
    later = {*block.modules(), *(norm.modules() if norm is not None else ())}
    later -= set(attention.modules() if attention else ())
    heard = any(part.fwd_hooks or part.bwd_hooks for part in later if isinstance(part, HookPoint))
    if heard or type(mlp) not in (MLPBridge, GatedMLPBridge):
        yield
        return
    whole = mlp.forward

    def forward(states: Any, *given: Any, **named: Any) -> Any:
        if given or named or not _placewise(model, whole, states):
            return whole(states, *given, **named)
        places = scored.to(states.device)
        found = whole(states[places][None])[0]
        return found.new_zeros(*states.shape[:-1], found.shape[-1]).index_put((places,), found)

    with running({mlp: forward}):
        yield


def _placewise(model: nn.Module, whole: Callable[..., Any], states: Tensor) -> bool:
    """Whether the last MLP acts on each token separately; checked once.

    Every third of some tokens is run without the others, and all of them in another shape. Few
    tokens are repeated with small perturbations, so that no two are equal.
    """

    @torch.no_grad()
    def check() -> bool:
        some = states.detach().flatten(0, -2)
        some = some[
            torch.arange(CHECKED, device=some.device) * max(1, len(some) // CHECKED) % len(some)
        ]
        noise = torch.randn(some.shape, generator=torch.Generator().manual_seed(0)).to(some)
        some = some + 0.1 * some.std() * noise
        together, apart = whole(some[None]), whole(some.unflatten(0, (4, -1)))
        alone = whole(some[1::3][None])
        if not all(isinstance(found, Tensor) for found in (together, apart, alone)):
            return False
        return agrees(alone[0], together[0, 1::3]) and agrees(apart.flatten(0, 1), together[0])

    return remembered(model, ("placewise", states.dtype), check)


class _Read(Exception):
    """Raised to stop a forward after the requested states have been read."""


def forward_logits(
    model: TransformerBridge, tokens: Int[Tensor, "prompt length"]
) -> Float[Tensor, "row place vocab"]:
    """Logits of right-padded sequences, after hooks; no key/value cache is built."""
    network: Any = model.original_model
    out = network(tokens, **without_cache(model))
    return getattr(out, "logits", out)


def _joined(parts: Sequence[Output]) -> Output:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    return tuple(
        torch.cat([part[index] for part in parts]) if isinstance(item, Tensor) else item
        for index, item in enumerate(first)
    )


def _rows(output: Output, rows: Tensor) -> Output:
    if isinstance(output, Tensor):
        return output[rows.to(output.device)]
    return tuple(
        item[rows.to(item.device)] if isinstance(item, Tensor) else item for item in output
    )
