"""Reading a dataset of activations: its sites, one site's values, its labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from jaxtyping import Float
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.blocks import output_weights
from lensclust.errors import InputError
from lensclust.sites import Site

# Which variable of the dataset holds a kind of site, and the name of its layer axis.
VARIABLES = {
    "resid": ("resid", "layer"),
    "resid_mid": ("resid_mid", "block"),
    "head": ("z", "block"),
    "z": ("z", "block"),
    "attn_out": ("attn_out", "block"),
    "mlp_out": ("mlp_out", "block"),
}


def head_residual(
    acts: xr.Dataset, model: TransformerLensModel
) -> Float[xr.DataArray, "prompt position block head d_model"]:
    """Each head's contribution to the residual stream, ``z @ W_O``, from stored ``z``.

    Times what the block multiplies it by, where it does (Granite).

    ``n_heads`` times larger than ``z``: select positions and blocks first. The attention
    output is the sum over heads plus ``b_O``.

    Raises:
        InputError: if ``acts`` holds no heads, or was not read with site ``head``.
    """
    if "head_frame" not in acts:
        raise InputError(f"head_residual: expected activations of 'head', given {list(acts)}")
    w_o = np.stack(
        [
            output_weights(model, int(b))[0].cpu().numpy()[acts["head"].values]
            for b in acts["block"].values
        ]
    )
    weights = xr.DataArray(w_o, dims=("block", "head", "d_head", "d_model"))
    return xr.dot(acts["z"].astype(np.float32), weights, dim="d_head").rename("head_residual")


def site_values(acts: xr.Dataset, site: Site, *, position: str | None = None) -> np.ndarray:
    """Activations of one site, ``(prompt, d)``, in coordinates that keep its geometry.

    Heads come as ``z @ head_frame``, which has the distances of their contributions to the
    residual stream; all other sites come as they are.

    Raises:
        InputError: if the dataset does not hold the site, or several positions and none named,
            or if a prompt's activations are not finite.
    """
    values = select(acts, site, position=position).values.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(values).all(1))
    if bad.size:
        raise InputError(
            f"site {str(site)!r}: {bad.size} of {len(values)} rows hold NaN or infinity, the first "
            f"is row {bad[0]}; expected finite activations"
        )
    if site.kind != "head":
        return values
    frame = acts["head_frame"].sel(block=site.layer, head=site.head).values
    return values @ frame


def select(acts: xr.Dataset, site: Site, *, position: str | None = None) -> xr.DataArray:
    """One site of a dataset as stored, ``(prompt, d)``."""
    variable, axis = VARIABLES[site.kind]
    place = {axis: site.layer} | ({} if site.head is None else {"head": site.head})
    if variable not in acts or any(v not in acts[k].values for k, v in place.items()):
        raise InputError(f"site {str(site)!r} is not in these activations: {dataset_kinds(acts)}")
    names = list(acts["position"].values)
    if position is None and len(names) > 1:
        raise InputError(f"position: these activations hold {names}, name one of them")
    if position is not None and position not in names:
        raise InputError(f"position {position!r} is not in these activations: {names}")
    return acts[variable].sel(place).sel(position=position or names[0])


def dataset_kinds(acts: xr.Dataset) -> list[str]:
    """The kinds of site that a dataset holds."""
    kinds = [kind for kind in ("resid", "resid_mid", "attn_out", "mlp_out") if kind in acts]
    return kinds + (["head" if "head_frame" in acts else "z"] if "z" in acts else [])


def dataset_sites(acts: xr.Dataset, kinds: str | Sequence[str] | None = None) -> list[Site]:
    """Every site that a dataset holds, optionally only those of the given kinds.

    Raises:
        InputError: if a kind is not in the dataset.
    """
    held = dataset_kinds(acts)
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


def prompt_labels(acts: xr.Dataset, name: str) -> np.ndarray:
    """A label of every prompt, as strings.

    Raises:
        InputError: if the activations carry no such label.
    """
    if name not in acts.coords or acts[name].dims != ("prompt",):
        known = [str(c) for c in acts.coords if acts[c].dims == ("prompt",)]
        raise InputError(f"label {name!r} is not in these activations: they have {known}")
    return acts[name].values.astype(str)
