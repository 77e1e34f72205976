"""Arrays of a store that are held against their checksums whenever they are read.

A vector is what one prompt gave at one position and layer (or block): the axes behind those.
Its checksum is the CRC-32 of its bytes, never 0. Unlike a checksum of a file, it does not depend
on how zarr packs chunks, survives the growth of a half full chunk, and names the row.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr
import zarr
from jaxtyping import Bool, UInt32
from upath import UPath
from xarray.backends import BackendArray
from xarray.core import indexing

from lensclust.disk import read_json
from lensclust.errors import InputError
from lensclust.store_places import ZARR_2, Place, zarr_store

# The array beside NAME that holds its checksums is NAME_crc.
SUMS = "_crc"
# The axes that come before a vector's own.
CHECKED_AXES = ("prompt", "position", "layer", "block")
# Format 2 is read by zarr 2 and 3 alike, and has variable-length strings in its specification.
ZARR_FORMAT = 2
# What xarray calls the way an array is packed, and how a group is opened: what else may lie there,
# a store of format 3 or a second copy of the metadata, is not read.
PACKED = "compressor" if ZARR_2 else "compressors"
_ONLY: dict[str, Any] = {} if ZARR_2 else {"zarr_format": ZARR_FORMAT, "use_consolidated": False}
# zarr would run the code in a chunk that says it is pickled.
# What raises errors about what a store holds; other modules' are about the way there.
_IN_ZARR = re.compile(r"builtins|zarr|numcodecs|xarray|json")
_CODECS = {"blosc", "zstd", "vlen-utf8"}


@contextmanager
def damage_named(path: Place) -> Iterator[None]:
    """One line for whatever zarr raises about a damaged store: it has no error type for that."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        refused = isinstance(error, (PermissionError, ConnectionError, TimeoutError))
        if isinstance(path, UPath) and (refused or not _IN_ZARR.match(type(error).__module__)):
            raise InputError(f"store {path}: cannot be reached: {reason}") from error
        raise InputError(f"store {path}: is damaged or cannot be read: {reason}") from error


def open_group(path: Place, mode: str) -> Any:
    """The zarr group, untyped: zarr cannot know which of its members are arrays.

    Raises:
        InputError: if an array says that it is packed in a way that `lensclust` never uses.
    """
    for file in sorted((child / ".zarray" for child in path.iterdir()), key=str):
        if not file.exists():
            continue
        described = read_json(file)
        packed = [described.get("compressor"), *(described.get("filters") or [])]
        odd = [codec for codec in packed if codec and codec.get("id") not in _CODECS]
        if odd:
            raise InputError(f"store {path}: {file} asks for codec {odd[0]}, expected {_CODECS}")
    store: Any = zarr_store(path, read_only=mode == "r")
    return zarr.open_group(store, mode=mode, **_ONLY)  # pyright: ignore[reportArgumentType]


def checksums(values: np.ndarray, axes: int) -> UInt32[np.ndarray, ...]:
    """CRC-32 of each vector, the bytes behind the first ``axes`` axes; 1 in the place of 0.

    >>> checksums(np.zeros((2, 3, 4), np.float32), 2).shape
    (2, 3)
    """
    flat = np.ascontiguousarray(values).reshape(int(np.prod(values.shape[:axes])), -1)
    vectors: Any = flat.view(np.uint8)
    found = [zlib.crc32(vector) or 1 for vector in vectors]
    return np.array(found, dtype=np.uint32).reshape(values.shape[:axes])


class CheckedArray(BackendArray):
    """One variable of a store, read lazily; a damaged vector is an error when it is read."""

    def __init__(self, path: Place, store: Any, name: str) -> None:
        self.path, self.name = path, name
        self.values, self.stored = store[name], store[f"{name}{SUMS}"]
        self.shape, self.dtype = tuple(self.values.shape), np.dtype(self.values.dtype)

    def variable(self) -> xr.Variable:
        """As a variable of a dataset; what was read once is kept, as xarray does."""
        lazy: Any = indexing.LazilyIndexedArray(self)
        kept = indexing.MemoryCachedArray(indexing.CopyOnWriteArray(lazy))
        return xr.Variable(self.values.attrs["_ARRAY_DIMENSIONS"], kept)

    def damaged(self, rows: range) -> Bool[np.ndarray, " row"]:
        """Which rows do not match; all of them where a file cannot be read at all."""
        region = slice(rows.start, rows.stop)
        try:
            found = checksums(np.asarray(self.values[region]), self.sums.ndim)
        except Exception:  # zarr has no error type for damage
            return np.ones(len(rows), dtype=bool)
        return (found != self.sums[region]).reshape(len(rows), -1).any(1)

    @cached_property
    def sums(self) -> np.ndarray:
        """All checksums, at a few thousandths of the activations' size."""
        return np.asarray(self.stored[:])

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        outer = indexing.IndexingSupport.OUTER
        return indexing.explicit_indexing_adapter(key, self.shape, outer, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        # Whole vectors, every axis kept; what was not asked for is cut away afterwards.
        whole = [_as_range(k, size) for k, size in zip(key, self.shape, strict=True)]
        with damage_named(self.path):
            axes = self.sums.ndim
            rest = [slice(None)] * (len(whole) - axes)
            values = np.asarray(self.values.oindex[(*whole[:axes], *rest)])
            expected = _outer(self.sums, whole[:axes])
        bad = checksums(values, axes) != expected
        if bad.any():
            at = int(np.flatnonzero(bad.reshape(len(bad), -1).any(1))[0])
            row = int(np.arange(self.shape[0])[whole[0]][at])
            raise InputError(
                f"store {self.path}: is damaged: {int(bad.sum())} of {bad.size} vectors of "
                f"{self.name!r} do not match their checksum, the first in row {row}; "
                "extract them again"
            )
        lead = [0 if isinstance(k, (int, np.integer)) else slice(None) for k in key[:axes]]
        return _outer(values, [*lead, *key[axes:]])


def _as_range(key: Any, size: int) -> Any:
    """A place as the slice that holds it; slices and lists of places as they are."""
    if isinstance(key, (int, np.integer)):
        return slice(int(key) % size, int(key) % size + 1)
    return key


def _outer(array: np.ndarray, key: list[Any]) -> np.ndarray:
    """Each axis indexed for itself; from the last, so that dropped axes move no other."""
    for axis in reversed(range(len(key))):
        array = array[(slice(None),) * axis + (key[axis],)]
    return array
