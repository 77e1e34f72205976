"""What a model answers: any readout of the logits at the last token of its prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.batching import batches, default_budget, model_device, without_cache
from lensclust.fits import require_fits
from lensclust.prefix import Packing
from lensclust.prompts import Prompts
from lensclust.sharing import Forward, PrefixSharing

Readout = Callable[[Float[Tensor, "row vocab"], Int[Tensor, " row"]], Tensor]


def answers(
    model: TransformerLensModel,
    prompts: Prompts,
    readout: Readout,
    *,
    batch_tokens: int | None = None,
    share_prefixes: bool = True,
) -> Tensor:
    """What ``readout`` makes of the logits at the last token of every prompt ``(prompt, ...)``.

    Args:
        model: a hooked model, in eval mode.
        prompts: what to run.
        readout: from logits ``(row, vocab)`` and the prompt behind each row to one value, or
            tensor, a row. Rows come in any order.
        batch_tokens: upper bound of the tokens that one forward runs; default that of `extract`.
        share_prefixes: compute what prompts have in common at their beginning once, as in
            `extract`.

    Returns:
        What was read, on the CPU.

    Raises:
        InputError: if the model is in training mode, or the prompts do not fit it.

    >>> import lensclust as lc
    >>> prompts = lc.tasks.sif().where(split="new_string")
    >>> guesses = answers(lc.load("native:sif-small"), prompts, lambda logits, _: logits.argmax(-1))
    >>> len(guesses) == len(prompts)
    True
    """
    require_fits(model, prompts, caller="answers")
    reading = _Reading(model, prompts, readout)
    with torch.no_grad():
        if share_prefixes:
            sharing = PrefixSharing(model, caller="answers", batch_tokens=batch_tokens)
            last = prompts.lengths[:, None] - 1
            packing = sharing.plan(prompts.tokens, prompts.lengths, last)
            if packing is not None and reading.shared(sharing, packing):
                return reading.result()
        reading.in_full(batch_tokens or default_budget(model))
    return reading.result()


class _Reading:
    """What is read of each prompt, in the order in which it comes."""

    def __init__(self, model: TransformerLensModel, prompts: Prompts, readout: Readout) -> None:
        self.model: Any = model
        self.prompts = prompts
        self.readout = readout
        self.parts: list[Tensor] = []
        self.order: list[Tensor] = []

    def result(self) -> Tensor:
        return torch.cat(self.parts)[torch.cat(self.order).argsort()]

    def in_full(self, budget: int) -> None:
        for rows in batches(self.prompts.lengths, budget):
            self._keep(self._logits(rows), rows)

    def shared(self, sharing: PrefixSharing, packing: Packing) -> bool:
        """Whether everything was read from forwards that share prefixes."""
        witness, found = packing.witness, torch.empty(0)

        def read(wanted: Tensor, forward: Forward) -> None:
            nonlocal found
            group, place, rows, _ = wanted.unbind(1)

            def only(states: Tensor, hook: Any) -> Tensor:
                # One sequence of the wanted states: unembedding sees no order.
                return states[group.to(states.device), place.to(states.device)][None]

            logits = forward([("unembed.hook_in", only)]).logits[0].float()
            if len(rows):
                self._keep(logits, rows)
            if (is_witness := rows == witness).any():
                found = logits[is_witness.to(logits.device)][0]

        def error() -> float:
            expected = self._logits(torch.tensor([witness]))[0]
            return float((found - expected).norm() / expected.norm())

        if sharing.run(packing, read, error):
            return True
        self.parts, self.order = [], []
        return False

    def _logits(self, rows: Int[Tensor, " row"]) -> Float[Tensor, "row vocab"]:
        """Of prompts that run in full."""
        lengths = self.prompts.lengths[rows]
        tokens = self.prompts.tokens[rows, : int(lengths.max())].to(model_device(self.model))
        logits = self.model.run_with_hooks(
            tokens, fwd_hooks=[], return_type="logits", **without_cache(self.model)
        )
        return logits[torch.arange(len(rows)), lengths - 1].float()

    def _keep(self, logits: Float[Tensor, "row vocab"], rows: Int[Tensor, " row"]) -> None:
        self.parts.append(self.readout(logits, rows).cpu())
        self.order.append(rows)
