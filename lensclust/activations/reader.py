"""Reading shards of prompts with hooks, in forwards that stop at the last requested site.

Hooks copy only the requested positions into preallocated buffers, so that memory holds one batch
of the model's activations and the rows that are kept. Where the model allows it and it is faster,
common prefixes run once (`lensclust.inference.prefix_sharing.sharing`), and long prompts run
without an attention matrix (`lensclust.inference.fused_attention`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.activations.dataset import VARIABLES
from lensclust.activations.skeleton import measured, rectangle, template
from lensclust.errors import InputError
from lensclust.inference import HostCopy, arrived, require_fits, upload
from lensclust.inference.fused_attention import fused_attention
from lensclust.inference.prefix_sharing import Forward, Packing, PrefixSharing
from lensclust.models import (
    Site,
    SiteSelector,
    batches,
    default_budget,
    hook_name,
    model_device,
    model_name,
    resolve,
    without_cache,
)
from lensclust.prompts import Prompts

DTYPES = ("float16", "float32", "float64")
# Prompt length at which attention matrices take a fifth of a forward's time.
LONG = 256


class _AllSitesRead(Exception):
    """Raised inside a hook to stop a forward after the last requested site."""


@dataclass(frozen=True, eq=False)
class _Requested:
    """Right-padded prompts, and the requested tokens of each."""

    tokens: Int[Tensor, "row token"]
    lengths: Int[Tensor, " row"]
    positions: Int[Tensor, "row position"]

    def take(self, rows: Int[Tensor, " some"]) -> _Requested:
        return _Requested(self.tokens[rows], self.lengths[rows], self.positions[rows])


class ShardReader:
    """Reads requested activations shard by shard, after checking the request.

    Args are those of `lensclust.extract`; ``frame`` is the dataset to be filled, over zeros that
    take no memory.

    Raises:
        InputError: as `lensclust.extract`.
    """

    def __init__(
        self,
        model: TransformerLensModel,
        prompts: Prompts,
        sites: SiteSelector,
        *,
        at: str | Sequence[str] = "answer",
        batch_tokens: int | None = None,
        share_prefixes: bool = True,
        dtype: str = "float32",
    ) -> None:
        require_fits(model, prompts, caller="extract")
        chosen = rectangle(model, resolve(model, sites))
        names: list[Any] = list(at) if isinstance(at, (list, tuple)) else [at]
        if odd := [name for name in names if not isinstance(name, str)]:
            raise InputError(
                f"extract: at={odd[0]!r}, expected names of positions such as 'answer'"
            )
        if not names or len(set(names)) < len(names):
            raise InputError(f"extract: positions must be given and differ, given {names}")
        if batch_tokens is not None and batch_tokens < 1:
            raise InputError(f"extract: batch_tokens={batch_tokens}, expected at least 1")
        self.prompts = prompts
        self.positions = torch.stack([prompts.position(name) for name in names], dim=1)
        if dtype not in DTYPES:
            raise InputError(f"extract: dtype {dtype!r} is not known: expected one of {DTYPES}")
        self.frame = template(model, prompts, chosen, names, np.dtype(dtype))
        self._start = partial(BatchReader, model, chosen, self.frame, batch_tokens, share_prefixes)

    @cached_property
    def _reader(self) -> BatchReader:
        return self._start()

    def read(
        self, shards: Iterable[range], advance: Callable[..., None]
    ) -> Iterator[tuple[range, dict[str, np.ndarray]]]:
        """Activations of each shard's prompts: variable -> array over its rows."""
        for rows, values in arrived((rows, self._begin(rows, advance)) for rows in shards):
            for name, value in values.items():
                if value.dtype == np.float16 and not np.isfinite(value).all():
                    raise InputError(f"extract: {name!r} overflows float16; give dtype='float32'")
            yield rows, values

    @torch.no_grad()
    def _begin(self, rows: range, advance: Callable[..., None]) -> HostCopy:
        index = torch.arange(rows.start, rows.stop)
        return self._reader.read(self.prompts, index, self.positions[index], advance)


class BatchReader:
    """Runs batches and gathers the requested positions and sites in hooks."""

    def __init__(
        self,
        model: TransformerLensModel,
        sites: Sequence[Site],
        frame: xr.Dataset,
        batch_tokens: int | None,
        share_prefixes: bool,
    ) -> None:
        self.model = model
        self.frame = frame
        self.batch_tokens = batch_tokens or default_budget(model)
        self.device = model_device(model)
        # hook -> (variable, index on its layer axis, heads kept)
        self.targets: dict[str, tuple[str, int, Tensor | None]] = {}
        for site in sites:
            variable, axis = VARIABLES[site.kind]
            index = frame[axis].values.tolist().index(site.layer)
            heads = None
            if variable == "z":
                # Uploaded once: an upload in a hook would delay every layer.
                heads = torch.tensor(frame["head"].values, device=self.device)
            self.targets[hook_name(model, site)] = (variable, index, heads)
        self.sharing = None
        if share_prefixes:
            dtype = getattr(torch, str(frame[measured(frame)[0]].dtype))
            self.sharing = PrefixSharing(
                model, caller="extract", batch_tokens=batch_tokens, dtype=dtype
            )
        self.arguments = without_cache(model)

    def read(
        self,
        prompts: Prompts,
        index: Int[Tensor, " row"],
        positions: Int[Tensor, "row position"],
        advance: Callable[..., None],
    ) -> HostCopy:
        """Activations of one shard, being copied to the host: variable -> the shard's rows."""
        buffers = self._buffers(len(index))
        requested = _Requested(prompts.tokens[index], prompts.lengths[index], positions)
        with self._fused(requested):
            packing = self.sharing and self.sharing.plan(
                requested.tokens, requested.lengths, positions
            )
            if packing is None or not self._read_shared(packing, requested, buffers, advance):
                self._read_in_full(requested, buffers, advance)
        return HostCopy(buffers)

    def _fused(self, requested: _Requested) -> AbstractContextManager[Any]:
        """The model's fused attention, if a prompt is long."""
        model, longest = self.model, int(requested.lengths.max())
        if longest < LONG or not isinstance(model, TransformerBridge):
            return nullcontext()
        return fused_attention(model, longest, hooks=self.targets)

    def _buffers(self, rows: int) -> dict[str, Tensor]:
        return {
            name: torch.empty(
                (rows, *self.frame[name].shape[1:]),
                dtype=getattr(torch, str(self.frame[name].dtype)),
                device=self.device,
            )
            for name in measured(self.frame)
        }

    def _read_in_full(
        self, requested: _Requested, buffers: Mapping[str, Tensor], advance: Callable[..., None]
    ) -> None:
        for rows in batches(self.model, requested.lengths, self.batch_tokens):
            longest = int(requested.lengths[rows].max())
            tokens = upload(requested.tokens[rows, :longest], self.device)
            places = requested.positions[rows]
            row, slot = torch.meshgrid(
                torch.arange(len(rows)), torch.arange(places.shape[1]), indexing="ij"
            )
            wanted = torch.stack([row, places, rows[row], slot], dim=-1).flatten(0, 1)
            self._gather(
                wanted,
                lambda hooks, tokens=tokens: self.model.run_with_hooks(
                    tokens, fwd_hooks=list(hooks), return_type=None, **self.arguments
                ),
                buffers,
            )
            advance(len(rows))

    def _read_shared(
        self,
        packing: Packing,
        requested: _Requested,
        buffers: Mapping[str, Tensor],
        advance: Callable[..., None],
    ) -> bool:
        assert self.sharing is not None
        done = 0

        def read(wanted: Tensor, forward: Forward) -> None:
            nonlocal done
            self._gather(wanted, forward, buffers)
            finished = int((wanted[:, 3] == 0).sum())
            done += finished
            advance(finished)

        def compared() -> Iterator[tuple[Tensor, Tensor]]:
            """States of every layer and position ``(position, layer, ...)``."""
            row = packing.farthest
            alone = self._buffers(1)
            self._read_in_full(requested.take(torch.tensor([row])), alone, lambda _: None)
            for name, expected in alone.items():
                yield buffers[name][row].flatten(2), expected[0].flatten(2)

        if self.sharing.run(packing, read, compared):
            return True
        advance(-done)
        return False

    def _keep(self, buffer: Tensor, into: Tensor, slot: Tensor, layer: int, values: Tensor) -> None:
        """Store the values of each requested token in its row of the buffer."""
        buffer[into, slot, layer] = values.to(buffer)

    def _gather(
        self, wanted: Int[Tensor, "read 4"], forward: Forward, buffers: Mapping[str, Tensor]
    ) -> None:
        """Copy requested tokens (row, place, prompt, slot) of a forward into the buffers."""
        awaited = set(self.targets)
        row, place, into, slot = upload(wanted, self.device).unbind(1)

        def keep(name: str) -> Callable[[Tensor, Any], None]:
            variable, layer, heads = self.targets[name]

            def hook(value: Tensor, hook: Any) -> None:
                if name not in awaited:
                    raise RuntimeError(f"extract: hook {name!r} fired twice in one forward")
                awaited.discard(name)
                gathered = value[row.to(value.device), place.to(value.device)]
                if heads is not None:
                    gathered = gathered[:, heads.to(value.device)]
                self._keep(buffers[variable], into, slot, layer, gathered)
                if not awaited:
                    raise _AllSitesRead

            return hook

        try:
            forward([(name, keep(name)) for name in self.targets])
        except _AllSitesRead:
            return
        raise RuntimeError(
            f"extract: {sorted(awaited)} never fired in {model_name(self.model)}; "
            "load the model with eager attention"
        )
