"""Interventions on a running model, as context managers that leave no hook behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.errors import InputError
from lensclust.middle_states import require_editable
from lensclust.sites import Site, SiteSelector, hook_name, model_name, resolve
from probes.interventions import Intervention

Positions = Int[Tensor, " row"] | str
NAMED = ("last", "all")


@contextmanager
def steer(
    model: TransformerLensModel,
    intervention: Intervention,
    *,
    at: SiteSelector,
    positions: Positions | None = None,
) -> Iterator[TransformerLensModel]:
    """Run a model with its states changed, for scoring and for generation.

    Contexts nest: the inner one sees the states that the outer one left.

    Args:
        model: a hooked model, in eval mode; its weights are not touched.
        intervention: what to do (`probes.interventions`).
        at: one site or several; at each it acts as fitted there.
        positions: ``"last"``: the last position of every forward, so with a key/value cache
            each generated token in turn; ``"all"``; or one token index for each row of the
            batch, as `Prompts.position` gives it (right-padded prompts need this). By default
            the last of a single row; a batch has to say, because its last column may be padding.

    Yields:
        The model itself.

    Raises:
        InputError: if a site does not exist, or the model is in training mode.
        ValueError: if the indices given do not fit the batch that is run, or a batch of several
            rows is run and no positions were given.

    >>> import lensclust as lc
    >>> from probes.centroids import mean_states
    >>> from probes.interventions import shift
    >>> model, prompts = lc.load("native:sif-small"), lc.tasks.sif().where(split="both")
    >>> means = mean_states(lc.extract(model, prompts, "resid"))
    >>> tokens, last = prompts.tokens[:2], prompts.position("answer")[:2]
    >>> before = model(tokens)
    >>> with steer(model, shift(means, "0", "1"), at="resid 3", positions=last):
    ...     after = model(tokens)
    >>> bool((before == after).all()), bool((model(tokens) == before).all())
    (False, True)
    """
    if getattr(model, "training", False):
        raise InputError(f"steer: {model_name(model)} is in training mode; call model.eval()")
    if not isinstance(positions, Tensor) and positions not in (None, *NAMED):
        raise InputError(
            f"steer: positions={positions!r}, expected one of {NAMED} or a tensor of indices"
        )
    hooked: Any = model
    sites = resolve(model, at)
    require_editable(model, sites, caller="steer")
    hooks = [(hook_name(model, site), _hook(site, intervention, positions)) for site in sites]
    with hooked.hooks(fwd_hooks=hooks):
        yield model


def _hook(site: Site, intervention: Intervention, positions: Positions | None) -> Any:
    edit = intervention.edit_at(site)

    def hook(value: Tensor, hook: Any) -> Tensor:
        changed = value.clone()
        # A view: what is written to it is written to `changed`.
        states = changed if site.head is None else changed[:, :, site.head]
        if isinstance(positions, Tensor):
            if len(positions) != len(value):
                raise ValueError(
                    f"steer: {len(positions)} positions given, but a batch of {len(value)} was run"
                )
            if int(positions.max()) >= value.shape[1]:
                raise ValueError(
                    f"steer: position {int(positions.max())} given, but a batch of "
                    f"{value.shape[1]} tokens a row was run"
                )
            rows = torch.arange(len(value), device=value.device)
            place = (rows, positions.to(value.device))
            states[place] = edit(states[place])
        elif positions is None and len(value) > 1:
            raise ValueError(
                f"steer: a batch of {len(value)} rows was run and no positions were given: "
                "expected one index a row, as prompts.position('answer') gives them, or 'last' "
                "where no row is padded on the right"
            )
        elif positions in (None, "last"):
            states[:, -1] = edit(states[:, -1])
        else:
            states[:] = edit(states.flatten(0, 1)).reshape(states.shape)
        return changed

    return hook
