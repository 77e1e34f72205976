"""A store of activations written, opened and read, against the same chunks through xarray alone.

The peer has the same layout and LZ4, and no checksums, digests, lock, resume or flush to the disk.
Rounds of both are interleaved; what is read is compared.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import xarray as xr

import lensclust as lc
from lensclust.activations.store.chunks import PACKED, ZARR_FORMAT
from lensclust.activations.store.writing import write

PROMPTS, LAYERS, D_MODEL, SHARD, ROUNDS = 20_000, 13, 256, 1000, 5


def rows() -> list[dict[str, object]]:
    """Three rows: 260 MB written, opened and read."""
    acts = _activations()
    ways: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "write": (_write, _write_plainly),
        "open": (lambda _, at: lc.open_activations(at), lambda _, at: _open_plainly(at)),
        "read": (
            lambda _, at: lc.open_activations(at).resid.values,
            lambda _, at: _open_plainly(at).resid.values,
        ),
    }
    seconds = {name: ([], []) for name in ways}
    found: list[Any] = [None, None]
    with tempfile.TemporaryDirectory() as top:
        for number in range(ROUNDS):
            for name, pair in ways.items():
                for who, way in enumerate(pair):
                    at = Path(top) / f"{number}-{who}"
                    start = time.perf_counter()
                    found[who] = way(acts, at)
                    seconds[name][who].append(time.perf_counter() - start)
    difference = float(np.abs(found[0] - found[1]).max())
    return [
        {
            "what": f"{name} a store: {PROMPTS:,} prompts, {LAYERS} layers of {D_MODEL}",
            "peer": "xarray and zarr, LZ4, no checksums",
            "ours / peer": float(np.median(np.divide(ours, theirs))),
            "peer, seconds": float(np.median(theirs)),
            "largest difference": difference,
        }
        for name, (ours, theirs) in seconds.items()
    ]


def _activations() -> xr.Dataset:
    rng = np.random.default_rng(0)
    states = rng.normal(size=(PROMPTS, 1, LAYERS, D_MODEL)).astype(np.float32)
    return xr.Dataset(
        {"resid": (("prompt", "position", "layer", "d_model"), states)},
        {"position": ["answer"], "layer": range(LAYERS)}
        | {"task": ("prompt", (np.arange(PROMPTS) % 10).astype(str).astype(object))},
        {"model": "m", "weights": "w", "prompts": "p"},
    )


def _write(acts: xr.Dataset, at: Path) -> None:
    def produce(missing: Sequence[range]) -> Iterable[tuple[range, Mapping[str, np.ndarray]]]:
        for rows in missing:
            yield rows, {"resid": acts.resid.values[rows.start : rows.stop]}

    keys = np.arange(PROMPTS, dtype=np.uint64)
    # As `extract` has it: what is to be filled takes no memory.
    empty = np.broadcast_to(np.float32(0), acts.resid.shape)
    frame = acts.assign(resid=(acts.resid.dims, empty))
    write(at, frame, produce, keys=keys, shard=SHARD, resume=False, append=False)


def _write_plainly(acts: xr.Dataset, at: Path) -> None:
    packed = numcodecs.Blosc("lz4")
    layout = {"chunks": (SHARD, 1, 1, D_MODEL), PACKED: packed}
    acts.to_zarr(at, encoding={"resid": layout}, zarr_format=ZARR_FORMAT, consolidated=False)  # pyright: ignore[reportCallIssue]


def _open_plainly(at: Path) -> xr.Dataset:
    return xr.open_zarr(at, chunks=None, consolidated=False, zarr_format=ZARR_FORMAT)
