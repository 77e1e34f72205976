"""The claims, notes and figures of the realistic study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

import lensclust as lc
import probes
from lensclust import figures
from lensclust.report.views import ClusterView
from lensclust.results import decide
from studies.realistic.units import Redrawn, Source, agreed_at, chosen_sites, redrawn, with_depth
from studies.scales import AGREED, SHARE, SMALL, WEAK
from studies.scores import plane, where

PAPER: dict[str, Any] = {
    "source": "Wu & Varshney, arXiv 2402.12151",
    "origin": "reconstruction",
}
OURS: dict[str, Any] = {"source": "this project", "origin": "extension"}
MODEL, WORDS, RANDOM = "model", "bag of tokens", "random weights"
HELD_OUT, HELD_OUT_WORDS = "model, held-out wordings", "bag of tokens, held-out wordings"
_NEAR = (MODEL, WORDS, RANDOM)
# With a baseline this close to the model, the model explains little.
HIGH_BASELINE = 0.5
# Points that a page can still animate at once.
MOST_POINTS = 800


# Claims that each figure shows.
SHOWS = {
    "task_by_layer": ["clusters", "above-*", "deeper", "held-out-*"],
    "neighbours": ["paraphrase-neighbours", "neighbours-above-words"],
    "task_input_template": ["not-template"],
    "heads": ["heads*"],
}


class Evidence:
    """Agreement across wordings of each source, at sites chosen on other groups."""

    def __init__(self, sources: Sequence[Source], given: str) -> None:
        self.given = given
        self.sources = sources
        self.names = {source.name for source in sources}
        self.model = agreed_at(self.of(MODEL))
        self.words = agreed_at(self.of(WORDS))
        self.random = agreed_at(self.of(RANDOM))

    def of(self, name: str) -> list[Source]:
        return [source for source in self.sources if source.name == name]

    @property
    def sites(self) -> dict[str, str]:
        """Site at which each of the model's groups is reported."""
        return chosen_sites(self.of(MODEL)[0].groups, AGREED)

    def by_template(self) -> Redrawn:
        """Agreement of the same partitions with the sentence template."""
        return redrawn(self.of(MODEL)[0], self.sites, by="template")

    def held_out(self) -> tuple[Redrawn, Redrawn]:
        """Model and words on held-out wordings, at layers chosen on the other wordings."""
        (model,), (words,) = self.of(HELD_OUT), self.of(HELD_OUT_WORDS)
        return redrawn(model, self.sites), redrawn(words, chosen_sites(words.groups, AGREED))

    def heads(self) -> Redrawn:
        """The best single head."""
        return agreed_at(self.of(MODEL), kind="head")


def claims(scores: pd.DataFrame, seen: Evidence, near: pd.DataFrame) -> list[lc.Claim]:
    """Decide the claims, over inputs (or folds) and wordings.

    Args:
        near: whether each prompt's neighbour has its task: ``source, group, instruction, value``.
    """
    given = seen.given
    model, words, random = (
        float(each.value.mean()) for each in (seen.model, seen.words, seen.random)
    )
    n_seeds = int(scores["seed"].nunique())
    over: dict[str, Any] = {"unit": f"{given} and wording", "n_seeds": n_seeds}
    null = where(scores, metric=AGREED, source=MODEL, by="task", kind="resid", given=given)
    found = [
        decide(
            "clusters",
            f"States cluster by task (agreement across wordings, best layer, within {given})",
            seen.model.mean(),
            control={
                "wordings relabelled": float(null["null_mean"].mean()),
                WORDS: words,
                RANDOM: random,
            },
            at_least=0,
            margin=SMALL,
            **PAPER,
            **over,
        ),
        decide(
            "above-wording",
            "States cluster by task beyond the words of the instruction (agreement across wordings "
            "above that of the bag of tokens, which counts as at least chance)",
            seen.model.above(seen.words),
            control={MODEL: model, WORDS: words},
            at_least=0,
            margin=SMALL,
            **PAPER,
            **over,
        ),
        decide(
            "above-random-weights",
            "States cluster by task beyond what the architecture alone does (agreement across "
            "wordings above that of random weights, which counts as at least chance)",
            seen.model.above(seen.random),
            control={
                f"{MODEL}, the same {given}s": float(seen.model.of(seen.random.names).value.mean()),
                RANDOM: random,
            },
            at_least=0,
            margin=SMALL,
            **PAPER,
            **over,
        ),
        *_neighbours(scores, near, n_seeds),
        decide(
            "deeper",
            "Deeper layers cluster more by task (rank correlation of agreement across wordings "
            "with layer)",
            with_depth(seen.of(MODEL)[0]).mean(),
            control={RANDOM: float(with_depth(seen.of(RANDOM)[0]).value.mean())},
            at_least=0,
            margin=WEAK,
            **PAPER,
            **over,
        ),
    ]
    if HELD_OUT in seen.names:
        held, plain = seen.held_out()
        found += [
            decide(
                "held-out-wordings",
                "Held-out wordings, written without looking at any model's scores, cluster by task "
                "(agreement across wordings, layer chosen on the other wordings)",
                held.mean(),
                control={"the other wordings": model, WORDS: float(plain.value.mean())},
                at_least=0,
                margin=SMALL,
                **OURS,
                **over,
            ),
            decide(
                "held-out-above-wording",
                "Held-out wordings cluster by task beyond their words (agreement across wordings "
                "above that of the bag of tokens)",
                held.above(plain),
                control={MODEL: float(held.value.mean()), WORDS: float(plain.value.mean())},
                at_least=0,
                margin=SMALL,
                **OURS,
                **over,
            ),
        ]
    shapes = set(where(seen.of(MODEL)[0].groups, metric=AGREED)["by"])
    if "template" in shapes:
        template = seen.by_template()
        found.append(
            decide(
                "not-template",
                "Clusters follow the task more than the sentence template (agreement across "
                "wordings with the task above that with the template, which counts as at least "
                "chance)",
                seen.model.above(template),
                control={MODEL: model, "template": float(template.value.mean())},
                at_least=0,
                margin=SMALL,
                **OURS,
                **over,
            )
        )
    if "head" in set(seen.of(MODEL)[0].groups["kind"]):
        head = seen.heads()
        found.append(
            decide(
                "heads",
                "A single head's output clusters by task beyond the words (best head, agreement "
                "across wordings above that of the bag of tokens)",
                head.above(seen.words),
                control={"best head": float(head.value.mean()), WORDS: words, "best layer": model},
                at_least=0,
                margin=SMALL,
                **OURS,
                **over,
            )
        )
    return found


def _neighbours(scores: pd.DataFrame, near: pd.DataFrame, n_seeds: int) -> list[lc.Claim]:
    """Claims that neighbours share the task, above chance and above the words."""
    chance = float(where(scores, metric="1nn_accuracy", source=MODEL)["null_mean"].mean())
    own = where(near, source=MODEL).set_index("prompt")
    words = where(near, source=WORDS).set_index("prompt")["value"].loc[own.index]
    if words.mean() < chance:
        words = words * 0 + chance
    mean = {source: float(where(near, source=source)["value"].mean()) for source in _NEAR}
    shared: dict[str, Any] = {
        "control": {"chance": chance, **mean},
        "at_least": 0,
        "margin": SMALL,
        "scale": SHARE.gain,
        "units": {
            "input": own["group"].to_numpy(dtype=str),
            "wording": own["instruction"].to_numpy(dtype=str),
        },
        "n_seeds": n_seeds,
    }
    return [
        decide(
            "paraphrase-neighbours",
            "A prompt's nearest neighbour with another paraphrase has the same task (accuracy "
            "above chance)",
            own["value"].to_numpy() - chance,
            **shared,
            **PAPER,
        ),
        decide(
            "neighbours-above-words",
            "A prompt's nearest neighbour with another paraphrase has the same task more often "
            "than by words (accuracy above that of the bag of tokens, which counts as at least "
            "chance)",
            (own["value"] - words).to_numpy(),
            **shared,
            **OURS,
        ),
    ]


def notes(scores: pd.DataFrame, seen: Evidence) -> list[str]:
    """Caveats of the scores, for the reader of the page."""
    given = seen.given
    mean = {
        MODEL: float(seen.model.value.mean()),
        WORDS: float(seen.words.value.mean()),
        RANDOM: float(seen.random.value.mean()),
    }
    said = [
        f"Agreement across wordings at the best layer, within {given}: "
        f"{', '.join(f'{name} {value:.2f}' for name, value in mean.items())}; words by tf-idf, the "
        f"layer chosen on the other half of the {given}s."
    ]
    for source in (WORDS, RANDOM):
        if mean[source] > HIGH_BASELINE * mean[MODEL]:
            said.append(
                f"The {source} baseline is high: {mean[source]:.2f} against {mean[MODEL]:.2f} for "
                "the model. Prompts of one task share words here, so these clusters alone are weak "
                "evidence."
            )
    said.append(
        f"Intervals resample {given}s and wordings and keep the clusters. Random weights read "
        "fewer prompts, so their neighbours come from fewer."
    )
    if HELD_OUT in seen.names:
        said.append(
            "The six wordings were revised while looking at this model's scores on some inputs; "
            "the held-out ones were written once, without looking at any model's."
        )
    together = where(scores, metric="ari", by="task", kind="resid", given="none")
    everything = where(together, source=MODEL).nlargest(1, "value").iloc[0]
    words = where(together, source=WORDS)["value"].max()
    said.append(
        f"All prompts together: ARI {everything['value']:.2f} at {everything['site']}, bag of "
        f"tokens {words:.2f} (best site chosen on the same prompts)."
    )
    return said


def pictures(scores: pd.DataFrame, acts: xr.Dataset, given: str) -> dict[str, Any]:
    """The study's figures, by file name."""
    ari, agreed = where(scores, metric="ari"), where(scores, metric=AGREED)
    layers = where(agreed, kind="resid", by="task", given=given)
    heads = where(agreed, kind="head", by="task")
    found = {
        "task_by_layer": figures.curves(
            _level(layers),
            color="source",
            title=f"Clustering by task, within {given}",
            caption="Agreement across wordings by layer, beside the words alone, random weights "
            "and, where there are, held-out wordings.",
            y_title="agreement across wordings",
        ),
        "neighbours": figures.curves(
            _level(where(scores, metric="1nn_accuracy")),
            color="source",
            band=None,
            title="Does the nearest neighbour with another paraphrase have the same task?",
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
            caption="Agreement across wordings of each head's contribution to the residual stream, "
            f"within {given}.",
        )
    return found


def views(scores: pd.DataFrame, acts: xr.Dataset, given: str) -> dict[str, ClusterView]:
    """The interactive views of the page, by file name."""
    groups = list(dict.fromkeys(acts[given].values.tolist()))
    largest = max(1, int(pd.Series(acts[given].values).value_counts().max()))
    shown = groups[: max(1, MOST_POINTS // largest)]
    part = acts.isel(prompt=np.flatnonzero(np.isin(acts[given].values, shown)))
    agreed = where(scores, metric=AGREED, kind="resid", by="task", given=given, source=MODEL)
    caption = (
        f"Two principal components of each layer, aligned to those of the layer before by an "
        f"orthogonal map; {part.sizes['prompt']:,} of {acts.sizes['prompt']:,} prompts. The score "
        f"is that of k-means in all dimensions, within {given}, not of the picture."
    )
    return {
        "clusters": probes.cluster_map(part).view(
            labels=("task", "template", "input"),
            title="The prompts, by layer",
            caption=caption,
            scores=agreed.assign(step=0),
            score_name="agreement across wordings",
        )
    }


def _level(rows: pd.DataFrame) -> pd.DataFrame:
    """Draw a source with one layer (the words) as a horizontal line over all layers."""
    depth = rows.groupby("source")["layer"].transform("nunique")
    flat = [rows.loc[depth == 1].assign(layer=layer) for layer in sorted(rows["layer"].unique())]
    return pd.concat([rows.loc[depth > 1], *flat], ignore_index=True)


def _planes(acts: xr.Dataset, agreed: pd.DataFrame, given: str) -> pd.DataFrame:
    """The states of one group at six depths, including the best layer."""
    last, best = int(agreed["layer"].max()), int(agreed.nlargest(1, "value")["layer"].iloc[0])
    layers = sorted({*np.linspace(0, last, 5).round().astype(int).tolist(), best})
    part = acts.isel(prompt=np.flatnonzero(acts[given].values == acts[given].values[0]))
    labels = {name: part[name].values for name in ("task", "template", "input", "text")}
    return pd.concat(
        [plane(part.resid.sel(layer=n)[:, 0].values, layer=n, **labels) for n in layers],
        ignore_index=True,
    )
