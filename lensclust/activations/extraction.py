"""Extraction of activations at chosen sites and positions into a labelled xarray dataset.

Prompts are read shard by shard (`lensclust.activations.reader`), into memory or into a store that
can be resumed after a kill.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import xarray as xr
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.activations.reader import ShardReader
from lensclust.activations.skeleton import measured
from lensclust.activations.store import writing as on_disk
from lensclust.arguments import checked_arguments
from lensclust.errors import check_counts
from lensclust.models import SiteSelector, shard_ranges
from lensclust.progress import progress_bar
from lensclust.prompts import Prompts
from lensclust.storage import Place, as_place


@checked_arguments
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
    append: bool = False,
    progress: bool = True,
) -> xr.Dataset:
    """Read activations at named positions of every prompt in one pass.

    If a prompt of a shard has 256 tokens or more, attention runs without materialising its
    matrix, provided that the model's code supports it, the results agree up to rounding (checked
    once), and no hook is on a part of attention other than ``z``.

    Args:
        model: a hooked model, in eval mode.
        prompts: the prompts to run; their ``rows`` become coordinates of ``prompt``.
        sites: ``"resid"``, ``"head"``, ``"attn_out"``, ``"mlp_out"``, ``"resid_mid"``, ``"z"``
            (all existing sites of a kind: a hybrid has heads in its attention blocks only), one
            site (``"resid 5"``, ``"head 3.12"``), a `Site`, or a list. Single heads are read as
            the smallest block x head rectangle that holds them.
        at: read positions (`Prompts.position`), one or several.
        batch_tokens: upper bound of a batch's size, padding included; default 2,048 on a CPU
            (larger batches exceed its caches) and 16,384 elsewhere.
        shard: prompts read between two writes; they are sorted within a shard, so prompts with a
            common prefix should not be farther apart than this.
        share_prefixes: compute common prefixes of a shard's prompts once, if the model has a
            key/value cache and the estimated cost is lower (print `lensclust.plan_prefixes`).
            Equal to running all in full up to rounding.
        dtype: numpy type of the stored activations.
        store: folder of a zarr store to write to instead of memory, or its URL
            (``s3://bucket/a``; a URL has no lock: make sure that only one process writes to it,
            see `lensclust.storage.locations`).
        resume: continue a store whose writing was interrupted. One that was finished with exactly
            these prompts (tokens, labels, spans and answers) is opened unchanged; one that holds
            other prompts too is refused.
        append: add these prompts to a finished store with the same model, tokenizer and sites, and
            return all its prompts. Prompts that are already in it are refused: they would leak
            from one fold into another. With ``resume`` as well, prompts that an earlier call
            added are not added again.
        progress: show a bar.

    Returns:
        Dataset with ``resid (prompt, position, layer, d_model)`` (layer 0 = embeddings, layer
        l = after block l-1), ``z (prompt, position, block, head, d_head)``, and ``attn_out``,
        ``mlp_out``, ``resid_mid (prompt, position, block, d_model)``, as requested. With
        ``head``, ``head_frame (block, head, d_head, rank)`` allows distances between heads'
        contributions to be computed from ``z`` (`lensclust.models.head_frames`). Attributes hold
        the provenance. With ``store`` the dataset is read lazily from disk. Join parts read from
        one model with ``xr.concat(parts, "prompt", data_vars="minimal")``. xarray keeps only the
        attributes of the first part: keep the activations of several models separate.

    Raises:
        InputError: if a site or position does not exist, no rectangle holds the sites (heads of
            different sizes, kinds in different blocks), a prompt is longer than the context, a
            label has the name of a variable or axis, or the store holds something else, or is
            finished and ``append`` is not set.

    >>> import lensclust as lc
    >>> model = lc.load("native:sif-small")
    >>> acts = extract(model, lc.tasks.sif().where(split="new_string"), ["resid", "head"])
    >>> acts.resid.sel(layer=6, position="answer").dims
    ('prompt', 'd_model')
    """
    check_counts("extract", shard=shard, batch_tokens=batch_tokens)
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
        return on_disk.write(
            as_place(store),
            frame,
            shards,
            keys=prompts.row_digests(),
            shard=shard,
            resume=resume,
            append=append,
        )
    out = {name: np.empty(frame[name].shape, frame[name].dtype) for name in measured(frame)}
    for rows, values in shards(shard_ranges(0, len(prompts), shard)):
        for name, value in values.items():
            out[name][rows.start : rows.stop] = value
    return frame.assign({name: (frame[name].dims, value) for name, value in out.items()})
