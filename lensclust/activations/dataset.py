"""Access to a dataset of activations: its sites, one site's values, its labels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.models import Site, fingerprint_again, output_weights
from lensclust.prompts import MISSING, label_texts

log = logging.getLogger(__name__)

# Kind of site -> variable of the dataset, and the name of its layer axis.
VARIABLES = {
    "resid": ("resid", "layer"),
    "resid_mid": ("resid_mid", "block"),
    "head": ("z", "block"),
    "z": ("z", "block"),
    "attn_out": ("attn_out", "block"),
    "mlp_out": ("mlp_out", "block"),
}
# Options that may be None.
WITHOUT = ("given", "groups", "control", "per", "within", "apart")


@checked_arguments
def head_residual(
    acts: xr.Dataset, model: TransformerLensModel
) -> Float[xr.DataArray, "prompt position block head d_model"]:
    """Each head's contribution to the residual stream, ``z @ W_O``, from stored ``z``.

    Includes the block's factor, if there is one (Granite).

    ``n_heads`` times larger than ``z``: select positions and blocks first. The attention
    output is the sum over heads plus ``b_O``.

    Raises:
        InputError: if ``acts`` holds no heads, was not read with site ``head``, or was read with
            other weights, or with those of several models.
    """
    require_axes(acts, "z")
    if "head_frame" not in acts:
        raise InputError(f"head_residual: expected activations of 'head', given {list(acts)}")
    held: Any = model
    read, now = acts.attrs.get("weights"), fingerprint_again(held)
    if read not in (None, now):
        raise InputError(
            f"head_residual: the activations were read with weights {read[:8]}, the model has "
            f"{now[:8]} now; expected the model unchanged"
        )
    frame = head_frame(acts)
    w_o = np.stack(
        [
            output_weights(model, int(b))[0].cpu().numpy()[acts["head"].values]
            for b in acts["block"].values
        ]
    )
    if read is None and not _of(frame, w_o):  # a concatenation may have dropped the attributes
        raise InputError(
            "head_residual: the activations were read with other W_O than the model's; expected "
            "the model unchanged"
        )
    weights = xr.DataArray(w_o, dims=("block", "head", "d_head", "d_model"))
    found = xr.dot(acts["z"].astype(np.float32), weights, dim="d_head").rename("head_residual")
    return found.transpose("prompt", "position", "block", "head", "d_model")


def head_frame(acts: xr.Dataset, site: Site | None = None) -> xr.DataArray:
    """The matrix that gives ``z`` the geometry of heads' contributions, of all heads or of one.

    ``xr.concat`` repeats it for every prompt; the repeated axis is dropped.

    Raises:
        InputError: if it differs between prompts: the activations are of several models.
    """
    frame = acts["head_frame"]
    if site is not None:
        frame = frame.sel(block=site.layer, head=site.head)
    if "prompt" not in frame.dims:
        return frame
    first = frame.isel(prompt=0, drop=True)
    if not bool((frame == first).all()):
        raise InputError(
            "these activations hold heads of several models (their head_frame differs between "
            "prompts): take those of one model at a time"
        )
    return first


def _of(frame: xr.DataArray, w_o: np.ndarray) -> bool:
    """Whether a head frame preserves the lengths and angles under these output weights."""
    rows = frame.transpose("block", "head", "d_head", "rank").values
    made, kept = (each @ each.swapaxes(-1, -2) for each in (w_o, rows))
    return made.shape == kept.shape and np.allclose(made, kept, rtol=1e-3, atol=1e-3 * made.max())


def site_values(acts: xr.Dataset, site: Site, *, position: str | None = None) -> np.ndarray:
    """Activations of one site, ``(prompt, d)``, in coordinates that preserve its geometry.

    Heads are returned as ``z @ head_frame``, which has the distances of their contributions to
    the residual stream; all other sites unchanged.

    Raises:
        InputError: if the dataset does not hold the site, it holds several positions and none is
            named, or a prompt's activations are not finite.
    """
    # Memory layout as if never transposed: the last digit of sums along an axis depends on it.
    values = np.ascontiguousarray(stored_values(acts, site, position=position), dtype=np.float32)
    if site.kind != "head":
        return values
    return values @ head_frame(acts, site).transpose("d_head", "rank").values


def stored_values(acts: xr.Dataset, site: Site, *, position: str | None = None) -> np.ndarray:
    """Activations of one site as stored, ``(prompt, d)``.

    Raises:
        InputError: as :func:`site_values`.
    """
    values = select(acts, site, position=position).values
    bad = np.flatnonzero(~np.isfinite(values).all(1))
    if bad.size:
        raise InputError(
            f"site {str(site)!r}: {bad.size} of {len(values)} rows hold NaN or infinity, the first "
            f"is row {bad[0]}; expected finite activations (acts.where leaves such rows: select "
            "them with acts.isel)"
        )
    return values


def select(acts: xr.Dataset, site: Site, *, position: str | None = None) -> xr.DataArray:
    """One site of a dataset as stored, ``(prompt, d)``."""
    variable, axis = VARIABLES[site.kind]
    require_axes(acts, variable)
    place = {axis: site.layer} | ({} if site.head is None else {"head": site.head})
    if variable not in acts or any(v not in acts[k].values for k, v in place.items()):
        raise InputError(f"site {str(site)!r} is not in these activations: {dataset_kinds(acts)}")
    names = [str(name) for name in acts["position"].values]
    if position is None and len(names) > 1:
        raise InputError(f"position: these activations hold {names}, name one of them")
    if position is not None and position not in names:
        raise InputError(f"position {position!r} is not in these activations: {names}")
    return acts[variable].sel(place).sel(position=position or names[0]).transpose("prompt", ...)


def dataset_kinds(acts: xr.Dataset) -> list[str]:
    """The kinds of site that a dataset holds."""
    kinds = [kind for kind in ("resid", "resid_mid", "attn_out", "mlp_out") if kind in acts]
    return kinds + (["head" if "head_frame" in acts else "z"] if "z" in acts else [])


def dataset_sites(acts: xr.Dataset, kinds: str | Sequence[str] | None = None) -> list[Site]:
    """Every site that a dataset holds, optionally only those of the given kinds.

    Raises:
        InputError: if a kind is not in the dataset.
    """
    require_axes(acts)
    held = dataset_kinds(acts)
    if not held:
        raise InputError(
            f"these activations hold no site, expected some of {[*VARIABLES]}: given {list(acts)}"
        )
    wanted = held if kinds is None else [kinds] if isinstance(kinds, str) else list(kinds)
    if not wanted:
        raise InputError(f"kinds: none given, these activations hold {held}")
    missing = [kind for kind in wanted if kind not in held]
    if missing:
        raise InputError(f"site {missing[0]!r} is not in these activations: they hold {held}")
    found = []
    for kind in wanted:
        variable, axis = VARIABLES[kind]
        heads = acts["head"].values.tolist() if "head" in acts[variable].dims else [None]
        found += [Site(kind, layer, head) for layer in acts[axis].values.tolist() for head in heads]
    return found


def require_axes(acts: xr.Dataset, *variables: str) -> None:
    """Refuse an object that is not a dataset of activations, or has lost an axis.

    Args:
        acts: the object to check.
        variables: the variables to check; all by default.

    Raises:
        InputError: names the missing axis and how to keep it.

    >>> axes = ("prompt", "position", "layer", "d_model")
    >>> require_axes(xr.Dataset({"resid": (axes, np.ones((1, 1, 1, 1)))}).isel(layer=0))
    Traceback (most recent call last):
    lensclust.errors.InputError: these activations have no axis 'layer' any more: keep it by \
choosing with a list, such as acts.isel(layer=[0])
    """
    if not isinstance(acts, xr.Dataset):
        raise InputError(
            f"given a {type(acts).__name__}, expected activations: the dataset that "
            "lensclust.extract(model, prompts, sites) returns"
        )
    for variable, axis in VARIABLES.values():
        if variable in acts and variable in (variables or acts):
            own = ("head", "d_head") if variable == "z" else ("d_model",)
            expected, held = ("prompt", "position", axis, *own), acts[variable].dims
            if (kind := acts[variable].dtype).kind not in "fiub":
                raise InputError(
                    f"these activations hold {variable!r} as {kind}, expected real numbers"
                )
            for name in expected:
                if name not in held:
                    raise InputError(
                        f"these activations have no axis {name!r} any more: keep it by choosing "
                        f"with a list, such as acts.isel({name}=[0])"
                    )
            if more := [str(name) for name in held if name not in expected]:
                raise InputError(
                    f"these activations have the axes {more} beside {list(expected)}: choose one "
                    f"place along each, such as acts.isel({more[0]}=0)"
                )


def prompt_labels(acts: xr.Dataset, name: str) -> np.ndarray:
    """A label of every prompt, as strings (`lensclust.prompts.labels`); a missing one is empty.

    Raises:
        InputError: if the activations carry no such label.
    """
    require_axes(acts)
    known = label_names(acts)
    if name not in known:
        raise InputError(f"label {name!r} is not in these activations: they have {known}")
    return label_texts(acts[name].values)


def label_names(acts: xr.Dataset) -> list[str]:
    """The labels of the prompts."""
    return [str(name) for name in acts.coords if acts[name].dims == ("prompt",)]


def label_columns(acts: xr.Dataset) -> dict[str, np.ndarray]:
    """The labels of the prompts, by name."""
    return {name: acts[name].values for name in label_names(acts)}


def labelled(
    call: str, acts: xr.Dataset, **options: str | Sequence[str] | None
) -> tuple[Int[np.ndarray, " row"], list[str]]:
    """The prompts with all labels that a call names, and a note on those without.

    Args:
        call: function name used in error messages.
        acts: activations.
        options: the call's option -> the label, or labels, that it names; None for none.

    Returns:
        Numbers of the prompts with all labels, and one sentence for each label that others lack.

    Raises:
        InputError: if there is no such label, or no prompt has all of them.

    >>> acts = xr.Dataset(coords={"task": ("prompt", ["a", None, "b"])})
    >>> labelled("cluster", acts, by="task", given=None)
    (array([0, 2]), ["1 rows left out: without a label 'task'"])
    """
    require_axes(acts)
    known, notes = label_names(acts), []
    keep = np.ones(acts.sizes.get("prompt", 0), dtype=bool)
    for option, given in options.items():
        for name in [given] if isinstance(given, str) else list(given or ()):
            if name not in known:
                none = f", or {option}=None for none" if option in WITHOUT else ""
                raise InputError(
                    f"{call}: {option}={name!r}, but label {name!r} is not in these activations: "
                    f"give {option}=... one of {known}{none}"
                )
            missing = prompt_labels(acts, name) == MISSING
            note = f"{int(missing.sum())} rows left out: without a label {name!r}"
            if missing.any() and note not in notes:
                notes.append(note)
            keep &= ~missing
    if not keep.any():
        raise InputError(f"{call}: no prompt has all the labels that it needs: {'; '.join(notes)}")
    return np.flatnonzero(keep), notes


def with_labels(call: str, acts: xr.Dataset, **options: str | Sequence[str] | None) -> xr.Dataset:
    """`labelled` as a dataset; the notes are logged."""
    rows, notes = labelled(call, acts, **options)
    for note in notes:
        log.warning("%s: %s", call, note)
    return acts.isel(prompt=rows) if notes else acts
