"""What the scores of the realistic study say: its claims, notes and figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

import lensclust as lc
import probes
from lensclust import figures
from lensclust.results import decide
from lensclust.views import ClusterView
from studies.frames import means, plane, rank_correlations, where

PAPER: dict[str, Any] = {
    "source": "Wu & Varshney, arXiv 2402.12151",
    "origin": "reconstruction",
}
OURS: dict[str, Any] = {"source": "this project", "origin": "extension"}
MODEL, WORDS, RANDOM = "model", "bag of tokens", "random weights"
# A baseline this close to the model leaves little to be explained by the model.
HIGH_BASELINE = 0.5
# So many points a page still moves at once.
MOST_POINTS = 800


def best_by_group(groups: pd.DataFrame, metric: str, *, kind: str = "resid") -> pd.DataFrame:
    """Each group's score at the best site, the site chosen on the other half of the groups.

    The best of many sites is biased upwards on the data that chose it; here no group takes part
    in choosing its own site.

    Returns:
        Mean over seeds by group (rows) and source (columns); NaN where a source lacks a group.
    """
    scores = where(groups, metric=metric, kind=kind)
    task = where(scores, by="task")
    chosen = []
    for (source, seed), rows in task.groupby(["source", "seed"]):
        names = sorted(rows["group"].unique())
        for own, other in ((names[::2], names[1::2]), (names[1::2], names[::2])):
            best = where(rows, group=other).groupby("site")["value"].mean().idxmax()
            chosen.append(where(scores, source=source, seed=seed, site=best, group=own))
    found = pd.concat(chosen)
    by_task = where(found, by="task").pivot_table("value", "group", "source")
    if "template" in set(found["by"]):
        template = where(found, by="template", source=MODEL).groupby("group")["value"].mean()
        by_task["template"] = template
    return by_task


def claims(scores: pd.DataFrame, groups: pd.DataFrame, given: str) -> list[lc.Claim]:
    """Decide the claims; every value is one input's (or fold's)."""
    ari = best_by_group(groups, "ari")
    near = best_by_group(groups, "1nn_accuracy")
    both = ari.dropna(subset=[RANDOM])
    chance = where(scores, metric="1nn_accuracy", source=MODEL)["null_mean"].mean()
    layers = where(groups, metric="ari", by="task", kind="resid")
    depth, untrained = (
        rank_correlations(where(layers, source=source), "layer", "value", by="group")
        for source in (MODEL, RANDOM)
    )
    shared: dict[str, Any] = {"unit": given, "n_seeds": int(scores["seed"].nunique())}
    found = [
        decide(
            "above-wording",
            f"States cluster by task (best layer, given the {given}) beyond their wording: ARI "
            "above that of the bag of tokens",
            (ari[MODEL] - ari[WORDS]).to_numpy(),
            control=means(ari[[MODEL, WORDS]]),
            at_least=0.2,
            **PAPER,
            **shared,
        ),
        decide(
            "above-random-weights",
            "and beyond what the architecture alone does: ARI above that of random weights",
            (both[MODEL] - both[RANDOM]).to_numpy(),
            control=means(both[[MODEL, RANDOM]]),
            at_least=0.2,
            **PAPER,
            **shared,
        ),
        decide(
            "paraphrase-neighbours",
            "A prompt's nearest neighbour with another paraphrase has the same task (accuracy)",
            near[MODEL].to_numpy(),
            control={"chance": float(chance)} | means(near[[WORDS, RANDOM]]),
            at_least=0.55,
            **PAPER,
            **shared,
        ),
        decide(
            "deeper",
            "Deeper layers cluster more (rank correlation of ARI with layer)",
            depth.to_numpy(),
            control={RANDOM: float(untrained.mean())},
            at_least=0,
            **PAPER,
            **shared,
        ),
    ]
    if "template" in ari:
        found.append(
            decide(
                "not-template",
                "The clusters are tasks, not sentence shapes: ARI with task above ARI with "
                "template",
                (ari[MODEL] - ari["template"]).dropna().to_numpy(),
                control=means(ari[[MODEL, "template"]]),
                at_least=0,
                **OURS,
                **shared,
            )
        )
    if "head" in set(groups["kind"]):
        head = best_by_group(groups, "ari", kind="head")[MODEL]
        found.append(
            decide(
                "heads",
                "A single head's output clusters by task beyond the wording (best head)",
                (head - ari[WORDS]).to_numpy(),
                control={"best head": float(head.mean())} | means(ari[[WORDS]]),
                at_least=0,
                **OURS,
                **shared,
            )
        )
    return found


def notes(scores: pd.DataFrame, groups: pd.DataFrame, given: str) -> list[str]:
    """What the reader must know before believing the picture."""
    mean = means(best_by_group(groups, "ari"))
    said = [
        f"Best-layer ARI given the {given}: model {mean[MODEL]:.2f}, bag of tokens (tf-idf) "
        f"{mean[WORDS]:.2f}, random weights {mean[RANDOM]:.2f}; the layer is chosen on the other "
        f"half of the {given}s."
    ]
    for source in (WORDS, RANDOM):
        if mean[source] > HIGH_BASELINE * mean[MODEL]:
            said.append(
                f"The {source} baseline is high: {mean[source]:.2f} against {mean[MODEL]:.2f} for "
                "the model. Prompts of one task share words here, so these clusters alone prove "
                "little."
            )
    together = where(scores, metric="ari", by="task", kind="resid", given="none")
    said.append(
        f"Intervals are over {given}s, which share the instructions: they say nothing of other "
        "wordings. Random weights read fewer prompts, so their neighbours come from fewer."
    )
    everything = where(together, source=MODEL).nlargest(1, "value").iloc[0]
    words = where(together, source=WORDS)["value"].max()
    said.append(
        f"All prompts together: ARI {everything['value']:.2f} at {everything['site']}, bag of "
        f"tokens {words:.2f} (best site chosen on the same prompts)."
    )
    return said


def pictures(scores: pd.DataFrame, acts: xr.Dataset, given: str) -> dict[str, Any]:
    """The study's figures, by file name."""
    ari = where(scores, metric="ari")
    layers = where(ari, kind="resid", by="task", given=given)
    heads = where(ari, kind="head", by="task")
    found = {
        "ari_by_layer": figures.curves(
            _level(layers),
            color="source",
            title=f"Clustering by task, given the {given}",
            caption="ARI by layer, beside the words alone and random weights.",
            y_title="ARI",
        ),
        "neighbours": figures.curves(
            _level(where(scores, metric="1nn_accuracy")),
            color="source",
            band=None,
            title="Is the nearest neighbour of another paraphrase of the same task?",
            caption="1-nearest-neighbour task accuracy (cosine), neighbours with another template.",
            y_title="accuracy",
        ),
        "task_input_template": figures.curves(
            where(ari, kind="resid", given="none", source=MODEL),
            color="by",
            title="All prompts together: task, input or template?",
            caption="k-means with as many clusters as tasks, scored against each label.",
            y_title="ARI",
        ),
        "clusters": figures.scatter(
            _planes(acts, where(layers, source=MODEL), given),
            shape="template" if given == "input" else None,
            title=f"The prompts of one {given}, by layer",
            caption="Two principal components of each layer.",
            tooltip=("text", "template"),
        ),
    }
    if len(heads):
        found["heads"] = figures.head_map(
            heads,
            title="Which heads carry the task",
            caption=f"ARI of each head's contribution to the residual stream, given the {given}.",
        )
    return found


def views(scores: pd.DataFrame, acts: xr.Dataset, given: str) -> dict[str, ClusterView]:
    """What the page lets its reader explore, by file name."""
    groups = list(dict.fromkeys(acts[given].values.tolist()))
    largest = max(1, int(pd.Series(acts[given].values).value_counts().max()))
    shown = groups[: max(1, MOST_POINTS // largest)]
    part = acts.isel(prompt=np.flatnonzero(np.isin(acts[given].values, shown)))
    ari = where(scores, metric="ari", kind="resid", by="task", given=given, source=MODEL)
    caption = (
        f"Two principal components of each layer, turned onto those of the layer before by an "
        f"orthogonal map; {part.sizes['prompt']:,} of {acts.sizes['prompt']:,} prompts. A picture "
        f"is no measure: the score is that of k-means in all dimensions, given the {given}."
    )
    return {
        "clusters": probes.cluster_map(part).view(
            labels=("task", "template", "input"),
            title="The prompts, by layer",
            caption=caption,
            scores=ari.assign(step=0),
            score_name="ARI with task",
        )
    }


def _level(rows: pd.DataFrame) -> pd.DataFrame:
    """Draw a source that has one layer only (the words) as a level line over all layers."""
    depth = rows.groupby("source")["layer"].transform("nunique")
    flat = [rows.loc[depth == 1].assign(layer=layer) for layer in sorted(rows["layer"].unique())]
    return pd.concat([rows.loc[depth > 1], *flat], ignore_index=True)


def _planes(acts: xr.Dataset, ari: pd.DataFrame, given: str) -> pd.DataFrame:
    """The states of one group at six depths, the best layer among them."""
    last, best = int(ari["layer"].max()), int(ari.nlargest(1, "value")["layer"].iloc[0])
    layers = sorted({*np.linspace(0, last, 5).round().astype(int).tolist(), best})
    part = acts.isel(prompt=np.flatnonzero(acts[given].values == acts[given].values[0]))
    labels = {name: part[name].values for name in ("task", "template", "input", "text")}
    return pd.concat(
        [plane(part.resid.sel(layer=n)[:, 0].values, layer=n, **labels) for n in layers],
        ignore_index=True,
    )
