"""How much each attention head is engaged by a task: attention times its gradient.

    c_ilh = sum_qk A_ilh[q, k] dL_i/dA_ilh[q, k]        L_i the loss of prompt i
    activation of head h of block l = mean over prompts of |c_ilh|

computed as the gradient of a gate on the head (`probes.head_gates`), without attention matrices
(by the model's own fused kernel, where it has one: `lensclust.fused_attention`).

L_i is the mean cross-entropy of the answer's tokens, and prompts are summed: numbers do not
depend on how prompts are batched. (The authors' script takes the mean over all answer tokens of
a batch; its numbers are these times the prompt's share of the batch's answer tokens.)

Source: Zhao et al. (arXiv 2409.15820, ACL 2025 long 831); that the absolute value is taken of
each prompt's sum is read off the authors' published script. As an importance of heads: Michel,
Levy & Neubig (arXiv 1905.10650), there normalised by layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformer_lens.model_bridge import TransformerBridge

from lensclust.arguments import checked_arguments
from lensclust.batching import BACKWARD, batches, default_budget
from lensclust.errors import InputError
from lensclust.fingerprints import fingerprint_again
from lensclust.fits import require_fits
from lensclust.fused_attention import fused_attention
from lensclust.gradients import with_gradients
from lensclust.placement import model_device
from lensclust.progress import progress_bar
from lensclust.prompts import Prompts
from lensclust.readouts import Readout
from lensclust.sites import head_blocks, model_name
from probes.activation_patterns import AXES, HeadActivation
from probes.head_gates import (
    RowLosses,
    gate_gradients,
    require_attention_times_gradient,
    require_reach,
)

# One forward's tokens over those of one with a backward, where attention is fused.
FUSED = 2


@checked_arguments
@with_gradients
def head_activation(
    model: TransformerBridge,
    prompts: Prompts,
    *,
    loss: str | Readout = "answer",
    batch_tokens: int | None = None,
    progress: bool = True,
) -> HeadActivation:
    """The activation of every head by prompts: attention times gradient of the loss, absolute.

    Args:
        model: a hooked model, in eval mode. Its parameters are frozen meanwhile, and then as
            they were.
        prompts: with an answer each, for ``loss="answer"``.
        loss: ``"answer"``, the mean cross-entropy of a prompt's answer tokens in nats; or a
            function of the logits at the last token of prompts ``(row, vocab)`` and the numbers
            of the prompts to one differentiable loss a row, each of its own row alone.
        batch_tokens: upper bound of the tokens of one forward and backward; default a quarter of
            that of `lensclust.extract`, since a backward holds every layer's states, and half of
            it where no attention matrices are among them.
        progress: show a bar.

    Returns:
        A number for each prompt and head (blocks without attention have none), in nats, with its
        sign and without.

    Raises:
        InputError: if the model is in training mode, prompts do not fit it or have no answer, a
            loss or its gradient is not finite (of which prompt), or the numbers would not be
            attention times gradient: attention that fires hooks beside the computation, a norm
            before ``hook_z``, or weights whose code has no backward. That is tried once for each
            model, on the shortest prompt.

    >>> import lensclust as lc
    >>> model, prompts = lc.load("native:sif-small"), lc.tasks.sif().where(split="new_string")
    >>> found = head_activation(model, prompts)
    >>> found.pattern.dims, found.pattern.shape, bool((found.pattern > 0).all())
    (('block', 'head'), (6, 4), True)
    """
    if batch_tokens is not None and batch_tokens < 1:
        raise InputError(f"head_activation: batch_tokens={batch_tokens}, expected at least 1")
    scoring = _scoring(model, prompts, loss)
    shortest = scoring.batch(scoring.lengths.argmin().repeat(2))
    require_attention_times_gradient(model, *shortest)
    losses = torch.empty(len(prompts), dtype=torch.float64)
    signed: list[Tensor] = []
    order: list[Tensor] = []
    with (
        fused_attention(model, int(scoring.lengths.max())) as fused,
        progress_bar("head_activation", len(prompts), enabled=progress) as advance,
    ):
        budget = batch_tokens or max(1, default_budget(model) // (FUSED if fused else BACKWARD))
        require_reach(model, *shortest, path=fused)
        for rows in batches(model, scoring.lengths, budget):
            found, gradients = gate_gradients(model, *scoring.batch(rows))
            _require_finite(rows, found, "loss")
            _require_finite(rows, gradients.flatten(1).sum(1), "gradient of the loss")
            losses[rows] = found.double().cpu()
            signed.append(gradients.cpu())
            order.append(rows)
            advance(len(rows))
    back = torch.cat(order).argsort()
    return HeadActivation(
        _dataset(model, prompts, torch.cat(signed)[back].numpy(), losses.numpy(), scoring.name)
    )


@dataclass(frozen=True, eq=False)
class _Scoring:
    """What is run, where logits are made, and how they make the loss of each row."""

    name: str
    device: torch.device
    tokens: Int[Tensor, "prompt length"]
    lengths: Int[Tensor, " prompt"]
    scored: Bool[Tensor, "prompt length"]
    losses: Callable[[Int[Tensor, " row"]], RowLosses]

    def batch(
        self, rows: Int[Tensor, " row"]
    ) -> tuple[Int[Tensor, "row length"], Bool[Tensor, "row length"], RowLosses]:
        """These prompts' tokens without needless padding, and what goes with them."""
        longest = int(self.lengths[rows].max())
        tokens, scored = (each[rows, :longest] for each in (self.tokens, self.scored))
        return tokens.to(self.device), scored.to(self.device), self.losses(rows)


def _scoring(model: TransformerBridge, prompts: Prompts, loss: str | Readout) -> _Scoring:
    if not isinstance(loss, str):
        return _last_token(model, prompts, loss)
    if loss != "answer":
        raise InputError(
            f"head_activation: loss {loss!r} is not known: expected 'answer' or a function of "
            "logits and prompt numbers"
        )
    if prompts.answers is None or not all(prompts.answers):
        given = prompts.answers or [()]
        without = next(index for index, answer in enumerate(given) if not answer)
        raise InputError(
            f"head_activation: prompt {without} has no answer, expected one for each prompt; give "
            "loss= a function of logits if there are none"
        )
    tokens, lengths, answered = prompts.with_answers()
    # The last token of an answer is predicted, never read; its id has to exist all the same.
    lengths = lengths - 1
    require_fits(model, replace(prompts, tokens=tokens, lengths=lengths), caller="head_activation")
    targets, scored = tokens[:, 1:], answered[:, 1:]

    def losses(rows: Int[Tensor, " row"]) -> RowLosses:
        wanted, counts = targets[rows][scored[rows]], scored[rows].sum(1)

        def of(logits: Tensor, owner: Tensor) -> Float[Tensor, " row"]:
            each = F.cross_entropy(logits, wanted.to(logits.device), reduction="none")
            share = each / counts.to(each)[owner]
            return torch.zeros(len(rows)).to(each).index_add(0, owner, share)

        return of

    device = model_device(model)
    return _Scoring("answer", device, tokens[:, :-1], lengths, scored, losses)


def _last_token(model: TransformerBridge, prompts: Prompts, loss: Readout) -> _Scoring:
    require_fits(model, prompts, caller="head_activation")
    scored = torch.arange(prompts.tokens.shape[1]) == prompts.lengths[:, None] - 1

    def losses(rows: Int[Tensor, " row"]) -> RowLosses:
        def of(logits: Tensor, owner: Tensor) -> Float[Tensor, " row"]:
            found: Any = loss(logits, rows)
            if not isinstance(found, Tensor) or found.shape != rows.shape:
                is_tensor = isinstance(found, Tensor)
                given = f"of shape {tuple(found.shape)}" if is_tensor else type(found).__name__
                raise InputError(
                    f"head_activation: the loss of {len(rows)} prompts is {given}, expected one "
                    "number each, in a tensor"
                )
            return found

        return of

    name = getattr(loss, "__name__", "loss").strip("<>")
    return _Scoring(name, model_device(model), prompts.tokens, prompts.lengths, scored, losses)


def _require_finite(rows: Int[Tensor, " row"], values: Float[Tensor, " row"], what: str) -> None:
    bad = (~torch.isfinite(values)).nonzero()[:, 0].cpu()
    if len(bad):
        row = int(rows[bad].min())
        raise InputError(
            f"head_activation: the {what} of prompt {row} is not finite"
            f"{f' (nor of {len(bad) - 1} others of its batch)' if len(bad) > 1 else ''}"
        )


def _dataset(
    model: Any, prompts: Prompts, signed: np.ndarray, losses: np.ndarray, name: str
) -> xr.Dataset:
    labels = prompts.label_arrays()
    if taken := [label for label in labels if label in (*AXES, "signed", "loss")]:
        raise InputError(
            f"head_activation: label {taken[0]!r} of the rows is the name of an axis or variable"
        )
    return xr.Dataset(
        {"signed": (AXES, signed), "loss": (("prompt",), losses)},
        {
            "block": head_blocks(model),
            "head": np.arange(signed.shape[2]),
            **{label: ("prompt", values) for label, values in labels.items()},
        },
        {
            "model": model_name(model),
            "weights": fingerprint_again(model),
            "tokenizer": prompts.tokenizer,
            "prompts": prompts.digest(),
            "loss": name,
        },
    )
