"""Attributes of a store: provenance, progress and digests.

The attributes hold, beside the provenance of the activations: ``batches`` (for each call that
wrote: the number of its prompts, their digest, the digest of their labels), ``measured`` (names
of the variables with activations), ``shard`` (rows of a chunk), ``written`` (rows of a finished
store), ``layout`` (digest of names, axes, types and of arrays that do not grow) and ``seal``
(digest of the attributes themselves). They are replaced atomically, after the data they describe.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool

from lensclust.storage import digest_of

# A hash of each row's prompt, to detect prompts that are in the store already.
ROW_KEYS = "prompt_key"
# For each row, 1 if its activations are written: an interrupted call resumes from here.
DONE = "prompt_written"
_OWN = ("batches", "measured", "shard", "written", "layout", "seal")


def measured_names(store: Any) -> list[str]:
    """Names of the variables with activations."""
    return json.loads(store.attrs["measured"])


def batches_written(store: Any) -> list[Any]:
    """For each call that wrote: number of prompts, their digest, the digest of their labels."""
    return json.loads(store.attrs["batches"])


def batch_entry(frame: xr.Dataset) -> list[Any]:
    """Size, prompts digest and label digest of one batch, as the store lists it."""
    return [frame.sizes["prompt"], frame.attrs["prompts"], label_digest(frame)]


def rows_expected(store: Any) -> int:
    """Number of rows of all batches that were begun."""
    return sum(size for size, *_ in batches_written(store))


def rows_done(store: Any, rows: slice) -> Bool[np.ndarray, " row"]:
    """Which rows were written."""
    return np.asarray(store[DONE][rows]) != 0


def note(store: Any, **changes: Any) -> None:
    """Change the store's attributes atomically, together with their digest."""
    attributes = {**store.attrs, **changes}
    store.attrs.put({**attributes, "seal": seal(attributes)})


def seal(attributes: Mapping[str, Any]) -> str:
    """Digest of a store's attributes, the seal itself left out."""
    kept = {name: value for name, value in attributes.items() if name != "seal"}
    return digest_of(kept)[:16]


def layout_digest(arrays: Mapping[str, Any], dataset: xr.Dataset) -> str:
    """Digest of the arrays' layout, and of the contents of those that do not grow."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        axes = list(array.attrs["_ARRAY_DIMENSIONS"])
        fixed = [n for axis, n in zip(axes, array.shape, strict=True) if axis != "prompt"]
        digest.update(json.dumps([name, axes, fixed, stored_kind(array)]).encode())
        if "prompt" not in axes:
            digest.update(_content(dataset[name].values))
    return digest.hexdigest()[:16]


def label_digest(dataset: xr.Dataset) -> str:
    """Digest of the labels along ``prompt``, names and values."""
    digest = hashlib.sha256()
    for name in sorted(str(n) for n, label in dataset.coords.items() if label.dims == ("prompt",)):
        digest.update(name.encode() + b"\0" + _content(dataset[name].values))
    return digest.hexdigest()[:16]


def _content(values: np.ndarray) -> bytes:
    """Canonical bytes, the same before writing and after reading: strings as JSON, one NaN."""
    if values.dtype.kind not in "iufb":
        return json.dumps([str(value) for value in values.tolist()]).encode()
    if values.dtype.kind == "f":
        values = np.where(np.isnan(values), values.dtype.type(np.nan), values)
    return values.tobytes()


def stored_kind(array: Any) -> str:
    """`kind` of an array of a store."""
    # zarr stores truth values as small integers; xarray records the original type.
    return "|b1" if array.attrs.get("dtype") == "bool" else kind(array.dtype)


def kind(dtype: Any) -> str:
    """The type of numbers; one name for all string types."""
    return np.dtype(dtype).str if getattr(dtype, "kind", "") in "iufb" else "string"


def provenance(attributes: Mapping[Any, Any]) -> dict[Any, Any]:
    """The attributes without those that the store uses internally."""
    return {name: value for name, value in attributes.items() if name not in _OWN}
