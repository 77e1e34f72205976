"""Keep the question from looking at some of what came before it, and read the answer.

Attention knockout: every token from a given one on is kept from attending to the hidden tokens,
in all heads of the chosen blocks, by a mask before the softmax. States of the hidden tokens
themselves, and what other tokens before the question took from them, stay; so does what blocks
without attention (convolutions, state-space layers) carry along. That tokens are out of sight is
checked once for each model and block (`probes.attention_masks`). As evidence, hide as many other
tokens beside.

Source: attention knock-out, Geva et al. 2023 (arXiv 2304.14767).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.batching import batches, default_budget, without_cache
from lensclust.errors import InputError
from lensclust.fits import require_fits
from lensclust.placement import model_device
from lensclust.prompts import Prompts
from lensclust.readouts import Readout, one_a_row
from lensclust.sites import model_name
from probes.attention_masks import attention_blocks, hidden_from, hiding_places


def answers_cut_off(
    model: TransformerLensModel,
    prompts: Prompts,
    readout: Readout,
    hidden: Bool[Tensor, "prompt position"],
    *,
    since: str = "query_start",
    blocks: int | Sequence[int] | None = None,
    batch_tokens: int | None = None,
) -> Tensor:
    """What ``readout`` makes of the last token's logits while some tokens are out of sight.

    Args:
        model: a hooked model, in eval mode.
        prompts: what to run.
        readout: as in `lensclust.readouts.answers`.
        hidden: tokens that are not to be looked at.
        since: read position of the first token that does not see them.
        blocks: where; all that have attention unless given.
        batch_tokens: upper bound of the tokens that one forward runs; default that of `extract`.

    Raises:
        InputError: if the tokens have another shape, one that is hidden does not stand before
            ``since``, there is no such position or block, a block has no attention or none
            that tokens can be hidden from, or the prompts do not fit the model.

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
    hidden = torch.as_tensor(hidden)
    if hidden.dtype != torch.bool:
        raise InputError(
            f"answers_cut_off: hidden tokens of type {hidden.dtype}, expected a mask of "
            "true and false"
        )
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
    given = [blocks] if isinstance(blocks, int) else blocks
    chosen = attention_blocks(model) if given is None else list(given)
    if unknown := [block for block in chosen if not 0 <= block < model.cfg.n_layers]:
        raise InputError(
            f"answers_cut_off: block {unknown[0]} does not exist: {model_name(model)} has blocks "
            f"0..{model.cfg.n_layers - 1}"
        )
    if blocks is None and not chosen:
        raise InputError(
            f"answers_cut_off: {model_name(model)} has no block whose attention can be reached"
        )
    places = hiding_places(model, chosen, caller="answers_cut_off")
    hooked: Any = model
    device = model_device(model)
    parts, order = [], []
    with torch.no_grad():
        for rows in batches(model, prompts.lengths, batch_tokens or default_budget(model)):
            last = prompts.lengths[rows] - 1
            width = int(last.max()) + 1
            looks = torch.arange(width) >= begin[rows][:, None]
            gone = (looks[:, :, None] & hidden[rows, None, :width])[:, None].to(device)
            with hidden_from(model, places, dict.fromkeys(places, gone)):
                logits = hooked.run_with_hooks(
                    prompts.tokens[rows, :width].to(device),
                    fwd_hooks=[_only_last(last)],
                    return_type="logits",
                    **without_cache(model),
                )[0]
            parts.append(one_a_row(readout(logits.float(), rows), rows).cpu())
            order.append(rows)
    return torch.cat(parts)[torch.cat(order).argsort()]


def _only_last(last: Int[Tensor, " row"]) -> tuple[str, Callable[[Tensor, Any], Tensor]]:
    """Unembed the last token of each row, as one sequence."""
    row = torch.arange(len(last))
    return "unembed.hook_in", lambda states, hook: states[
        row.to(states.device), last.to(states.device)
    ][None]
