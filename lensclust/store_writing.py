"""Writing shards into a store that is laid out: from any process that can reach it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lensclust.checked_arrays import SUMS, checksums, damage_named, open_group
from lensclust.disk import writing
from lensclust.store_notes import measured_names
from lensclust.store_places import Place


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
        """Write one shard: its values, then the checksums that say that they are there.

        Shards are the store's chunks, so that no two of them touch the same file, and writing
        one again changes nothing.

        Raises:
            InputError: if the store is damaged, or nothing can be written there.
        """
        region = slice(self.start + rows.start, self.start + rows.stop)
        with damage_named(self.path), writing(f"store {self.path}"):
            for name, (stored, _) in self._arrays.items():
                stored[region] = values[name]
            for name, (_, sums) in self._arrays.items():
                sums[region] = checksums(values[name], sums.ndim)

    @cached_property
    def _arrays(self) -> dict[str, tuple[Any, Any]]:
        """Each variable and its checksums; opened once, which takes several requests at a URL."""
        store = open_group(self.path, "r+")
        return {name: (store[name], store[f"{name}{SUMS}"]) for name in measured_names(store)}
