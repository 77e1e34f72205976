"""Run the same prompts with many single-state edits, sharing their common prefixes.

Each edit replaces one site's state at one position of every prompt; the logits of the last token
give its effect. Edits of any sites and layers share forwards, and the tokens before the edited
position are run once (`probes.patching.prefixes` describes models and costs).
Exact sharing of prefixes is checked: a model has to pass the check of
`lensclust.inference.prefix_sharing.sharing`, then the shortest and the longest prompt are run both
ways, and a model that disagrees is run in full instead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge.sources.native import NativeModel
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.inference import Readout, answers, one_a_row, require_editable, require_fits
from lensclust.inference.prefix_sharing import (
    FAILURES,
    callers_hooks,
    log_refusal,
    named,
    obstacle,
    refusal,
    refuse,
)
from lensclust.models import (
    agrees,
    announced,
    blocks_of,
    default_budget,
    hook_name,
    length_steps,
    relative_error,
    require_effect,
    resolve,
)
from lensclust.progress import progress_bar
from lensclust.prompts import Prompts
from probes.patching.edits import Edit
from probes.patching.prefixes import PACKED_TOKENS, Batch, Way, batch_width, packed, stacked, ways

__all__ = ["Edit", "Readout", "answers", "one_a_row", "replay"]


@checked_arguments
def replay(
    model: TransformerLensModel,
    prompts: Prompts,
    edits: Sequence[Edit],
    readout: Readout,
    *,
    at: str = "answer",
    batch_tokens: int | None = None,
    progress: bool = False,
) -> Tensor:
    """Run every prompt once for each edit and read the logits of its last token.

    Args:
        model: a hooked model, in eval mode.
        prompts: prompts to run.
        edits: ``(site, values)``: at position ``at`` the state of the site becomes ``values
            (prompt, d)``, and nothing else changes. ``d`` is ``d_head`` for ``head`` and ``z``
            (of ``hook_z``, before ``W_O``), else ``d_model``. A site may be repeated.
        readout: from logits ``(row, vocab)`` and the prompt of each row to one value, or tensor,
            per row. Rows come in any order.
        at: the edited position (`Prompts.position`).
        batch_tokens: upper bound of the tokens that one forward runs; default that of `extract`.
        progress: show a bar.

    Returns:
        ``(edit, prompt, ...)``: values of ``readout``, on the CPU.

    Raises:
        InputError: if a site or position does not exist, an edit there has no effect, values have
            the wrong shape, the model is in training mode, or the prompts are incompatible with
            it.

    >>> import lensclust as lc
    >>> model = lc.load("native:sif-small")
    >>> prompts = lc.tasks.sif().where(split="new_string")
    >>> silence = torch.zeros(len(prompts), model.cfg.d_head)
    >>> edits = [(site, silence) for site in resolve(model, "head")]
    >>> replay(model, prompts, edits, lambda logits, rows: logits.argmax(-1)).shape[0]
    24
    """
    _check(model, prompts, edits, batch_tokens)
    positions, budget = prompts.position(at), batch_tokens or default_budget(model)
    with torch.no_grad():
        way = _exact_way(model, prompts, positions, len(edits), budget)
        columns = batch_width(model, len(edits)) if way is packed else lambda width, suffix: width
        out: Tensor | None = None
        with progress_bar("replay", len(edits) * len(prompts), enabled=progress) as advance:
            runs = _batches(prompts.lengths, positions, budget, columns, apart=length_steps(model))
            for rows in announced(runs, 0):
                batch = Batch.of(prompts, rows, positions)
                prepared = way(model, batch, budget)
                for start in range(0, len(edits), prepared.at_once):
                    some = edits[start : start + prepared.at_once]
                    logits = prepared.run(some).flatten(0, 1).float()
                    each = rows.repeat(len(some))
                    read = one_a_row(readout(logits, each), each)
                    if out is None:
                        out = read.new_empty(
                            (len(edits), len(prompts), *read.shape[1:]), device="cpu"
                        )
                    out[start : start + len(some), rows] = read.unflatten(0, (len(some), -1)).cpu()
                    advance(len(some) * len(rows))
    assert out is not None  # there are edits and prompts
    return out


def _check(
    model: TransformerLensModel, prompts: Prompts, edits: Sequence[Edit], batch_tokens: int | None
) -> None:
    require_fits(model, prompts, caller="replay")
    if not edits:
        raise InputError("replay: no edit given; `answers` reads the unedited model")
    if batch_tokens is not None and batch_tokens < 1:
        raise InputError(f"replay: batch_tokens={batch_tokens}, expected at least 1")
    sites = resolve(model, list(dict.fromkeys(site for site, _ in edits)))
    require_effect(model, [hook_name(model, site) for site in sites], caller="replay")
    require_editable(model, sites, caller="replay")
    blocks = blocks_of(model)
    for number, (site, values) in enumerate(edits):
        block = blocks[min(site.layer, len(blocks) - 1)]
        size = block.d_model if site.head is None else block.d_head
        if tuple(values.shape) != (len(prompts), size):
            raise InputError(
                f"replay: edit {number} ({site}) has values of shape {tuple(values.shape)}, "
                f"expected {(len(prompts), size)}: one state for each prompt"
            )


def _exact_way(
    model: TransformerLensModel,
    prompts: Prompts,
    positions: Int[Tensor, " prompt"],
    edits: int,
    budget: int,
) -> Way:
    """The cheapest way whose logits agree with plain forwards on the two extreme prompts."""
    candidates = ways(model, int((2 * prompts.lengths - positions).max()))
    if len(candidates) == 1 or int(positions.max()) == 0:
        return stacked
    rows = torch.stack([prompts.lengths.argmin(), prompts.lengths.argmax()]).unique()
    native = isinstance(getattr(model, "original_model", None), NativeModel)
    longest, suffix = (int(x.max()) for x in (prompts.lengths, prompts.lengths - positions))
    keys = longest + min(edits * suffix, PACKED_TOKENS)
    # Native models have no cache: they share within one sequence, by a mask.
    if (why_not := callers_hooks(model) if native else obstacle(model)) is not None:
        log_refusal(model, "replay", why_not, level=logging.INFO)
        return stacked
    if not native and (why_not := refusal(model, longest, keys)) is not None:
        log_refusal(model, "replay", why_not)
        return stacked
    plain = torch.cat(
        [
            stacked(model, Batch.of(prompts, row[None], positions), budget).run([None])
            for row in rows
        ],
        dim=1,
    )
    for way in candidates[:-1]:
        try:
            batch = Batch.of(prompts, rows, positions)
            # The maximum number of copies: none may attend to another.
            prepared = way(model, batch, len(rows) * budget)
            found = prepared.run([None] * min(edits, prepared.at_once))
        except FAILURES as failure:
            why_not = named(failure)
        else:
            expected = plain.expand_as(found)
            if agrees(found, expected):
                return way
            why_not = f"relative error {relative_error(found, expected):.2g} of logits"
        (log_refusal if native else refuse)(model, "replay", why_not)
    return stacked


def _batches(
    lengths: Int[Tensor, " prompt"],
    positions: Int[Tensor, " prompt"],
    budget: int,
    columns: Callable[[int, int], int],
    *,
    apart: Sequence[int],
) -> Iterator[Int[Tensor, " row"]]:
    """Batches of prompts with similar suffix lengths, the longest first, within the budget.

    Args:
        apart: as in `lensclust.models.batches`.
    """
    suffixes = lengths - positions
    steps = sum((lengths > step for step in apart), torch.zeros_like(lengths))
    order = sorted(
        range(len(lengths)),
        key=lambda row: (int(steps[row]), int(suffixes[row]), int(lengths[row])),
        reverse=True,
    )
    rows: list[int] = []
    for row in order:
        wider = [*rows, row]
        width = int(lengths[wider].max())
        full = len(wider) * columns(width, int(suffixes[wider].max())) > budget
        if rows and (full or steps[row] != steps[rows[-1]]):
            yield torch.tensor(rows)
            wider = [row]
        rows = wider
    yield torch.tensor(rows)
