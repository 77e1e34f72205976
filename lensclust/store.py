"""Activations on disk: a zarr group written shard by shard, resumable, appendable, verifiable.

Every prompt has a ``checksum`` of its activations, written after them; 0 means "not there yet".
What is missing after a kill is therefore what has no checksum, and what rotted on disk is what
no longer matches it. Shards follow the chunks of the arrays, so no two shards of one call touch
the same file; a chunk that an earlier call left half full is replaced whole, in one rename.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
import zarr
from jaxtyping import Int

from lensclust.errors import InputError

# Format 2 is read by zarr 2 and 3 alike, and has variable-length strings in its specification.
ZARR_FORMAT = 2
# What must agree before rows may be added to a store.
IDENTITY = ("weights", "tokenizer", "sites", "dtype")

Shard = tuple[range, Mapping[str, np.ndarray]]


def shard_ranges(start: int, stop: int, size: int) -> list[range]:
    """Rows ``start..stop`` cut at multiples of ``size``.

    >>> shard_ranges(3, 10, 4)
    [range(3, 4), range(4, 8), range(8, 10)]
    """
    cuts = [start, *range((start // size + 1) * size, stop, size), stop]
    return [range(a, b) for a, b in itertools.pairwise(cuts) if a < b]


def write(
    path: Path,
    frame: xr.Dataset,
    produce: Callable[[Sequence[range]], Iterable[Shard]],
    *,
    shard: int,
    resume: bool,
) -> xr.Dataset:
    """Write, append to or finish a store, and open it.

    Args:
        path: the store's folder.
        frame: labels, dimensions and provenance of the rows to write; its values are not read.
        produce: called with the row ranges of ``frame`` still missing, yields each with its
            values.
        shard: rows of a new store's chunks; a store keeps the size it was made with.
        resume: finish a store whose writing was interrupted.

    Raises:
        InputError: if the folder holds something else, another model's or other sites'
            activations, or an unfinished store that is not to be resumed.
    """
    if not path.exists() or not any(path.iterdir() if path.is_dir() else [path]):
        _create(path, frame, shard)
        start = 0
    else:
        start = _admit(path, frame, resume)
    store = _group(path, "r+")
    shard = int(store.attrs["shard"])
    done = np.asarray(store["checksum"][start : start + frame.sizes["prompt"]]) != 0
    missing = [
        range(rows.start - start, rows.stop - start)
        for rows in shard_ranges(start, start + frame.sizes["prompt"], shard)
        if not done[rows.start - start : rows.stop - start].all()
    ]
    for rows, values in produce(missing) if missing else ():
        region = slice(start + rows.start, start + rows.stop)
        for name, value in values.items():
            store[name][region] = value
        store["checksum"][region] = _checksums(values)
    return open_activations(path)


def open_activations(path: str | Path) -> xr.Dataset:
    """Open a finished store; labels are loaded, activations are read when they are used.

    Raises:
        InputError: if there is no store, or its writing was interrupted.
    """
    path = Path(path)
    _finished(path)
    dataset = xr.open_dataset(
        str(path),
        engine="zarr",
        chunks=None,
        drop_variables="checksum",
        backend_kwargs={"consolidated": False},
    )
    labels = {name: _as_objects(label.load()) for name, label in dataset.coords.items()}
    dataset = dataset.assign_coords(labels)
    return dataset.drop_attrs(deep=False).assign_attrs(_public(dataset.attrs))


def verify(path: str | Path) -> Int[np.ndarray, " bad"]:
    """Rows whose activations no longer match their checksum, read shard by shard.

    >>> import lensclust as lc, tempfile
    >>> folder = tempfile.mkdtemp()
    >>> model, prompts = lc.load("native:sif-small"), lc.tasks.sif().where(split="new_string")
    >>> acts = lc.extract(model, prompts, "resid 6", store=folder)
    >>> verify(folder).tolist()
    []
    """
    store = _finished(Path(path))
    written = np.asarray(store["checksum"][:])
    names = json.loads(store.attrs["measured"])
    bad = [
        rows.start + np.flatnonzero(_checksums({n: store[n][_slice(rows)] for n in names}) != kept)
        for rows in shard_ranges(0, len(written), int(store.attrs["shard"]))
        for kept in [written[_slice(rows)]]
    ]
    return np.concatenate(bad) if bad else np.empty(0, dtype=np.int64)


def _group(path: str | Path, mode: Literal["r", "r+"]) -> Any:
    """The zarr group, untyped: zarr cannot know which of its members are arrays."""
    return zarr.open_group(str(path), mode=mode)


def _create(path: Path, frame: xr.Dataset, shard: int) -> None:
    """Lay out the store beside its place and move it there whole."""
    measured = [str(name) for name in frame if "prompt" in frame[name].dims]
    shard = min(shard, frame.sizes["prompt"])
    attributes = {
        **frame.attrs,
        "batches": json.dumps([[frame.sizes["prompt"], frame.attrs["prompts"]]]),
        "measured": json.dumps(measured),
        "shard": shard,
    }
    checksum = ("prompt", np.broadcast_to(np.int64(0), frame.sizes["prompt"]))
    layout = frame.assign(checksum=checksum).assign_attrs(attributes)
    encoding: dict[str, Any] = {
        # One file a shard, position and layer: a sweep over sites reads only what it needs.
        name: {"chunks": _chunks(frame[name], shard), "_FillValue": None}
        for name in measured
    }
    # The fill value is what "not there yet" reads as, in chunks that do not exist.
    encoding["checksum"] = {"chunks": (shard,), "_FillValue": 0}
    for name, label in frame.coords.items():
        if label.dims == ("prompt",):
            encoding[str(name)] = {"chunks": (shard,)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # Chunks of nothing but the fill value are not written, so the layout takes no space.
        layout.to_zarr(
            str(temporary),
            mode="w",
            encoding=encoding,
            zarr_format=ZARR_FORMAT,
            consolidated=False,
            write_empty_chunks=False,
        )
        if path.exists():
            path.rmdir()
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _admit(path: Path, frame: xr.Dataset, resume: bool) -> int:
    """Make room in an existing store; returns the row where these prompts begin."""
    _require_store(path)
    store = _group(path, "r+")
    _require_same(path, store, frame)
    batches = json.loads(str(store.attrs["batches"]))
    n, digest = frame.sizes["prompt"], frame.attrs["prompts"]
    written, total = _written(store)
    complete = written == total
    if not complete and not resume:
        raise InputError(f"store {path}: its writing was interrupted; finish it with resume=True")
    if not complete and batches[-1] != [n, digest]:
        raise InputError(f"store {path}: was interrupted while reading other prompts than these")
    if complete and resume and [n, digest] in batches:
        return sum(size for size, _ in batches[: batches.index([n, digest])])
    if complete:
        batches.append([n, digest])
        total += n
        store.attrs["batches"] = json.dumps(batches)
    # Growing is repeated on resume: a kill may have come between two arrays.
    start = total - n
    for name in [*json.loads(str(store.attrs["measured"])), "checksum"]:
        store[name].resize((total, *store[name].shape[1:]))
    for name, label in frame.coords.items():
        if label.dims == ("prompt",):
            store[str(name)].resize((total,))
            store[str(name)][start:total] = label.values
    return start


def _require_store(path: Path) -> None:
    group = path / ".zgroup"
    attributes = path / ".zattrs"
    if not (group.exists() and attributes.exists() and '"measured"' in attributes.read_text()):
        raise InputError(f"store {path}: not a folder of activations made by extract(store=...)")


def _require_same(path: Path, store: Any, frame: xr.Dataset) -> None:
    for key in IDENTITY:
        if store.attrs[key] != frame.attrs[key]:
            raise InputError(
                f"store {path}: holds {key} {store.attrs[key]!r}, these are {frame.attrs[key]!r}"
            )
    labels = {str(name) for name, label in frame.coords.items() if label.dims == ("prompt",)}
    for name, label in frame.coords.items():
        if str(name) not in store:
            raise InputError(f"store {path}: has no {name!r}, these prompts have")
        if str(name) in labels and _kind(store[str(name)].dtype) != _kind(label.dtype):
            raise InputError(f"store {path}: holds {name} as {store[str(name)].dtype}, not these")
        if str(name) not in labels and list(store[str(name)][:]) != list(label.values):
            raise InputError(f"store {path}: holds {name} {list(store[str(name)][:])}, not these")
    known = {str(name) for name in store.array_keys()}
    extra = known - labels - set(map(str, frame.variables)) - {"checksum"}
    if extra:
        raise InputError(f"store {path}: holds {sorted(extra)}, these activations do not")


def _written(store: Any) -> tuple[int, int]:
    """Prompts that are there, and prompts that should be."""
    total = sum(size for size, _ in json.loads(store.attrs["batches"]))
    arrays = [*json.loads(store.attrs["measured"]), "checksum"]
    grown = min(store[name].shape[0] for name in arrays)
    written = np.count_nonzero(np.asarray(store["checksum"][:])[:grown])
    return int(written), total


def _finished(path: Path) -> Any:
    """The group of a store that holds all its prompts."""
    _require_store(path)
    store = _group(path, "r")
    written, total = _written(store)
    if written < total:
        raise InputError(
            f"store {path}: holds {written} of {total} prompts, its writing was interrupted; "
            "finish it with resume=True"
        )
    return store


def _kind(dtype: np.dtype) -> str:
    """Numbers by their kind; all the ways to hold strings are one."""
    return dtype.kind if dtype.kind in "iufb" else "string"


def _chunks(variable: xr.DataArray, shard: int) -> tuple[int, ...]:
    whole = {"prompt": shard, "position": 1, "layer": 1, "block": 1}
    return tuple(whole.get(str(dim), size) for dim, size in variable.sizes.items())


def _checksums(values: Mapping[str, np.ndarray]) -> Int[np.ndarray, " row"]:
    """One non-zero 64-bit digest a row, over the bytes of all variables in name order."""
    ordered = [np.ascontiguousarray(values[name]) for name in sorted(values)]
    digests = np.empty(len(ordered[0]), dtype=np.int64)
    for row in range(len(digests)):
        digest = hashlib.blake2b(digest_size=8)
        for value in ordered:
            digest.update(value[row].tobytes())
        digests[row] = int.from_bytes(digest.digest(), "little", signed=True) or 1
    return digests


def _as_objects(label: xr.DataArray) -> xr.DataArray:
    """Strings as `extract` gives them in memory (newer numpy reads them in a type of its own)."""
    return label.astype(object) if label.dtype.kind == "T" else label


def _slice(rows: range) -> slice:
    return slice(rows.start, rows.stop)


def _public(attributes: Mapping[Any, Any]) -> dict[Any, Any]:
    return {k: v for k, v in attributes.items() if k not in ("batches", "measured", "shard")}
