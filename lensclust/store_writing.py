"""Writing shards into a store that is laid out: from any process that can reach it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import zarr

from lensclust.checked_arrays import damage_named, open_group
from lensclust.disk import writing
from lensclust.store_notes import DONE, measured_names
from lensclust.store_places import ZARR_2, Place


@dataclass(frozen=True)
class Destination:
    """Where the rows of one call lie in a store.

    Attributes:
        path: the store's folder or URL.
        start: the store's row that is the call's first.
    """

    path: Place
    start: int

    def put(self, rows: range, values: Mapping[str, np.ndarray]) -> None:
        """Write one shard: its values, then the note that they are there.

        Shards are the store's chunks, so that no two of them touch the same file, and writing
        one again changes nothing.

        Raises:
            InputError: if the store is damaged, or nothing can be written there.
        """
        region = slice(self.start + rows.start, self.start + rows.stop)
        with damage_named(self.path), writing(f"store {self.path}"):
            for name, stored in self._arrays.items():
                stored[region] = 1 if name == DONE else values[name]

    @cached_property
    def _arrays(self) -> dict[str, Any]:
        """Each variable, and the notes last; opened once, which takes several requests at a URL."""
        # A chunk of zeros gets a file too: one without is missing. zarr 2 does so by itself.
        whole = nullcontext() if ZARR_2 else zarr.config.set({"array.write_empty_chunks": True})
        with whole:
            store = open_group(self.path, "r+")
            return {name: store[name] for name in (*measured_names(store), DONE)}
