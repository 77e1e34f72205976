"""Apply interventions to a running model, as context managers that remove their hooks.

Positions are those of the sequence. While a model generates, an edit is made in the forward that
computes its token: in the prefill, in a forward of one token with a key/value cache, or in every
forward of the whole sequence without one. So a cache changes the time, not the result; where it
would change the result (because of the libraries, or of rotary frequencies that depend on the
length of the sequence), a forward with a cache raises an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.inference import require_editable, require_model
from lensclust.models import (
    Site,
    SiteSelector,
    hook_name,
    model_name,
    require_effect,
    resolve,
    rows_being_run,
    uncached,
    wrong_with_cache,
)
from probes.steering.interventions import Edit, Intervention
from probes.steering.positions import Stretch, following

# One token index for every row of the batch, or for each.
Indices = int | Sequence[int] | np.ndarray | pd.Series | Tensor
Positions = Indices | str
NAMED = ("last", "all")


@checked_arguments
@contextmanager
def steer(
    model: TransformerLensModel,
    intervention: Intervention,
    *,
    at: SiteSelector,
    positions: Positions | None = None,
    since: Indices | None = None,
) -> Iterator[TransformerLensModel]:
    """Run a model with its states changed, for scoring and for generation.

    Contexts nest: the inner one gets the states that the outer one edited. A network that was
    passed to `lensclust.load` in memory is not changed: run the hooked model.

    Args:
        model: a hooked model, in eval mode; its weights are unchanged.
        intervention: the edit (`probes.steering.interventions`).
        at: one site or several; at each the edit fitted there is applied.
        positions: which tokens of the sequence are changed, prompt and generated ones alike:

            - a token index, one for all rows of the batch or one for each, as `Prompts.position`
              gives it: that token alone;
            - ``"last"``: the last token of the prompt and every token generated after it. Outside
              ``generate`` a forward without a cache is a separate prompt;
            - ``"all"``: every token.

            Default: the last of a single row; a batch needs ``positions``, because its last column
            may be padding.
        since: instead of ``positions``, a token index, one for all rows or one for each: that
            token and every later one. The length of a prompt means the generated tokens alone.

    Indices count the tokens of a row from 0 without the padding that an attention mask hides, so
    they are the same for a prompt alone, in a batch padded on the right, and in one padded on the
    left, as ``generate`` pads a list of texts.

    Yields:
        The model itself.

    Raises:
        InputError: if a site does not exist, an edit there has no effect (`require_effect`),
            the model is in training mode, or both ``positions`` and ``since`` are given. From the
            forward: if the indices do not fit the batch or the sequence, a batch of several rows
            is run without positions, the position of a forward in its sequence cannot be
            determined, or a cache would change the result. At the end, if a generated sequence
            did not reach an index.

    >>> import lensclust as lc
    >>> from probes import mean_states
    >>> from probes import shift
    >>> model, prompts = lc.load("native:sif-small"), lc.tasks.sif().where(split="both")
    >>> means = mean_states(lc.extract(model, prompts, "resid"))
    >>> tokens, last = prompts.tokens[:2], prompts.position("answer")[:2]
    >>> before = model(tokens)
    >>> with steer(model, shift(means, "0", "1"), at="resid 3", positions=last):
    ...     after = model(tokens)
    >>> bool((before == after).all()), bool((model(tokens) == before).all())
    (False, True)
    """
    require_model(model, caller="steer")
    if not isinstance(intervention, Intervention):
        raise InputError(
            f"steer: {type(intervention).__name__} given as intervention, expected one as from "
            "probes.shift or probes.transport"
        )
    places = _Places(_checked(positions, since), since is not None)
    sites = resolve(model, at)
    require_editable(model, sites, caller="steer")
    require_effect(model, [hook_name(model, site) for site in sites], caller="steer")

    def notice(stretch: Stretch) -> None:
        if stretch.cached:
            before, until = int(stretch.index[:, 0].max()), int(stretch.index.max()) + 1
            # A separate prompt is right at any length.
            start = before if before > 0 else until
            if (why := wrong_with_cache(model, start, until)) is not None:
                raise InputError(
                    f"steer: {model_name(model)} generates wrongly with a key/value cache ({why}): "
                    f"{uncached(model)}"
                )
        places.notice(stretch)

    hooked: Any = model
    hooks = [(hook_name(model, site), _hook(site, intervention, places)) for site in sites]
    with following(model, notice, caller="steer"), hooked.hooks(fwd_hooks=hooks):
        yield model
    places.require_reached()


def _checked(positions: Positions | None, since: Indices | None) -> Tensor | str | None:
    """Indices as a tensor, names unchanged."""
    if positions is not None and since is not None:
        raise InputError("steer: both positions and since given, expected one of them")
    name, given = ("positions", positions) if since is None else ("since", since)
    if given is None or (name == "positions" and isinstance(given, str) and given in NAMED):
        return given
    expected = f"expected {f'one of {NAMED} or ' if name == 'positions' else ''}token indices"
    if isinstance(given, str):
        raise InputError(f"steer: {name}={given!r}, {expected}")
    try:
        found = given if isinstance(given, Tensor) else torch.from_numpy(np.array(given))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"steer: {name} is a {type(given).__name__}, {expected}") from error
    whole = not (found.dtype == torch.bool or found.is_floating_point())
    if not whole or found.ndim > 1 or not found.numel():
        raise InputError(
            f"steer: {name} of type {found.dtype} and shape {tuple(found.shape)}, expected one "
            "integer for all rows or one for each"
        )
    if int(found.min()) < 0:
        raise InputError(
            f"steer: {name} hold {int(found.min())}, expected indices from 0 (where a row ends is "
            "not known; prompts.position('answer') gives the last token of each)"
        )
    return found.long()


class _Places:
    """The tokens of the current forward that are edited.

    Args:
        wanted: a name, an index for all rows, or one for each; None for the last of a single row.
        onwards: also edit every later token.
    """

    def __init__(self, wanted: Tensor | str | None, onwards: bool) -> None:
        self.wanted = wanted
        self.onwards = onwards or not isinstance(wanted, Tensor)
        # Wanted index of each row of the current sequence, and number of tokens run so far.
        self.sequence: tuple[Tensor, Tensor] | None = None

    def notice(self, stretch: Stretch) -> None:
        """Record the start of a forward."""
        index = stretch.index
        first = self._first(stretch).expand(len(index))
        wanted = first.to(index.device)[:, None]
        chosen = (index >= wanted.clamp_min(0)) if self.onwards else index == wanted
        self.shape = tuple(index.shape)
        self.rows, self.columns = chosen.nonzero(as_tuple=True)
        self.each_once = torch.equal(self.rows, torch.arange(len(index), device=index.device))
        if isinstance(self.wanted, Tensor):
            if stretch.begins:
                self.require_reached()
                self.sequence = first, torch.zeros_like(index[:, 0])
            run = index.amax(1) + 1
            if self.sequence is not None and len(self.sequence[1]) == len(run):
                run = torch.maximum(run, self.sequence[1])
            self.sequence = first, run
            if not stretch.goes_on:
                self.require_reached()

    def change(self, value: Tensor, site: Site, edit: Edit, by_row: bool) -> Tensor:
        """The states of a site, edited at the chosen tokens."""
        if tuple(value.shape[:2]) != self.shape:
            raise InputError(
                f"steer: states of shape {tuple(value.shape)} stand at {site}, expected "
                f"{self.shape} rows and tokens first"
            )
        if not len(self.rows):
            return value
        changed = value.clone()
        # A view: writing to it writes to `changed`.
        states = changed if site.head is None else changed[:, :, site.head]
        rows, columns = self.rows.to(value.device), self.columns.to(value.device)
        if by_row and not self.each_once:
            # Edits all rows at once, then keeps the chosen ones.
            for column in columns.unique().tolist():
                here = rows[columns == column]
                states[here, column] = edit(states[:, column])[here]
        else:
            states[rows, columns] = edit(states[rows, columns])
        return changed

    def require_reached(self) -> None:
        """Raise InputError for an index beyond the end of the finished sequence.

        Raises:
            InputError: names the index and the length.
        """
        if self.sequence is None:
            return
        wanted, run = (each.cpu() for each in self.sequence)
        self.sequence = None
        if len(beyond := (wanted + (not self.onwards) > run).nonzero()):
            row = int(beyond[0])
            raise InputError(
                f"steer: position {int(wanted[row])} given, but a batch of {int(run[row])} tokens "
                f"a row was run (row {row})"
            )

    def _first(self, stretch: Stretch) -> Tensor:
        """Index of the first token to change, for all rows or for each."""
        rows = len(stretch.index)
        inside = rows_being_run()
        if isinstance(self.wanted, Tensor):
            wanted = self.wanted.cpu()
            if wanted.ndim == 0:
                return wanted
            if inside is not None and len(wanted) == inside.total:
                wanted = wanted[inside.which]
            elif inside is not None:
                raise InputError(
                    f"steer: {len(wanted)} positions given, but {inside.total or 'other'} rows are "
                    "run in the library's order: give one index for all, or a position "
                    "for each prompt of one shard"
                )
            if len(wanted) != rows:
                raise InputError(
                    f"steer: {len(wanted)} positions given, but a batch of {rows} was run: a "
                    "function that batches by itself needs one index for all rows, or 'all'"
                )
            return wanted
        if self.wanted == "all":
            return torch.tensor(0)
        if inside is not None and not inside.whole:
            raise InputError(
                "steer: prompts that the library batches are cut and padded: expected one index a "
                "prompt, as prompts.position('answer') gives them, or 'all'"
            )
        if self.wanted is None and rows > 1:
            raise InputError(
                f"steer: a batch of {rows} rows was run and no positions were given: "
                "expected one index a row, as prompts.position('answer') gives them, or 'last' "
                "where no row is padded on the right"
            )
        if stretch.prompt_end is None or len(stretch.prompt_end) != rows:
            raise InputError(
                "steer: the last token of a prompt that is run in pieces, or was run before, is "
                "not known: give its index, since=prompts.position('answer')"
            )
        return stretch.prompt_end


def _hook(site: Site, intervention: Intervention, places: _Places) -> Any:
    edit = intervention.edit(site)

    def hook(value: Tensor, hook: Any) -> Tensor:
        return places.change(value, site, edit, intervention.by_row)

    return hook
