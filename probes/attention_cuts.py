"""Keep the question from looking at some of what came before it, and read the answer.

Where tokens are hidden, the attention of every later token from a given one on is taken off
them in all heads of the chosen blocks, and what is left adds up to one again: what a mask
before the softmax gives. States of the hidden tokens themselves, and what other tokens before
the question took from them, stay. As evidence, hide as many other tokens beside.

Source: attention knock-out, Geva et al. 2023 (arXiv 2304.14767).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.batching import batches, default_budget, model_device, without_cache
from lensclust.errors import InputError
from lensclust.fits import require_fits
from lensclust.prompts import Prompts
from lensclust.readouts import Readout
from lensclust.sites import model_name


def answers_cut_off(
    model: TransformerLensModel,
    prompts: Prompts,
    readout: Readout,
    hidden: Bool[Tensor, "prompt position"],
    *,
    since: str = "query_start",
    blocks: Sequence[int] | None = None,
    batch_tokens: int | None = None,
) -> Tensor:
    """What ``readout`` makes of the last token's logits while some tokens are out of sight.

    Args:
        model: a hooked model, in eval mode, with eager attention.
        prompts: what to run.
        readout: as in `lensclust.readouts.answers`.
        hidden: tokens that are not to be looked at.
        since: read position of the first token that does not see them.
        blocks: where; all unless given.
        batch_tokens: upper bound of the tokens that one forward runs; default that of `extract`.

    Raises:
        InputError: if the tokens have another shape, one that is hidden does not stand before
            ``since``, there is no such position or block, a block shows no pattern, or the
            prompts do not fit the model.

    >>> import lensclust as lc
    >>> model, prompts = lc.load("native:sif-small"), lc.tasks.sif().where(split="new_string")
    >>> hidden = torch.zeros_like(prompts.tokens, dtype=torch.bool)
    >>> cuts = []
    >>> for seen in (True, False):
    ...     hidden[:, 0] = not seen
    ...     cuts += [answers_cut_off(model, prompts, lambda x, _: x, hidden, since="answer")]
    >>> bool((cuts[0] - cuts[1]).abs().max() > 1e-3)
    True
    """
    require_fits(model, prompts, caller="answers_cut_off")
    begin = prompts.position(since)
    if hidden.shape != prompts.tokens.shape:
        raise InputError(
            f"answers_cut_off: hidden tokens of shape {tuple(hidden.shape)}, expected "
            f"{tuple(prompts.tokens.shape)} as of the prompts"
        )
    late = (hidden & (torch.arange(hidden.shape[1]) >= begin[:, None])).nonzero()
    if len(late):
        row, place = late[0].tolist()
        raise InputError(
            f"answers_cut_off: token {place} of prompt {row} is hidden, expected tokens before "
            f"{since!r}, which is {int(begin[row])}"
        )
    chosen = range(model.cfg.n_layers) if blocks is None else list(blocks)
    if unknown := [block for block in chosen if not 0 <= block < model.cfg.n_layers]:
        raise InputError(
            f"answers_cut_off: block {unknown[0]} does not exist: {model_name(model)} has blocks "
            f"0..{model.cfg.n_layers - 1}"
        )
    names = [f"blocks.{block}.attn.hook_pattern" for block in chosen]
    hooked: Any = model
    device = model_device(model)
    parts, order = [], []
    with torch.no_grad():
        for rows in batches(prompts.lengths, batch_tokens or default_budget(model)):
            last = prompts.lengths[rows] - 1
            width = int(last.max()) + 1
            cut = _Cut(hidden[rows, :width].to(device), begin[rows].to(device))
            states = _only_last(last)
            logits = hooked.run_with_hooks(
                prompts.tokens[rows, :width].to(device),
                fwd_hooks=[*((name, cut) for name in names), states],
                return_type="logits",
                **without_cache(model),
            )[0]
            if cut.fired < len(names):
                raise InputError(
                    f"answers_cut_off: {model_name(model)} shows {cut.fired} of {len(names)} "
                    "patterns; load the model with eager attention"
                )
            parts.append(readout(logits.float(), rows).cpu())
            order.append(rows)
    return torch.cat(parts)[torch.cat(order).argsort()]


class _Cut:
    """A hook that takes attention off hidden tokens; counts how often it was asked."""

    def __init__(self, hidden: Bool[Tensor, "row key"], begin: Int[Tensor, " row"]) -> None:
        looks = torch.arange(hidden.shape[1], device=hidden.device) >= begin[:, None]
        self.gone = (looks[:, :, None] & hidden[:, None, :])[:, None]
        self.fired = 0

    def __call__(
        self, pattern: Float[Tensor, "row head query key"], hook: Any
    ) -> Float[Tensor, "row head query key"]:
        self.fired += 1
        left = pattern.masked_fill(self.gone, 0)
        return left / left.sum(-1, keepdim=True).clamp(min=torch.finfo(left.dtype).tiny)


def _only_last(last: Int[Tensor, " row"]) -> tuple[str, Callable[[Tensor, Any], Tensor]]:
    """Unembed the last token of each row, as one sequence."""
    row = torch.arange(len(last))
    return "unembed.hook_in", lambda states, hook: states[
        row.to(states.device), last.to(states.device)
    ][None]
