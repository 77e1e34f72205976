"""One pass over prompts: activations at chosen sites and positions, labelled, in xarray.

The forward ends as soon as the last wanted site has fired; only the wanted positions are
copied, inside the hook, into a buffer allocated beforehand, so that memory holds one batch of
the model's own activations and the rows that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_protocol import TransformerLensModel

from lensclust import store as on_disk
from lensclust.activations import VARIABLES
from lensclust.errors import InputError
from lensclust.fits import require_fits
from lensclust.progress import progress_bar
from lensclust.prompts import Prompts
from lensclust.sites import Site, SiteSelector, head_frames, hook_name, model_name, resolve
from lensclust.weights import fingerprint

BATCH_TOKENS = {"cpu": 2_048}
ACCELERATOR_TOKENS = 16_384
DTYPES = ("float16", "float32", "float64")


class _AllSitesRead(Exception):
    """Raised inside a hook to end a forward that has nothing left to give."""


def extract(
    model: TransformerLensModel,
    prompts: Prompts,
    sites: SiteSelector,
    *,
    at: str | Sequence[str] = "answer",
    batch_tokens: int | None = None,
    shard: int = 512,
    dtype: str = "float32",
    store: str | Path | None = None,
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
        shard: prompts read between two writes; inside a shard prompts are sorted by length.
        dtype: numpy type of what is kept.
        store: folder of a zarr store to write to instead of memory. A finished store with the
            same model, tokenizer and sites is appended to.
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
    chosen = _rectangle(resolve(model, sites))
    names = [at] if isinstance(at, str) else list(at)
    if not names or len(set(names)) < len(names):
        raise InputError(f"extract: positions must be given and differ, given {names}")
    for name, number in {"batch_tokens": batch_tokens, "shard": shard}.items():
        if number is not None and number < 1:
            raise InputError(f"extract: {name}={number}, expected at least 1")
    positions = torch.stack([prompts.position(name) for name in names], dim=1)
    require_fits(model, prompts, caller="extract")
    if dtype not in DTYPES:
        raise InputError(f"extract: dtype {dtype!r} is not known: expected one of {DTYPES}")
    frame = _template(model, prompts, chosen, names, np.dtype(dtype))

    def shards(pending: Sequence[range]) -> Iterator[tuple[range, dict[str, np.ndarray]]]:
        total = sum(len(rows) for rows in pending)
        with torch.no_grad(), progress_bar("extract", total, enabled=progress) as advance:
            reader = _Reader(model, chosen, frame, batch_tokens or default_budget(model))
            for rows in pending:
                index = torch.arange(rows.start, rows.stop)
                yield rows, reader.read(prompts, index, positions[index], advance)

    if store is not None:
        return on_disk.write(Path(store), frame, shards, shard=shard, resume=resume)
    out = {name: np.empty(frame[name].shape, frame[name].dtype) for name in _measured(frame)}
    for rows, values in shards(on_disk.shard_ranges(0, len(prompts), shard)):
        for name, value in values.items():
            out[name][rows.start : rows.stop] = value
    return frame.assign({name: (frame[name].dims, value) for name, value in out.items()})


def _rectangle(sites: Sequence[Site]) -> list[Site]:
    """The sites, and what else lies in the block x kind rectangle that an array has to be."""
    per_block = {site.kind: site for site in sites if site.kind != "resid"}
    blocks = {site.layer for site in sites if site.kind != "resid"}
    others = [replace(site, layer=block) for site in per_block.values() for block in blocks]
    return list(dict.fromkeys([*sites, *others]))


class _Reader:
    """Runs batches and gathers the wanted positions of the wanted sites in the hooks."""

    def __init__(
        self,
        model: TransformerLensModel,
        sites: Sequence[Site],
        frame: xr.Dataset,
        batch_tokens: int,
    ) -> None:
        self.model = model
        self.frame = frame
        self.batch_tokens = batch_tokens
        self.device = torch.device(model.cfg.device or "cpu")
        # hook -> (variable, index on its layer axis, heads kept)
        self.targets: dict[str, tuple[str, int, Tensor | None]] = {}
        for site in sites:
            variable, axis = VARIABLES[site.kind]
            index = frame[axis].values.tolist().index(site.layer)
            heads = torch.tensor(frame["head"].values) if variable == "z" else None
            self.targets[hook_name(model, site)] = (variable, index, heads)
        self.arguments = _forward_arguments(model)

    def read(
        self,
        prompts: Prompts,
        index: Int[Tensor, " row"],
        positions: Int[Tensor, "row position"],
        advance: Callable[..., None],
    ) -> dict[str, np.ndarray]:
        """Activations of one shard: variable -> array over the shard's rows."""
        buffers = {
            name: torch.empty(
                (len(index), *self.frame[name].shape[1:]),
                dtype=getattr(torch, str(self.frame[name].dtype)),
                device=self.device,
            )
            for name in _measured(self.frame)
        }
        lengths = prompts.lengths[index]
        for rows in batches(lengths, self.batch_tokens):
            tokens = prompts.tokens[index[rows], : int(lengths[rows].max())]
            self._run(tokens.to(self.device), rows, positions[rows], buffers)
            advance(len(rows))
        for name, buffer in buffers.items():
            if buffer.dtype == torch.float16 and not bool(buffer.isfinite().all()):
                raise InputError(f"extract: {name!r} does not fit float16; keep it as float32")
        return {name: buffer.cpu().numpy() for name, buffer in buffers.items()}

    def _run(
        self,
        tokens: Int[Tensor, "row token"],
        rows: Int[Tensor, " row"],
        positions: Int[Tensor, "row position"],
        buffers: Mapping[str, Tensor],
    ) -> None:
        awaited = set(self.targets)
        row_axis = torch.arange(len(rows), device=self.device)[:, None]
        where = positions.to(self.device)
        into = rows.to(self.device)

        def keep(name: str) -> Callable[[Tensor, Any], None]:
            variable, layer, heads = self.targets[name]

            def hook(value: Tensor, hook: Any) -> None:
                if name not in awaited:
                    raise RuntimeError(f"extract: hook {name!r} fired twice in one forward")
                awaited.discard(name)
                gathered = value[row_axis, where.to(value.device)]
                if heads is not None:
                    gathered = gathered[:, :, heads.to(value.device)]
                buffers[variable][into, :, layer] = gathered.to(buffers[variable])
                if not awaited:
                    raise _AllSitesRead

            return hook

        try:
            self.model.run_with_hooks(
                tokens,
                fwd_hooks=[(name, keep(name)) for name in self.targets],
                return_type=None,
                **self.arguments,
            )
        except _AllSitesRead:
            return
        raise RuntimeError(
            f"extract: {sorted(awaited)} never fired in {model_name(self.model)}; "
            "load the model with eager attention"
        )


def default_budget(model: TransformerLensModel) -> int:
    return BATCH_TOKENS.get(torch.device(model.cfg.device or "cpu").type, ACCELERATOR_TOKENS)


def batches(lengths: Int[Tensor, " row"], budget: int) -> Iterator[Int[Tensor, " row"]]:
    """Row indices by falling length, cut so that rows x longest stays within the budget.

    Longest first: what does not fit in memory fails at once, not after an hour.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        stop = start + max(1, budget // longest)
        yield order[start:stop]
        start = stop


def _measured(frame: xr.Dataset) -> list[str]:
    return [str(name) for name in frame if "prompt" in frame[name].dims]


def _template(
    model: TransformerLensModel,
    prompts: Prompts,
    sites: Sequence[Site],
    positions: Sequence[str],
    dtype: np.dtype,
) -> xr.Dataset:
    """The dataset to be filled: dimensions, labels and provenance over memory-less zeros."""
    cfg = model.cfg
    places: dict[str, set[int]] = {"layer": set(), "block": set(), "head": set()}
    for site in sites:
        places[VARIABLES[site.kind][1]].add(site.layer)
        if site.head is not None:
            places["head"].add(site.head)
    coords: dict[str, Any] = {k: (k, sorted(v)) for k, v in places.items() if v}
    coords["position"] = ("position", list(positions))
    for label, values in prompts.label_arrays().items():
        if label in ("prompt", "position", "layer", "block", "head", "d_model", "d_head", "rank"):
            raise InputError(f"extract: label {label!r} of the rows is the name of an axis")
        coords[label] = ("prompt", values)
    sizes = {axis: len(values[1]) for axis, values in coords.items() if axis in places}
    sizes |= {"prompt": len(prompts), "position": len(positions)}
    sizes |= {"d_model": cfg.d_model, "d_head": cfg.d_head}
    variables: dict[str, Any] = {}
    for variable, axis in dict.fromkeys(VARIABLES[site.kind] for site in sites):
        tail = ("block", "head", "d_head") if variable == "z" else (axis, "d_model")
        dims = ("prompt", "position", *tail)
        variables[variable] = (dims, np.broadcast_to(dtype.type(0), [sizes[d] for d in dims]))
    if any(site.kind == "head" for site in sites):
        blocks = sorted(places["block"])
        frames = head_frames(model, blocks)[:, sorted(places["head"])].cpu().numpy()
        variables["head_frame"] = (("block", "head", "d_head", "rank"), frames)
    return xr.Dataset(variables, coords, _provenance(model, prompts, sites, dtype))


def _provenance(
    model: Any, prompts: Prompts, sites: Sequence[Site], dtype: np.dtype
) -> dict[str, Any]:
    libraries = ("lensclust", "transformer-lens", "transformers", "torch")
    return {
        "model": model_name(model),
        "weights": fingerprint(model),
        "tokenizer": prompts.tokenizer,
        "prompts": prompts.digest(),
        "sites": ", ".join(sorted({site.kind for site in sites})),
        "dtype": str(dtype),
        **{f"version_{name}": version(name) for name in libraries},
    }


def _forward_arguments(model: TransformerLensModel) -> dict[str, Any]:
    """Hugging Face models build a key/value cache unless told not to; native ones have none."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    return {"use_cache": False} if hasattr(config, "use_cache") else {}
