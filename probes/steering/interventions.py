"""Interventions that move states from one task's cluster to another's, with controls.

An `Intervention` is a function from states to states at any site, independent of a model:
`probes.steering.steer` applies it to one, `probes.steering.interchange` measures its effect.

Standard of evidence: an intervention that changes the answer is weak evidence unless a norm-matched
random direction does not (`Intervention.random_twin`), nor a shift between means of shuffled labels
(`with_shuffled_labels`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformer_lens.utilities.statistics import derive_generator

from lensclust.activations import VARIABLES, prompt_labels
from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.models import Site
from lensclust.prompts import MISSING, label_text, label_texts

States = Float[Tensor, "row d"]
Edit = Callable[[States], States]
Label = Any  # a text or what has one: task 0 is "0" (`lensclust.prompts.labels`)


@dataclass(frozen=True)
class Intervention:
    """An edit of states, at any site it was fitted on.

    Attributes:
        name: its name in tables.
        edit_at: site -> the function that maps its states ``(row, d)`` to new ones. At heads
            states are ``hook_z`` (``d_head``), elsewhere ``d_model``.
        by_row: whether the edit of a state depends on its row, such as one random direction per
            row. `steer` then changes one token of all rows at a time, so that a row gets the
            same edit in a forward of the whole sequence and in one of its last token.
    """

    name: str
    edit_at: Callable[[Site], Edit] = field(repr=False)
    by_row: bool = False

    def size(self, states: States, site: Site) -> Float[Tensor, " row"]:
        """Norm of the change of each state at a site (2-norm, in the states' units)."""
        return (self.edit(site)(states) - states).norm(dim=-1)

    def edit(self, site: Site) -> Edit:
        """``edit_at(site)``, with a one-line error for states of another width.

        Raises:
            InputError: when the function is called on states that it cannot change.
        """
        edit = self.edit_at(site)

        def checked(states: States) -> States:
            try:
                return edit(states)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                if not re.search("size|shape|expand", reason):
                    raise
                raise InputError(
                    f"intervention {self.name!r}: cannot change states of {states.shape[-1]} "
                    f"numbers at {str(site)!r} ({reason}): expected a model of the width that it "
                    "was made for"
                ) from error

        return checked

    @checked_arguments
    def scaled(self, strength: float | int) -> Intervention:
        """The same intervention, ``strength`` times as far.

        Raises:
            InputError: if ``strength`` is not finite.
        """
        if not np.isfinite(strength):
            raise InputError(f"intervention {self.name!r}: strength={strength}, expected a number")

        def edit_at(site: Site) -> Edit:
            edit = self.edit_at(site)
            return lambda states: states + strength * (edit(states) - states)

        return Intervention(f"{self.name} x{strength:g}", edit_at, self.by_row)

    @checked_arguments
    def random_twin(self, seed: int = 0) -> Intervention:
        """Control: a norm-matched random direction for each state.

        Each state moves as far as by this intervention. In `steer` each row of a batch has one
        direction, the same at all of its tokens.
        """

        def edit_at(site: Site) -> Edit:
            edit = self.edit_at(site)

            def random_edit(states: States) -> States:
                generator = derive_generator(seed, "direction", str(site))
                drawn = torch.randn(states.shape, generator=generator).to(states)
                distance = (edit(states) - states).norm(dim=-1, keepdim=True)
                return states + F.normalize(drawn, dim=-1) * distance

            return random_edit

        return Intervention(f"random direction, norm of {self.name}", edit_at, by_row=True)

    @checked_arguments
    def norm_matched(self, other: Intervention) -> Intervention:
        """This intervention's directions with the norms of another's changes."""

        def edit_at(site: Site) -> Edit:
            own, reference = self.edit_at(site), other.edit_at(site)

            def edit(states: States) -> States:
                distance = (reference(states) - states).norm(dim=-1, keepdim=True)
                # In float16 the epsilon of `normalize` would underflow for a zero change.
                direction = F.normalize((own(states) - states).float(), dim=-1)
                return states + direction.to(states) * distance

            return edit

        by_row = self.by_row or other.by_row
        return Intervention(f"{self.name}, norm of {other.name}", edit_at, by_row)


def interventions(caller: str, given: Any) -> list[Intervention]:
    """Return one intervention or several, from a caller's function, as a list.

    >>> interventions("interchange: moves", None)
    Traceback (most recent call last):
    ...
    lensclust.errors.InputError: interchange: moves gave NoneType, expected an intervention or ...
    """
    several = [*given] if isinstance(given, Iterable) else [given]
    for made in several:
        if not isinstance(made, Intervention):
            raise InputError(
                f"{caller} gave {type(made).__name__}, expected an intervention or a list of them, "
                "as from probes.shift (a function needs a return)"
            )
    return several


@checked_arguments
def shift(
    centroids: xr.Dataset, source: Label, target: Label, *, by: str = "task", name: str = "shift"
) -> Intervention:
    """Add the difference of two labels' mean states.

    Args:
        centroids: mean states by label (`probes.design.mean_states`). With a condition
            beside the label, the difference is averaged over the conditions that both have.

    Raises:
        InputError: at the call if a label does not exist; when it is used if the site does not
            exist or the two labels share no condition.
    """
    start, stop = require_labels(centroids, by, source, target)

    def edit_at(site: Site) -> Edit:
        values = states_at(centroids, site)
        difference = values.isel({by: stop}) - values.isel({by: start})
        others = [d for d in difference.dims if d != values.dims[-1]]
        if not difference.notnull().any():
            named = f"{label_text(source)!r} and {label_text(target)!r}"
            lacking = f"share no {', '.join(map(str, others))}" if others else "have no mean state"
            raise InputError(f"shift: {named} {lacking} at {str(site)!r}")
        move = torch.from_numpy(np.asarray(difference.mean(others, skipna=True), dtype=np.float32))
        return lambda states: states + move.to(states)

    return Intervention(name, edit_at)


@checked_arguments
def transport(
    centroids: xr.Dataset,
    source: Label,
    target: Label,
    *,
    by: str = "task",
    given: str = "input",
    name: str = "transport",
) -> Intervention:
    """Move each state by the difference of two labels' means within its condition.

    The condition (such as the input) is inferred: it is that of the source label's nearest mean,
    among the conditions that both labels have.

    Args:
        centroids: mean states by condition and label, `mean_states(acts, by=by, given=given)`.

    Raises:
        InputError: if a label does not exist or the two share no condition.
    """
    places = require_labels(centroids, by, source, target)
    require_labels(centroids, given)

    def edit_at(site: Site) -> Edit:
        values = states_at(centroids, site)
        start, stop = (values.isel({by: n}).transpose(given, ...).values for n in places)
        known = np.isfinite(start).all(-1) & np.isfinite(stop).all(-1)
        if not known.any():
            named = f"{label_text(source)!r} and {label_text(target)!r}"
            raise InputError(f"transport: {named} share no {given} at {str(site)!r}")
        begin = torch.from_numpy(start[known].astype(np.float32))
        moves = torch.from_numpy((stop - start)[known].astype(np.float32))

        def edit(states: States) -> States:
            nearest = torch.cdist(states.float(), begin.to(states.device)).argmin(1)
            return states + moves.to(states)[nearest]

        return edit

    return Intervention(name, edit_at)


@checked_arguments
def dealt(
    acts: xr.Dataset, *, by: str = "task", given: str | None = None, seed: int = 0
) -> xr.Dataset:
    """The same activations with labels shuffled among the prompts of each condition.

    Also `with_shuffled_labels`.

    `mean_states` of these gives a control of `shift` and `transport`: means of real states that
    do not follow the task.

    >>> acts = xr.Dataset(coords={"task": ("prompt", ["a", "b", "a"])})
    >>> sorted(dealt(acts).task.values.tolist())
    ['a', 'a', 'b']
    """
    labels = prompt_labels(acts, by)
    groups = np.zeros(len(labels)) if given is None else prompt_labels(acts, given)
    missing = labels == MISSING
    rng = np.random.default_rng(seed)
    permuted = labels.copy()
    for group in np.unique(groups):
        rows = np.flatnonzero((groups == group) & ~missing)
        permuted[rows] = labels[rng.permutation(rows)]
    return acts.assign_coords({by: ("prompt", permuted)})


# The same function under a name that is clear out of context.
with_shuffled_labels = dealt


@checked_arguments
def replace(
    centroids: xr.Dataset, target: Label, *, by: str = "task", name: str = "replace by mean"
) -> Intervention:
    """Overwrite each state by the target label's mean state (a task vector, Hendel et al. 2023)."""
    (place,) = require_labels(centroids, by, target)

    def edit_at(site: Site) -> Edit:
        values = states_at(centroids, site).isel({by: place})
        others = [d for d in values.dims if d != values.dims[-1]]
        mean = torch.from_numpy(values.mean(others, skipna=True).values)
        return lambda states: mean.to(states).expand_as(states)

    return Intervention(name, edit_at)


def states_at(centroids: xr.Dataset, site: Site) -> xr.DataArray:
    """The mean states of one site, the state's own dimension last.

    Raises:
        InputError: if the centroids do not hold the site.
    """
    variable, axis = VARIABLES[site.kind]
    place = {axis: site.layer} | ({} if site.head is None else {"head": site.head})
    if variable not in centroids or any(v not in centroids[k].values for k, v in place.items()):
        raise InputError(
            f"site {str(site)!r} is not in these centroids: they hold {list(centroids)}"
        )
    feature = "d_head" if variable == "z" else "d_model"
    return centroids[variable].sel(place).transpose(..., feature, missing_dims="ignore")


def require_labels(centroids: xr.Dataset, by: str, *labels: Label) -> list[int]:
    """Indices of these labels in the centroids, compared as texts.

    Raises:
        InputError: if one does not exist or is given twice; lists the labels of the centroids.
    """
    is_dataset = isinstance(centroids, xr.Dataset)
    if not is_dataset or "prompt" in centroids.dims:
        given = "activations" if is_dataset else f"a {type(centroids).__name__}"
        raise InputError(
            f"given {given}, expected mean states: the dataset that probes.mean_states(acts) "
            "returns"
        )
    if by not in centroids.coords:
        option = "by" if labels else "given"
        raise InputError(
            f"label {by!r} is not in these mean states, which have {list(centroids.coords)}: make "
            f"them with mean_states(acts, {option}={by!r})"
        )
    known = np.atleast_1d(label_texts(centroids[by].values)).tolist()
    wanted = list(map(label_text, labels))
    for label in wanted:
        if label not in known:
            raise InputError(f"{by} {label!r} is not in these centroids: they have {known}")
    if len(set(wanted)) < len(wanted):
        raise InputError(f"{by} {wanted[0]!r} given twice: expected two different ones")
    return [known.index(label) for label in wanted]
