"""Writing a store: shard by shard, with resume, append and checksums.

A shard is marked as written after its chunks are, so after a kill the unmarked shards are missing.
Chunks carry checksums, and a mismatch is an error at reading, never data
(`lensclust.activations.store.chunks`). Labels and provenance are compared with digests in the
store's attributes when it is opened.

Shards follow the chunks of the arrays, so no two shards of one call touch the same file; a chunk
that an earlier call left half full is replaced atomically. One process writes at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import xarray as xr
import zarr
from jaxtyping import Int, UInt64

from lensclust.activations.store.attributes import (
    DONE,
    ROW_KEYS,
    batch_entry,
    batches_written,
    kind,
    layout_digest,
    measured_names,
    note,
    provenance,
    rows_done,
    rows_expected,
    stored_kind,
)
from lensclust.activations.store.chunks import (
    PACKED,
    ZARR_FORMAT,
    CheckedArray,
    damage_named,
    open_group,
    packing,
)
from lensclust.activations.store.reading import (
    how_to_finish,
    open_activations,
    opened,
    read_finished,
    require_affordable,
)
from lensclust.errors import InputError
from lensclust.models import same_tokenizer, shard_ranges
from lensclust.storage import (
    ZARR_2,
    Place,
    as_place,
    created_atomically,
    flush,
    is_free,
    locked_place,
    writing,
    zarr_store,
)

# Attributes that must agree before rows may be added to a store.
IDENTITY = ("weights", "settings", "tokenizer", "sites", "dtype")
# Names of zarr's temporary files.
_PARTIAL = re.compile(r"[\w.]+\.[0-9a-f]{32}\.partial")

Shard = tuple[range, Mapping[str, np.ndarray]]


def write(
    path: Place,
    frame: xr.Dataset,
    produce: Callable[[Sequence[range]], Iterable[Shard]],
    *,
    keys: UInt64[np.ndarray, " prompt"],
    shard: int,
    resume: bool,
    append: bool,
) -> xr.Dataset:
    """Create, append to or finish a store from this process, and open it.

    Args:
        path, frame, keys, shard, resume, append: as in `fill`.
        produce: called with the missing row ranges of ``frame``, yields each with its values.

    Raises:
        InputError: as `fill`.
    """

    def work(destination: Destination, missing: Sequence[range]) -> None:
        for rows, values in produce(missing):
            destination.put(rows, values)

    return fill(path, frame, work, keys=keys, shard=shard, resume=resume, append=append)


def fill(
    path: Place,
    frame: xr.Dataset,
    work: Callable[[Destination, Sequence[range]], None],
    *,
    keys: UInt64[np.ndarray, " prompt"],
    shard: int,
    resume: bool,
    append: bool,
) -> xr.Dataset:
    """Create, append to or finish a store; `work` writes the missing shards. Then open it.

    This process holds the lock, creates the store and marks it as complete.

    Args:
        path: the store's folder or URL.
        frame: labels, dimensions and provenance of the rows to write; its values are not read.
        work: called with the destination of shards and the missing row ranges of ``frame``;
            returns when all are written, by this process or others.
        keys: a hash of each row's prompt (`Prompts.row_digests`).
        shard: rows of a new store's chunks; an existing store keeps its size.
        resume: finish a store whose writing was interrupted; nothing is written to a finished one
            that holds exactly these prompts.
        append: add prompts to a finished store; with ``resume``, the store may hold others too.

    Raises:
        InputError: if the folder holds something else, another model's or other sites'
            activations, an unfinished store without ``resume``, a finished one without ``append``
            or with some of these prompts, or one to be resumed that holds others beside these; if
            another process writes to it; if it is damaged or not writable.
    """
    what = f"store {path}"
    with locked_place(path, what):
        with damage_named(path):
            is_new = is_free(path)
        if is_new:
            with damage_named(path), writing(what):
                _create(path, frame.assign({ROW_KEYS: ("prompt", keys)}), shard)
            start = 0
        else:
            start = _admit(path, frame, keys, resume=resume, append=append)
        with damage_named(path):
            store = open_group(path, "r+")
            stop = start + frame.sizes["prompt"]
            done = rows_done(store, slice(start, stop))
        missing = [
            range(rows.start - start, rows.stop - start)
            for rows in shard_ranges(start, stop, int(store.attrs["shard"]))
            if not done[rows.start - start : rows.stop - start].all()
        ]
        if missing:
            work(Destination(path, start), missing)
            _remove_partial_chunks(path)
        with damage_named(path), writing(what):
            whole = bool(rows_done(store, slice(start, stop)).all())
            if whole and stop == rows_expected(store) != int(store.attrs["written"]):
                if isinstance(path, Path):
                    flush(path)
                note(store, written=stop)
        if not whole:
            raise RuntimeError(f"store {path}: some missing shards were not written")
        return read_finished(path, open_group(path, "r"))


def verify(path: str | Place) -> Int[np.ndarray, " bad"]:
    """Rows of shards that do not match their checksums or are missing.

    Raises:
        InputError: if there is no finished store, or its labels or attributes are damaged.

    >>> import lensclust as lc, tempfile
    >>> folder = tempfile.mkdtemp()
    >>> model, prompts = lc.load("native:sif-small"), lc.tasks.sif().where(split="new_string")
    >>> acts = lc.extract(model, prompts, "resid 6", store=folder)
    >>> verify(folder).tolist()
    []
    """
    place = as_place(path)
    sizes = open_activations(place).sizes
    store = open_group(place, "r")
    whole = DONE in store
    arrays = [
        CheckedArray(place / name, store[name], whole=whole) for name in measured_names(store)
    ]
    shards = shard_ranges(0, sizes["prompt"], int(store.attrs["shard"]))
    bad = [rows for rows in shards if any(array.is_damaged(rows) for array in arrays)]
    return np.array([row for rows in bad for row in rows], dtype=int)


def _create(path: Place, frame: xr.Dataset, shard: int) -> None:
    """Create the store in a temporary folder and move it into place atomically."""
    measured = [str(n) for n in frame if "prompt" in frame[n].dims and n != ROW_KEYS]
    shard = min(shard, frame.sizes["prompt"])
    done = ("prompt", np.zeros(frame.sizes["prompt"], np.uint8))
    layout = frame.assign({DONE: done}).drop_attrs(deep=False)
    # Arrays that are always read whole have a separate checksum: no decoder sees damaged bytes.
    guarded = numcodecs.Zstd(level=1, checksum=True)
    encoding: dict[str, Any] = {str(name): {PACKED: guarded} for name in layout.variables}
    for name in measured:
        # One file per shard, position and layer: a sweep over sites reads only what it needs.
        packed = packing(provenance(frame.attrs))
        encoding[name] = {"chunks": _chunks(frame[name], shard), "_FillValue": None, **packed}
    # Chunks that are not written yet read as the fill value.
    encoding[DONE]["_FillValue"] = 0
    for name, label in layout.variables.items():
        if label.dims == ("prompt",):
            encoding[str(name)] |= {"chunks": (shard,)}
    with created_atomically(path) as building:
        # Arrays of activations are created without rows and grow: nothing is written yet.
        without_rows = layout[measured].drop_vars(layout.coords).isel(prompt=slice(0))
        for mode, part in (("w", without_rows), ("a", layout.drop_vars(measured))):
            part.to_zarr(
                zarr_store(building, read_only=False),
                mode=mode,
                encoding={name: encoding[name] for name in map(str, part.variables)},
                zarr_format=ZARR_FORMAT,
                consolidated=False,
                write_empty_chunks=False,
            )
        store = open_group(building, "r+")
        for name in measured:
            store[name].resize(frame[name].shape)
        note(
            store,
            **frame.attrs,
            batches=json.dumps([batch_entry(frame)]),
            measured=json.dumps(measured),
            shard=shard,
            written=0,
            layout=layout_digest(dict(store.arrays()), frame),
        )


def _admit(
    path: Place,
    frame: xr.Dataset,
    keys: UInt64[np.ndarray, " prompt"],
    *,
    resume: bool,
    append: bool,
) -> int:
    """Grow an existing store for these prompts; return the first of their rows."""
    store = opened(path, "r+")
    _remove_partial_chunks(path)
    with damage_named(path):
        _require_same(path, store, frame)
        batches, batch = batches_written(store), batch_entry(frame)
        known = [given[:2] for given in batches]
        n, total = frame.sizes["prompt"], rows_expected(store)
        complete = int(store.attrs["written"]) == total
        if complete:
            require_affordable(path, store, dict(store.arrays()))
        is_known = batch[:2] in known
        if complete and not (resume and is_known):
            _require_new(path, np.asarray(store[ROW_KEYS][:]), keys, resume=resume, append=append)
        if not complete and not resume:
            raise InputError(f"store {path}: its writing was interrupted; {how_to_finish(store)}")
        if not complete and not is_known:
            raise InputError(
                f"store {path}: was interrupted while reading other prompts than these (tokens, "
                "labels, spans or answers differ)"
            )
        if is_known and total > n and not append:
            advice = "open it with open_activations, or give append=True to get all of them"
            raise InputError(
                f"store {path}: holds {total - n} more prompts than the {n} to be resumed; "
                f"{advice if complete else how_to_finish(store)}"
            )
        is_new = complete and not (resume and is_known)
        number = len(known) if is_new else known.index(batch[:2])
    with damage_named(path), writing(f"store {path}"):
        if is_new:
            total += n
            note(store, batches=json.dumps([*batches, batch]))
        start = sum(size for size, _ in known[:number])
        if not complete or is_new:
            # Growing is repeated on resume: a kill may have happened between two arrays.
            _grow(store, frame, keys, slice(start, start + n), total)
    return start


def _remove_partial_chunks(path: Place) -> None:
    """Remove zarr's temporary files of a killed process; the store is locked."""
    if isinstance(path, Path):
        for left in (
            file for folder in (path, *path.iterdir()) for file in folder.glob("*.partial")
        ):
            if _PARTIAL.fullmatch(left.name) and left.is_file():
                left.unlink()


def _require_new(
    path: Place, there: np.ndarray, keys: np.ndarray, *, resume: bool, append: bool
) -> None:
    """Refuse prompts that must not be added to a finished store."""
    repeated = np.flatnonzero(np.isin(keys, there))
    if repeated.size:
        are_all = len(repeated) == len(keys) == len(there)
        advice = " or resume=True" if are_all and not resume else ""
        raise InputError(
            f"store {path}: is finished and holds {len(repeated)} of these {len(keys)} prompts, "
            f"the first is prompt {repeated[0]} (prompts that come twice leak from one fold into "
            f"another); open it with open_activations{advice}"
        )
    if not append:
        raise InputError(
            f"store {path}: is finished and holds other prompts than these (tokens, labels, spans "
            "or answers differ); add them with append=True, or write them elsewhere"
        )


def _grow(
    store: Any, frame: xr.Dataset, keys: UInt64[np.ndarray, " prompt"], rows: slice, total: int
) -> None:
    for name in (*measured_names(store), DONE):
        store[name].resize((total, *store[name].shape[1:]))
    labels = {
        str(n): label.values for n, label in frame.coords.items() if label.dims == ("prompt",)
    }
    for name, values in {**labels, ROW_KEYS: keys}.items():
        store[name].resize((total,))
        store[name][rows] = values


def _require_same(path: Place, store: Any, frame: xr.Dataset) -> None:
    for key in IDENTITY:
        same = same_tokenizer if key == "tokenizer" else str.__eq__
        # Stores of an earlier version do not record the settings.
        if not same(store.attrs.get(key, frame.attrs[key]), frame.attrs[key]):
            raise InputError(
                f"store {path}: holds {key} {store.attrs[key]!r}, these are {frame.attrs[key]!r}"
            )
    if hooks := store.attrs.get("hooks") or frame.attrs["hooks"]:
        raise InputError(
            f"store {path}: cannot be resumed or added to while hooks are on the model ({hooks}): "
            "they may edit states differently each time; write a new store in one call"
        )
    if ROW_KEYS not in store or DONE not in store:
        raise InputError(
            f"store {path}: was written by an earlier version: it can be read "
            "(open_activations), not resumed or appended to"
        )
    labels = {str(name) for name, label in frame.coords.items() if label.dims == ("prompt",)}
    elsewhere = "or write to another store"
    for name, label in frame.coords.items():
        if str(name) not in store:
            raise InputError(
                f"store {path}: its prompts have no label {str(name)!r}, these have; leave it out, "
                f"{elsewhere}"
            )
        if str(name) in labels:
            there, here = stored_kind(store[str(name)]), kind(label.dtype)
            if there != here:
                raise InputError(
                    f"store {path}: holds label {str(name)!r} as {_spelt(there)}, these prompts "
                    f"have it as {_spelt(here)}; give it alike, {elsewhere}"
                )
        elif list(store[str(name)][:]) != list(label.values):
            there, here = (
                ", ".join(map(str, each)) for each in (store[str(name)][:], label.values)
            )
            raise InputError(
                f"store {path}: holds {name} {there}, asked for {here}; read the same, {elsewhere}"
            )
    extra = set(store.array_keys()) - labels - set(map(str, frame.variables)) - {ROW_KEYS, DONE}
    if extra:
        raise InputError(
            f"store {path}: holds {', '.join(sorted(extra))}, which these prompts and sites do not "
            f"have; give them too, {elsewhere}"
        )


def _spelt(kind: str) -> str:
    return {"string": "text", "|b1": "True or False"}.get(kind) or str(np.dtype(kind))


def _chunks(variable: xr.DataArray, shard: int) -> tuple[int, ...]:
    whole = {"prompt": shard, "position": 1, "layer": 1, "block": 1}
    return tuple(whole.get(str(dim), size) for dim, size in variable.sizes.items())


@dataclass(frozen=True)
class Destination:
    """The place of one call's rows in a store.

    Attributes:
        path: the store's folder or URL.
        start: the store's row that is the call's first.
    """

    path: Place
    start: int

    def put(self, rows: range, values: Mapping[str, np.ndarray]) -> None:
        """Write one shard: its values, then the mark that they are complete.

        Shards are the store's chunks, so that no two of them touch the same file, and writing
        one twice changes nothing.

        Raises:
            InputError: if the store is damaged or not writable.
        """
        region = slice(self.start + rows.start, self.start + rows.stop)
        with damage_named(self.path), writing(f"store {self.path}"):
            for name, stored in self._arrays.items():
                stored[region] = 1 if name == DONE else values[name]

    @cached_property
    def _arrays(self) -> dict[str, Any]:
        """Each variable, and the marks last; opened once, which takes several requests at a URL."""
        # A chunk of zeros gets a file too, or it would count as missing; zarr 2 does so by default.
        whole = nullcontext() if ZARR_2 else zarr.config.set({"array.write_empty_chunks": True})
        with whole:
            store = open_group(self.path, "r+")
            return {name: store[name] for name in (*measured_names(store), DONE)}
