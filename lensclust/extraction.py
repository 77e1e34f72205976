"""One pass over prompts: activations at chosen sites and positions, labelled, in xarray.

Prompts are read shard by shard (`lensclust.shard_reading`), into memory or into a store that a
killed run can continue.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import xarray as xr
from transformer_lens.model_protocol import TransformerLensModel

from lensclust import store as on_disk
from lensclust.errors import InputError
from lensclust.progress import progress_bar
from lensclust.prompts import Prompts
from lensclust.shard_reading import ShardReader
from lensclust.sites import SiteSelector
from lensclust.store_places import Place, as_place
from lensclust.templates import measured


def extract(
    model: TransformerLensModel,
    prompts: Prompts,
    sites: SiteSelector,
    *,
    at: str | Sequence[str] = "answer",
    batch_tokens: int | None = None,
    shard: int = 512,
    share_prefixes: bool = True,
    dtype: str = "float32",
    store: str | Place | None = None,
    resume: bool = False,
    progress: bool = True,
) -> xr.Dataset:
    """Read activations at named positions of every prompt in one pass.

    Args:
        model: a hooked model, in eval mode.
        prompts: what to run; its ``rows`` become coordinates of ``prompt``.
        sites: ``"resid"``, ``"head"``, ``"attn_out"``, ``"mlp_out"``, ``"resid_mid"``, ``"z"``
            (all of a kind), one place (``"resid 5"``, ``"head 3.12"``), a `Site`, or a list.
            Single heads are read as the smallest block x head rectangle that holds them.
        at: read positions (`Prompts.position`), one or several.
        batch_tokens: upper bound of a batch's size, padding included; default 2,048 on a CPU
            (larger batches leave its caches) and 16,384 elsewhere.
        shard: prompts read between two writes; inside a shard they are sorted as it suits, so
            prompts that begin alike should not be farther apart than this.
        share_prefixes: compute what prompts of a shard have in common at their beginning once,
            where the model has a key/value cache and an estimate says that it pays (print
            `lensclust.plan_prefixes`). Equal to running all in full up to rounding.
        dtype: numpy type of what is kept.
        store: folder of a zarr store to write to instead of memory, or its URL
            (``s3://bucket/a``; `lensclust.store_places` says what a URL cannot give: see that
            only one process writes to it). A finished store with the same model, tokenizer and
            sites is appended to.
        resume: continue a store that a killed run left behind.
        progress: show a bar.

    Returns:
        Dataset with ``resid (prompt, position, layer, d_model)`` (layer 0 = embeddings, layer
        l = after block l-1), ``z (prompt, position, block, head, d_head)``, and ``attn_out``,
        ``mlp_out``, ``resid_mid (prompt, position, block, d_model)``, as asked for. With
        ``head``, ``head_frame (block, head, d_head, rank)`` lets distances between heads'
        contributions be taken in ``z`` (`lensclust.sites.head_frames`). Attributes hold the
        provenance. With ``store`` the dataset is read lazily from disk.

    Raises:
        InputError: if a site or position does not exist, a prompt is longer than the context,
            or the store holds something else.

    >>> import lensclust as lc
    >>> model = lc.load("native:sif-small")
    >>> acts = extract(model, lc.tasks.sif().where(split="new_string"), ["resid", "head"])
    >>> acts.resid.sel(layer=6, position="answer").dims
    ('prompt', 'd_model')
    """
    if shard < 1:
        raise InputError(f"extract: shard={shard}, expected at least 1")
    reader = ShardReader(
        model,
        prompts,
        sites,
        at=at,
        batch_tokens=batch_tokens,
        share_prefixes=share_prefixes,
        dtype=dtype,
    )

    def shards(pending: Sequence[range]) -> Iterator[tuple[range, dict[str, np.ndarray]]]:
        total = sum(len(rows) for rows in pending)
        with progress_bar("extract", total, enabled=progress) as advance:
            yield from reader.read(pending, advance)

    frame = reader.frame
    if store is not None:
        return on_disk.write(as_place(store), frame, shards, shard=shard, resume=resume)
    out = {name: np.empty(frame[name].shape, frame[name].dtype) for name in measured(frame)}
    for rows, values in shards(on_disk.shard_ranges(0, len(prompts), shard)):
        for name, value in values.items():
            out[name][rows.start : rows.stop] = value
    return frame.assign({name: (frame[name].dims, value) for name, value in out.items()})


class ShardReader:
    """What was asked of a model, held against it and its prompts, and read shard by shard.

    Args are those of `extract`; ``frame`` is the dataset to be filled, over zeros that take no
    memory.

    Raises:
        InputError: as `extract`.
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
        chosen = rectangle(resolve(model, sites))
        names = [at] if isinstance(at, str) else list(at)
        if not names or len(set(names)) < len(names):
            raise InputError(f"extract: positions must be given and differ, given {names}")
        if batch_tokens is not None and batch_tokens < 1:
            raise InputError(f"extract: batch_tokens={batch_tokens}, expected at least 1")
        self.prompts = prompts
        self.positions = torch.stack([prompts.position(name) for name in names], dim=1)
        require_fits(model, prompts, caller="extract")
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
                    raise InputError(f"extract: {name!r} does not fit float16; keep it as float32")
            yield rows, values

    @torch.no_grad()
    def _begin(self, rows: range, advance: Callable[..., None]) -> HostCopy:
        index = torch.arange(rows.start, rows.stop)
        return self._reader.read(self.prompts, index, self.positions[index], advance)


class BatchReader:
    """Runs batches and gathers the wanted positions of the wanted sites in the hooks."""

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
                # On the device once: an upload in a hook would hold up every layer.
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
        """Activations of one shard on their way to the host: variable -> the shard's rows."""
        buffers = self._buffers(len(index))
        asked = _Asked(prompts.tokens[index], prompts.lengths[index], positions)
        packing = self.sharing and self.sharing.plan(asked.tokens, asked.lengths, positions)
        if packing is None or not self._read_shared(packing, asked, buffers, advance):
            self._read_in_full(asked, buffers, advance)
        return HostCopy(buffers)

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
        self, asked: _Asked, buffers: Mapping[str, Tensor], advance: Callable[..., None]
    ) -> None:
        for rows in batches(asked.lengths, self.batch_tokens):
            longest = int(asked.lengths[rows].max())
            tokens = upload(asked.tokens[rows, :longest], self.device)
            places = asked.positions[rows]
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
        asked: _Asked,
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

        def error() -> float:
            """The largest relative difference of a layer's states at a position."""
            row = packing.witness
            alone = self._buffers(1)
            self._read_in_full(asked.take(torch.tensor([row])), alone, lambda _: None)
            differences = [
                (buffers[name][row] - expected[0]).float().flatten(2).norm(dim=2)
                / expected[0].float().flatten(2).norm(dim=2).clamp_min(1e-30)
                for name, expected in alone.items()
            ]
            return max(float(each.nan_to_num(torch.inf).max()) for each in differences)

        if self.sharing.run(packing, read, error):
            return True
        advance(-done)
        return False

    def _keep(self, buffer: Tensor, into: Tensor, slot: Tensor, layer: int, values: Tensor) -> None:
        """Put what was read at each wanted token where it belongs."""
        buffer[into, slot, layer] = values.to(buffer)

    def _gather(
        self, wanted: Int[Tensor, "read 4"], forward: Forward, buffers: Mapping[str, Tensor]
    ) -> None:
        """Copy what is wanted of a forward (row, place, prompt, slot) into the buffers."""
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
