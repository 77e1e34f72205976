"""Reading a store: finished rows only, verified by checksum.

Stores of an earlier version kept checksums in separate arrays: they are read without.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from lensclust.activations.store.attributes import (
    DONE,
    ROW_KEYS,
    batches_written,
    label_digest,
    layout_digest,
    measured_names,
    provenance,
    rows_done,
    rows_expected,
    seal,
)
from lensclust.activations.store.chunks import (
    PACKED,
    ZARR_FORMAT,
    CheckedArray,
    damage_named,
    open_group,
    packing,
)
from lensclust.errors import InputError
from lensclust.storage import Place, as_place, zarr_store

_log = logging.getLogger(__name__)

# An array may claim this many bytes, or this many times those of its files.
_MAX_UNBACKED, _MAX_RATIO = 2**28, 100


def open_activations(path: str | Place) -> xr.Dataset:
    """Open a finished store; labels are loaded, activations are read lazily.

    All data are compared with their checksums when they are read.

    Raises:
        InputError: if there is no store, its writing was interrupted, or it is damaged.
    """
    place = as_place(path)
    return read_finished(place, _finished(place))


def read_finished(path: Place, store: Any) -> xr.Dataset:
    """The finished rows, without those of a call that was interrupted."""
    with damage_named(path):
        stored = dict(store.arrays())
        require_affordable(path, store, stored)
        measured = measured_names(store)
        unread, whole = [ROW_KEYS, DONE, *measured], DONE in stored
        if not whole:
            _log.warning("store %s: is of an earlier version: damage may go unnoticed", path)
            unread += [f"{name}_crc" for name in measured]
        dataset = xr.open_dataset(
            zarr_store(path, read_only=True),
            engine="zarr",
            chunks=None,
            drop_variables=unread,
            backend_kwargs={"consolidated": False, "zarr_format": ZARR_FORMAT},
        )
        read = {name: _as_objects(variable.load()) for name, variable in dataset.variables.items()}
        # The dropped variables' attributes say which variables are labels.
        labels = [name for name, variable in read.items() if variable.dims == ("prompt",)]
        dataset = dataset.assign(read).set_coords(labels)
        _check(path, store, stored, dataset)
        arrays = {n: CheckedArray(path / n, stored[n], whole=whole) for n in measured}
        lazy = {name: array.variable() for name, array in arrays.items()}
        dataset = dataset.assign(lazy).isel(prompt=slice(0, int(store.attrs["written"])))
    return dataset.drop_attrs(deep=False).assign_attrs(provenance(dataset.attrs))


def opened(path: Place, mode: str) -> Any:
    """The group of a store, with attributes that match their digest."""
    with damage_named(path):
        if not ((path / ".zgroup").exists() and (path / ".zattrs").exists()):
            raise InputError(
                f"store {path}: not a folder of activations made by extract(store=...)"
            )
        store = open_group(path, mode)
        if "measured" not in store.attrs:
            raise InputError(
                f"store {path}: not a folder of activations made by extract(store=...)"
            )
        if store.attrs.get("seal") != seal(dict(store.attrs)):
            raise InputError(f"store {path}: is damaged: its attributes changed since written")
        expected, names = packing(provenance(dict(store.attrs)))[PACKED], measured_names(store)
        if missing := [name for name in names if name not in store] or not names:
            raise InputError(f"store {path}: is damaged: {missing} of {names} are not in it")
        for name in names if DONE in store else ():
            packed = getattr(store[name], PACKED)
            if expected not in (packed if isinstance(packed, tuple) else (packed,)):
                raise InputError(
                    f"store {path}: {name!r} is of another store, or damaged: extract it again"
                )
    return store


def _finished(path: Place) -> Any:
    """The group of a store that holds all its prompts."""
    store = opened(path, "r")
    with damage_named(path):
        total = rows_expected(store)
        if int(store.attrs["written"]) != total:
            there = np.count_nonzero(rows_done(store, slice(None))) if DONE in store else "some"
            raise InputError(
                f"store {path}: holds {there} of {total} prompts, its writing was interrupted; "
                f"{how_to_finish(store)}"
            )
    return store


def how_to_finish(store: Any) -> str:
    """Advice on the options that finish a store."""
    added = " and append=True" if len(batches_written(store)) > 1 else ""
    return f"finish it with resume=True{added}"


def require_affordable(path: Place, store: Any, arrays: Mapping[str, Any]) -> None:
    """Refuse a store whose arrays claim more than its files can hold, before allocating memory.

    Raises:
        InputError: if arrays differ in the length of a shared axis, or one is far larger than its
            files. Labels are checked by their number of rows, which is that of the activations.
    """
    sizes = {"prompt": rows_expected(store)}
    measured = measured_names(store)
    # The activations first: the others must have their length.
    ordered = sorted(arrays.items(), key=lambda item: (item[0] not in measured, item[0]))
    for name, array in ordered:
        for axis, size in zip(array.attrs["_ARRAY_DIMENSIONS"], array.shape, strict=True):
            if size != sizes.setdefault(axis, size):
                raise InputError(
                    f"store {path}: is damaged: {name!r} is {size} long along {axis!r}, "
                    f"expected {sizes[axis]}"
                )
    for name, array in ordered:
        if name not in measured and "prompt" in array.attrs["_ARRAY_DIMENSIONS"]:
            continue
        size = math.prod(array.shape) * np.dtype(array.dtype).itemsize
        if size > _MAX_UNBACKED:
            files = [file.stat().st_size for file in (path / name).rglob("*") if file.is_file()]
            if size > _MAX_RATIO * sum(files):
                raise InputError(
                    f"store {path}: is damaged: {name!r} says {size:,} bytes, its "
                    f"{len(files)} files hold {sum(files):,}"
                )


def _check(path: Place, store: Any, arrays: Mapping[str, Any], dataset: xr.Dataset) -> None:
    """Compare everything except activations with the recorded digests."""
    written = int(store.attrs["written"])
    if layout_digest(arrays, dataset) != store.attrs["layout"]:
        raise InputError(f"store {path}: is damaged: its layout changed since it was written")
    stop = 0
    for size, prompts, digest in batches_written(store):
        rows = {"prompt": slice(stop, stop + size)}
        if (
            stop + size <= written
            and label_digest(dataset.isel(rows, missing_dims="ignore")) != digest
        ):
            raise InputError(
                f"store {path}: is damaged: the labels of rows {stop} to {stop + size - 1} "
                f"(prompts {prompts}) changed since they were written"
            )
        stop += size


def _as_objects(label: xr.Variable) -> xr.Variable:
    """Strings as `extract` returns them in memory (newer numpy reads them as another type)."""
    return label.astype(object) if label.dtype.kind == "T" else label
