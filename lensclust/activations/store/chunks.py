"""Lazily read arrays of a store: a damaged, missing or foreign chunk is an error, never data.

Each chunk of activations ends with a checksum, whose initial value identifies the store (weights,
settings, first prompts). Chunks of other stores do not match.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numcodecs
import numpy as np
import xarray as xr
import zarr
from numcodecs.abc import Codec
from numcodecs.compat import ensure_contiguous_ndarray, ndarray_copy
from numcodecs.registry import register_codec
from upath import UPath
from xarray.backends import BackendArray
from xarray.core import indexing

from lensclust.errors import InputError
from lensclust.storage import ZARR_2, Place, digest_of, read_json, zarr_store

# Format 2 is read by zarr 2 and 3 alike, and has variable-length strings in its specification.
ZARR_FORMAT = 2
# xarray's name for compression, and the options to open a group: a store of format 3 or a second
# copy of the metadata in the same folder is not read.
PACKED = "compressor" if ZARR_2 else "compressors"
_ONLY: dict[str, Any] = {} if ZARR_2 else {"zarr_format": ZARR_FORMAT, "use_consolidated": False}
# Modules whose errors are about a store's contents; errors of others are about access to it.
_IN_ZARR = re.compile(r"builtins|zarr|numcodecs|xarray|json")
# Without pickle, from which zarr would run code.
_CODECS = {"blosc", "zstd", "vlen-utf8", "lensclust_crc32"}


@contextmanager
def damage_named(path: Place) -> Iterator[None]:
    """Turn errors of zarr about a damaged store, which have no common type, into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        refused = isinstance(error, (PermissionError, ConnectionError, TimeoutError))
        if isinstance(path, UPath) and (refused or not _IN_ZARR.match(type(error).__module__)):
            raise InputError(f"store {path}: cannot be reached: {reason}") from error
        raise InputError(f"store {path}: is damaged or cannot be read: {reason}") from error


def open_group(path: Place, mode: str) -> Any:
    """The zarr group, untyped: zarr cannot know which of its members are arrays.

    Raises:
        InputError: if an array's metadata names a codec that `lensclust` never uses.
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


def packing(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Codecs of activations in a store with these attributes: LZ4, then a checksum.

    >>> packing({"weights": "a"}) == packing({"weights": "b"})
    False
    """
    checksum = ChunkChecksum(begun_from=int(digest_of(provenance)[:8], 16))
    return {"filters": [numcodecs.Blosc("lz4")], PACKED: checksum}


class ChunkChecksum(Codec):
    """A zarr codec: a CRC-32 after each chunk, with an initial value that identifies the store.

    numcodecs' checksums have a fixed initial value, or (`numcodecs.JenkinsLookup3`) take a fifth
    of the time to write a store. zarr finds this codec wherever lensclust is installed.

    >>> codec = ChunkChecksum(begun_from=7)
    >>> bytes(codec.decode(codec.encode(b"states")))
    b'states'
    >>> codec.decode(ChunkChecksum(begun_from=8).encode(b"states"))
    Traceback (most recent call last):
    ...
    ValueError: the chunk does not match its checksum
    """

    codec_id = "lensclust_crc32"

    def __init__(self, begun_from: int) -> None:
        self.begun_from = begun_from

    def encode(self, buf: Any) -> Any:
        content = ensure_contiguous_ndarray(buf).view("u1")
        packed = bytearray(content.nbytes + 4)
        packed[:-4] = content.data
        packed[-4:] = zlib.crc32(content.data, self.begun_from).to_bytes(4, "little")
        return packed

    def decode(self, buf: Any, out: Any = None) -> Any:
        packed = ensure_contiguous_ndarray(buf).view("u1")
        content = packed[:-4]
        if zlib.crc32(content.data, self.begun_from).to_bytes(4, "little") != packed[-4:].tobytes():
            raise ValueError("the chunk does not match its checksum")
        return ndarray_copy(content, out)


register_codec(ChunkChecksum)


class CheckedArray(BackendArray):
    """One variable of a store.

    Args:
        whole: every chunk has a file (in stores of an earlier version, chunks of zeros have none).
    """

    def __init__(self, path: Place, values: Any, *, whole: bool) -> None:
        self.path, self.values, self.whole = path, values, whole
        self.shape, self.dtype = tuple(self.values.shape), np.dtype(self.values.dtype)

    def variable(self) -> xr.Variable:
        """The array as a variable of a dataset; values are cached after reading, as in xarray."""
        lazy: Any = indexing.LazilyIndexedArray(self)
        kept = indexing.MemoryCachedArray(indexing.CopyOnWriteArray(lazy))
        return xr.Variable(self.values.attrs["_ARRAY_DIMENSIONS"], kept)

    def is_damaged(self, rows: range) -> bool:
        """Whether a chunk with these rows is unreadable."""
        try:
            self._read((slice(rows.start, rows.stop), *[slice(None)] * (len(self.shape) - 1)))
        except InputError:
            return True
        return False

    @cached_property
    def _there(self) -> set[str]:
        return {file.name for file in self.path.iterdir()}

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        outer = indexing.IndexingSupport.OUTER
        return indexing.explicit_indexing_adapter(key, self.shape, outer, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        with damage_named(self.path):
            if self.whole:
                sizes = zip(key, self.shape, self.values.chunks, strict=True)
                places = [np.unique(np.arange(n)[k] // chunk) for k, n, chunk in sizes]
                names = [".".join(map(str, at)) for at in itertools.product(*places)]
                missing = [name for name in names if name not in self._there]
                if missing:
                    raise InputError(
                        f"store {self.path}: is damaged: {len(missing)} of {len(names)} chunks are "
                        f"missing, the first is {missing[0]}; extract them again"
                    )
            return np.asarray(self.values.oindex[key])
