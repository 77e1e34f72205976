"""The dataset that `lensclust.extract` fills: dimensions, labels and provenance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
import xarray as xr
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.activations import VARIABLES
from lensclust.checked_arrays import SUMS
from lensclust.errors import InputError
from lensclust.fingerprints import fingerprint_again
from lensclust.prompts import Prompts
from lensclust.sites import Site, head_frames, model_name
from lensclust.store_notes import ROW_KEYS

# What a label cannot be called, whichever of these an extraction has and a store adds.
RESERVED = {
    *("prompt", "position", "layer", "block", "head", "d_model", "d_head", "rank", "head_frame"),
    *(variable for variable, _ in VARIABLES.values()),
    *(f"{variable}{SUMS}" for variable, _ in VARIABLES.values()),
    ROW_KEYS,
}
LIBRARIES = ("lensclust", "transformer-lens", "transformers", "torch")


def rectangle(sites: Sequence[Site]) -> list[Site]:
    """The sites, and what else lies in the block x kind rectangle that an array has to be."""
    per_block = {site.kind: site for site in sites if site.kind != "resid"}
    blocks = {site.layer for site in sites if site.kind != "resid"}
    others = [replace(site, layer=block) for site in per_block.values() for block in blocks]
    return list(dict.fromkeys([*sites, *others]))


def template(
    model: TransformerLensModel,
    prompts: Prompts,
    sites: Sequence[Site],
    positions: Sequence[str],
    dtype: np.dtype,
) -> xr.Dataset:
    """The dataset over zeros that take no memory."""
    cfg = model.cfg
    places: dict[str, set[int]] = {"layer": set(), "block": set(), "head": set()}
    for site in sites:
        places[VARIABLES[site.kind][1]].add(site.layer)
        if site.head is not None:
            places["head"].add(site.head)
    coords: dict[str, Any] = {k: (k, sorted(v)) for k, v in places.items() if v}
    coords["position"] = ("position", list(positions))
    for label, values in prompts.label_arrays().items():
        if label in RESERVED:
            raise InputError(
                f"extract: label {label!r} of the rows is the name of an axis or variable of "
                f"activations; rename the column, such as to '{label}_label'"
            )
        coords[label] = ("prompt", values)
    sizes = {axis: len(values[1]) for axis, values in coords.items() if axis in places}
    sizes |= {"prompt": len(prompts), "position": len(positions)}
    sizes |= {"d_model": cfg.d_model, "d_head": cfg.d_head}
    variables: dict[str, Any] = {}
    for variable, axis in dict.fromkeys(VARIABLES[site.kind] for site in sites):
        tail = ("block", "head", "d_head") if variable == "z" else (axis, "d_model")
        dims = ("prompt", "position", *tail)
        variables[variable] = (dims, np.broadcast_to(dtype.type(0), [sizes[d] for d in dims]))
    if any(site.kind == "head" for site in sites):
        blocks = sorted(places["block"])
        frames = head_frames(model, blocks)[:, sorted(places["head"])].cpu().numpy()
        variables["head_frame"] = (("block", "head", "d_head", "rank"), frames)
    return xr.Dataset(variables, coords, _provenance(model, prompts, sites, dtype))


def measured(frame: xr.Dataset) -> list[str]:
    """Variables that are read from the model."""
    return [str(name) for name in frame if "prompt" in frame[name].dims]


def _provenance(
    model: Any, prompts: Prompts, sites: Sequence[Site], dtype: np.dtype
) -> dict[str, Any]:
    return {
        "model": model_name(model),
        "weights": fingerprint_again(model),
        "tokenizer": prompts.tokenizer,
        "prompts": prompts.digest(),
        "sites": ", ".join(sorted({site.kind for site in sites})),
        "dtype": str(dtype),
        **{f"version_{name}": version(name) for name in LIBRARIES},
    }
