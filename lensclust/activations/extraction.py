"""One pass over prompts: activations at chosen sites and positions, labelled, in xarray.

Prompts are read shard by shard (`lensclust.activations.reader`), into memory or into a store that a
killed run can continue.
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

    Where a prompt of a shard is 256 tokens long or longer, no attention matrix is made, if the
    model's own code can do without, gives the same up to rounding (tried once), and no hook
    looks at a part of attention but ``z``.

    Args:
        model: a hooked model, in eval mode.
        prompts: what to run; its ``rows`` become coordinates of ``prompt``.
        sites: ``"resid"``, ``"head"``, ``"attn_out"``, ``"mlp_out"``, ``"resid_mid"``, ``"z"``
            (all of a kind that there are: a hybrid has heads in its attention blocks alone), one
            place (``"resid 5"``, ``"head 3.12"``), a `Site`, or a list. Single heads are read as
            the smallest block x head rectangle that holds them.
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
            (``s3://bucket/a``; `lensclust.storage.locations` says what a URL cannot give: see that
            only one process writes to it).
        resume: continue a store that a killed run left behind. One that was finished with these
            very prompts (tokens, labels, spans and answers) is opened and left as it is; one that
            holds others beside them is refused.
        append: add these prompts to a finished store with the same model, tokenizer and sites, and
            return all that it holds. Prompts that are in it already are refused: they would leak
            from one fold into another. With ``resume`` as well, what an earlier call added is
            not added again.
        progress: show a bar.

    Returns:
        Dataset with ``resid (prompt, position, layer, d_model)`` (layer 0 = embeddings, layer
        l = after block l-1), ``z (prompt, position, block, head, d_head)``, and ``attn_out``,
        ``mlp_out``, ``resid_mid (prompt, position, block, d_model)``, as asked for. With
        ``head``, ``head_frame (block, head, d_head, rank)`` lets distances between heads'
        contributions be taken in ``z`` (`lensclust.models.head_frames`). Attributes hold the
        provenance. With ``store`` the dataset is read lazily from disk. Parts that
        were read of one model are joined by ``xr.concat(parts, "prompt",
        data_vars="minimal")``. xarray keeps the attributes of the first part alone: keep the
        activations of several models apart.

    Raises:
        InputError: if a site or position does not exist, no rectangle holds the sites (heads of
            different sizes, kinds that lie in different blocks), a prompt is longer than the
            context, a label has the name of a variable or axis, or the store holds something
            else, or is finished and ``append`` is not set.

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
