"""The dataset that `lensclust.extract` fills: dimensions, labels and provenance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
import xarray as xr
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.activations.dataset import VARIABLES
from lensclust.activations.store import DONE, ROW_KEYS
from lensclust.errors import InputError
from lensclust.models import (
    AddedCode,
    Site,
    blocks_of,
    fingerprint_again,
    head_frames,
    hooked_points,
    model_name,
    resolve,
    settings_digest,
)
from lensclust.models.added_code import added_code
from lensclust.prompts import Prompts

# Names that a label cannot have, because an extraction or a store may use them.
RESERVED = {
    *("prompt", "position", "layer", "block", "head", "d_model", "d_head", "rank", "head_frame"),
    *(variable for variable, _ in VARIABLES.values()),
    ROW_KEYS,
    DONE,
}
LIBRARIES = ("lensclust", "transformer-lens", "transformers", "torch")


def rectangle(model: TransformerLensModel, sites: Sequence[Site]) -> list[Site]:
    """The sites, completed to the block x kind rectangle of an array.

    Raises:
        InputError: if there is no such rectangle: a block lacks a kind, or heads differ in size.
    """
    per_block = {(site.kind, site.head): site for site in sites if site.kind != "resid"}
    blocks = sorted({site.layer for site in sites if site.kind != "resid"})
    others = [replace(site, layer=block) for site in per_block.values() for block in blocks]
    held = blocks_of(model)
    given = set(sites)
    missing = [site for site in others if site not in given]
    try:
        if missing:
            resolve(model, missing)
    except InputError as error:
        raise InputError(
            f"extract: one array cannot hold these sites, as {error}; read kinds in different "
            "blocks one by one"
        ) from None
    sizes = {block: held[block].d_head for block in blocks}
    if any(site.head is not None for site in others) and len(set(sizes.values())) > 1:
        raise InputError(
            f"extract: one array cannot hold heads of different sizes, and those of "
            f"{model_name(model)} differ: block -> size {sizes}; read blocks of one size"
        )
    return list(dict.fromkeys([*sites, *others]))


def template(
    model: TransformerLensModel,
    prompts: Prompts,
    sites: Sequence[Site],
    positions: Sequence[str],
    dtype: np.dtype,
) -> xr.Dataset:
    """The dataset with labels and provenance, over zeros that take no memory."""
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
    blocks = blocks_of(model)
    first = min(places["block"], default=0)
    sizes |= {"d_model": blocks[first].d_model, "d_head": blocks[first].d_head}
    variables: dict[str, Any] = {}
    for variable, axis in dict.fromkeys(VARIABLES[site.kind] for site in sites):
        tail = ("block", "head", "d_head") if variable == "z" else (axis, "d_model")
        dims = ("prompt", "position", *tail)
        variables[variable] = (dims, np.broadcast_to(dtype.type(0), [sizes[d] for d in dims]))
    if any(site.kind == "head" for site in sites):
        frames = (
            head_frames(model, sorted(places["block"]))[:, sorted(places["head"])].cpu().numpy()
        )
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
        "settings": settings_digest(model),
        "hooks": ", ".join([*hooked_points(model), *map(str, _added(model))]),
        "tokenizer": prompts.tokenizer,
        "prompts": prompts.digest(),
        "sites": ", ".join(sorted({site.kind for site in sites})),
        "dtype": str(dtype),
        **{f"version_{name}": version(name) for name in LIBRARIES},
    }


def _added(model: Any) -> list[AddedCode]:
    return added_code(getattr(model, "original_model", model))
