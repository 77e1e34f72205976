"""Interactive view of heads: scores of all, clusters and attention of the best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from lensclust.activations import dataset_sites, prompt_labels, site_values
from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.models import Site
from lensclust.report.views import MOST_TOKENS, AttentionSample, HeadView
from probes.attention import AttentionSamples
from probes.clustering import plane_of

# Maximum bytes of the opened heads' data in a page.
_MOST_BYTES = 600_000
_MOST_PROMPTS = 300


@checked_arguments
def head_view(
    acts: xr.Dataset,
    scores: pd.DataFrame,
    *,
    attention: AttentionSamples | None = None,
    sample_names: Sequence[str] = (),
    labels: Sequence[str] = ("task",),
    text: str | None = None,
    score: str = "metric",
    position: str | None = None,
    title: str = "Heads",
    caption: str = "",
    most_bytes: int = _MOST_BYTES,
    most_prompts: int = _MOST_PROMPTS,
) -> HeadView:
    """Make a heat map of heads in which each head opens its clusters and attention.

    A head's map is the plane of the two largest principal components of its contribution to the
    residual stream over the given prompts. If there are more heads than fit, those with the
    highest first score open, with a note in the caption.

    Args:
        acts: activations that hold heads, of the prompts to show. For scores within input, give
            prompts of one input.
        scores: one row per score, block and head, with columns ``block`` (or ``layer``), ``head``,
            ``value`` and the one ``score`` names; rows of several seeds are averaged.
        attention: patterns of sample prompts (`probes.sample_attention`) of all heads, or of
            those that open.
        sample_names: names of the sample prompts; default their text.
        labels: coordinates of ``prompt`` to colour by; the first is the initial one.
        text: the coordinate to show on hovering over a point; default the labels.
        score: the column with the names of scores.
        position: which read position, if the activations hold several.
        title, caption: texts above and below.
        most_bytes: maximum size of maps and patterns in a page.
        most_prompts: maximum number of rows shown, evenly spaced.

    Raises:
        InputError: if a column or label does not exist, a head has two rows of a score, a score
            is of no head or of one that is not in the activations, a sample prompt is too long
            to draw, or names and samples differ in number.

    >>> import lensclust as lc
    >>> import probes
    >>> model, prompts = lc.load("native:sif-small"), lc.tasks.sif().where(split="new_string")
    >>> acts = lc.extract(model, prompts, "head")
    >>> clusters = probes.cluster(acts, metrics=["ari", "ami"], permutations=2, jobs=1)
    >>> attention = probes.sample_attention(model, prompts.take([0, 40]))
    >>> view = head_view(acts, clusters.frame, attention=attention)
    >>> list(view.scores), view.scores["ari"].shape, len(view.opened), view.points.shape[1:]
    (['ari', 'ami'], (6, 4), 24, (300, 2))
    """
    if acts.sizes["prompt"] < 2:
        raise InputError("head_view: one prompt given, expected at least two to lay in a plane")
    if not labels:
        raise InputError("head_view: no label to colour by, expected at least one")
    grids = _grids(scores, score)
    sites = _ranked(acts, next(iter(grids.values())), attention)
    every = acts.sizes["prompt"]
    rows = np.unique(np.linspace(0, every - 1, min(every, most_prompts)).round().astype(int))
    pairs = [n * (n + 1) // 2 for n in map(len, attention.tokens if attention else ())]
    opened = sites[: max(1, int(most_bytes / (4 / 3 * (4 * len(rows) + sum(pairs)))))]
    shown = acts.isel(prompt=rows)
    planes = [plane_of(site_values(shown, site, position=position)) for site in opened]
    columns = {name: tuple(prompt_labels(shown, name).tolist()) for name in labels}
    notes = [caption] if caption else []
    if len(opened) < len(sites):
        first = next(iter(grids))
        notes.append(f"The {len(opened)} heads of {len(sites)} with the highest {first} open.")
    if len(rows) < every:
        notes.append(f"{len(rows):,} of {every:,} prompts drawn.")
    return HeadView(
        title=title,
        caption=" ".join(notes),
        scores=grids,
        opened=tuple((site.layer, int(site.head or 0)) for site in opened),
        points=np.stack([points for points, _ in planes]),
        explained=np.array([share for _, share in planes]),
        labels=columns,
        texts=_texts(shown, text, columns),
        samples=_samples(attention, opened, sample_names),
    )


def _grids(scores: pd.DataFrame, score: str) -> dict[str, Float[np.ndarray, "block head"]]:
    """Mean of each score over seeds at every head; NaN for heads without it."""
    block = "block" if "block" in scores else "layer"
    for column in (block, "head", "value", score):
        if column not in scores:
            raise InputError(f"head_view: no column {column!r}: the scores have {list(scores)}")
    heads = scores.dropna(subset=["head"])
    unit = [score, block, "head", *(["seed"] if "seed" in heads else [])]
    if heads.empty or heads.duplicated(unit).any():
        what = "scores of no head" if heads.empty else f"several rows that share {unit}"
        raise InputError(f"head_view: {what}, expected one row per score and head")
    shape = (int(heads[block].max()) + 1, int(heads["head"].max()) + 1)
    found = {}
    for name, rows in heads.groupby(score, sort=False):
        means = rows.groupby([block, "head"])["value"].mean()
        grid = np.full(shape, np.nan)
        for (b, h), value in means.items():
            grid[int(b), int(h)] = value
        found[str(name)] = grid
    return found


def _ranked(
    acts: xr.Dataset, score: Float[np.ndarray, "block head"], attention: AttentionSamples | None
) -> list[Site]:
    """Heads that can open, by decreasing score; those without one come last."""
    sites = dataset_sites(acts, "head")
    if attention is not None:
        sites = [site for site in sites if site in attention.heads]
    values = {}
    for site in sites:
        block, head = site.layer, int(site.head or 0)
        inside = block < score.shape[0] and head < score.shape[1]
        values[site] = float(score[block, head]) if inside else np.nan
    if np.isnan(list(values.values())).all():
        raise InputError(
            "head_view: no head has activations, a score and (with attention) a pattern"
        )
    return sorted(sites, key=lambda site: -np.nan_to_num(values[site], nan=-np.inf))


def _texts(
    acts: xr.Dataset, text: str | None, columns: dict[str, tuple[str, ...]]
) -> tuple[str, ...]:
    if text is not None:
        return tuple(prompt_labels(acts, text).tolist())
    return tuple(" · ".join(row) for row in zip(*columns.values(), strict=True))


def _samples(
    attention: AttentionSamples | None, opened: Sequence[Site], names: Sequence[str]
) -> tuple[AttentionSample, ...]:
    if attention is None:
        return ()
    if names and len(names) != len(attention.tokens):
        raise InputError(
            f"head_view: {len(names)} names for {len(attention.tokens)} sample prompts"
        )
    places = [attention.heads.index(site) for site in opened]
    found = []
    for index, (tokens, pattern) in enumerate(
        zip(attention.tokens, attention.patterns, strict=True)
    ):
        if len(tokens) > MOST_TOKENS:
            raise InputError(
                f"head_view: sample prompt {index} has {len(tokens)} tokens, expected at most "
                f"{MOST_TOKENS} in a picture"
            )
        query, key = np.tril_indices(len(tokens))
        weights = np.clip(pattern[places][:, query, key] * 255, 0, 255).round().astype(np.uint8)
        found.append(AttentionSample(names[index] if names else "".join(tokens), tokens, weights))
    return tuple(found)
