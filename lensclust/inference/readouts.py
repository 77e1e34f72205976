"""Readouts of the logits at the last token of prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.inference.checks import require_fits
from lensclust.inference.prefix_sharing import Forward, Hooks, Packing, PrefixSharing
from lensclust.models import batches, default_budget, model_device, model_name, without_cache
from lensclust.prompts import Prompts

Readout = Callable[[Float[Tensor, "row vocab"], Int[Tensor, " row"]], Tensor]
# Hook name -> activations there at the last token, one row per prompt.
States = Mapping[str, Tensor]
StateReadout = Callable[[Float[Tensor, "row vocab"], Int[Tensor, " row"], States], Tensor]


@checked_arguments
def answers(
    model: TransformerLensModel,
    prompts: Prompts,
    readout: Readout,
    *,
    batch_tokens: int | None = None,
    share_prefixes: bool = True,
) -> Tensor:
    """Apply ``readout`` to the logits at the last token of every prompt ``(prompt, ...)``.

    Args:
        model: a hooked model, in eval mode.
        prompts: the prompts to run.
        readout: from logits ``(row, vocab)`` and the prompt number of each row to one value, or
            tensor, per row. Rows come in any order.
        batch_tokens: upper bound of the tokens in one forward; default that of `extract`.
        share_prefixes: compute common prefixes of prompts once, as in `extract`.

    Returns:
        The readouts, on the CPU.

    Raises:
        InputError: if the model is in training mode, or not compatible with the prompts.

    >>> import lensclust as lc
    >>> prompts = lc.tasks.sif().where(split="new_string")
    >>> guesses = answers(lc.load("native:sif-small"), prompts, lambda logits, _: logits.argmax(-1))
    >>> len(guesses) == len(prompts)
    True
    """
    return answers_with_states(
        model,
        prompts,
        lambda logits, rows, _: readout(logits, rows),
        (),
        batch_tokens=batch_tokens,
        share_prefixes=share_prefixes,
    )


def one_a_row(found: Any, rows: Int[Tensor, " row"]) -> Tensor:
    """Check that the result of a readout, metric or loss has one value, or tensor, per row.

    Raises:
        InputError: if it has not.
    """
    if isinstance(found, Tensor) and found.ndim and len(found) == len(rows):
        return found
    given = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    raise InputError(
        f"readout: the function of logits gave {given} for {len(rows)} prompts, expected a tensor "
        "with one value, or tensor, for each"
    )


def answers_with_states(
    model: TransformerLensModel,
    prompts: Prompts,
    readout: StateReadout,
    hooks: Sequence[str],
    *,
    batch_tokens: int | None = None,
    share_prefixes: bool = True,
) -> Tensor:
    """`answers` for a readout that also uses internal states of the same forward.

    Args:
        model, prompts, batch_tokens, share_prefixes: as in `answers`.
        readout: as in `answers`, with the states at the last token as third argument.
        hooks: names of the hook points to read. Their states are kept for one batch.

    Returns:
        The readouts, on the CPU ``(prompt, ...)``.

    Raises:
        InputError: as `answers`.

    >>> import lensclust as lc
    >>> model, prompts = lc.load("native:sif-small"), lc.tasks.sif().where(split="new_string")
    >>> def unembedded(logits, rows, states):
    ...     return states["ln_final.hook_out"] @ model.W_U + model.b_U - logits
    >>> found = answers_with_states(model, prompts, unembedded, ["ln_final.hook_out"])
    >>> bool(found.abs().max() < 1e-5)
    True
    """
    require_fits(model, prompts, caller="answers")
    reading = _Reading(model, prompts, readout, hooks)
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
    """The readouts of each prompt, in the order in which they are computed."""

    def __init__(
        self,
        model: TransformerLensModel,
        prompts: Prompts,
        readout: StateReadout,
        hooks: Sequence[str],
    ) -> None:
        self.model: Any = model
        self.prompts = prompts
        self.readout = readout
        self.hooks = hooks
        self.parts: list[Tensor] = []
        self.order: list[Tensor] = []

    def result(self) -> Tensor:
        return torch.cat(self.parts)[torch.cat(self.order).argsort()]

    def in_full(self, budget: int) -> None:
        for rows in batches(self.model, self.prompts.lengths, budget):
            self._keep(*self._run_in_full(rows, self.hooks), rows)

    def shared(self, sharing: PrefixSharing, packing: Packing) -> bool:
        """Run with shared prefixes; return whether that succeeded for all prompts."""
        found: list[Tensor] = []

        def read(wanted: Tensor, forward: Forward) -> None:
            group, place, rows, _ = wanted.unbind(1)
            logits, states = self._run(
                lambda hooks: forward(hooks).logits, group, place, self.hooks
            )
            if len(rows):
                self._keep(logits, states, rows)
            if (chosen := rows == packing.farthest).any():
                found.extend(_at(chosen, logits, states))

        def compared() -> Iterator[tuple[Tensor, Tensor]]:
            logits, states = self._run_in_full(torch.tensor([packing.farthest]), self.hooks)
            return zip(found, _at(torch.tensor([True]), logits, states), strict=True)

        if sharing.run(packing, read, compared):
            return True
        self.parts, self.order = [], []
        return False

    def _run_in_full(
        self, rows: Int[Tensor, " row"], hooks: Sequence[str]
    ) -> tuple[Float[Tensor, "row vocab"], States]:
        """Read prompts that are run in full."""
        lengths = self.prompts.lengths[rows]
        tokens = self.prompts.tokens[rows, : int(lengths.max())].to(model_device(self.model))
        return self._run(
            lambda added: self.model.run_with_hooks(
                tokens, fwd_hooks=added, return_type="logits", **without_cache(self.model)
            ),
            torch.arange(len(rows)),
            lengths - 1,
            hooks,
        )

    def _run(
        self,
        forward: Callable[[Hooks], Tensor],
        row: Int[Tensor, " read"],
        place: Int[Tensor, " read"],
        hooks: Sequence[str],
    ) -> tuple[Float[Tensor, "read vocab"], States]:
        """The logits and the states of a forward at the requested positions only."""
        states: dict[str, Tensor] = {}

        def wanted(value: Tensor) -> Tensor:
            return value[row.to(value.device), place.to(value.device)]

        def keep(name: str) -> Callable[[Tensor, Any], None]:
            def hook(value: Tensor, hook: Any) -> None:
                states[name] = wanted(value)

            return hook

        # One sequence of the requested states: unembedding acts on each token separately.
        only = ("unembed.hook_in", lambda value, hook: wanted(value)[None])
        logits = forward([*((name, keep(name)) for name in hooks), only])[0].float()
        if silent := [name for name in hooks if name not in states]:
            raise RuntimeError(
                f"answers: {silent} never fired in {model_name(self.model)}; "
                "load the model with eager attention"
            )
        return logits, states

    def _keep(
        self, logits: Float[Tensor, "row vocab"], states: States, rows: Int[Tensor, " row"]
    ) -> None:
        self.parts.append(one_a_row(self.readout(logits, rows, states), rows).cpu())
        self.order.append(rows)


def _at(chosen: Bool[Tensor, " read"], logits: Tensor, states: States) -> list[Tensor]:
    """Logits and states of one prompt, one vector each."""
    read = (logits, *(states[name] for name in sorted(states)))
    return [value[chosen.to(value.device)].flatten() for value in read]
