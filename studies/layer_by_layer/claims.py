"""Change points, claims and figures of the comparison of models layer by layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

import lensclust as lc
from lensclust import figures
from lensclust.results import decide, share
from probes import change_points
from studies.layer_by_layer.options import CEILING, MULTI, OTHER, PAIRS, UNTRAINED
from studies.scales import SHARE, SMALL
from studies.scores import where

PAPER: dict[str, Any] = {
    "source": "Zhao, Ziser & Cohen, arXiv 2410.20008 (findings at second hand)",
    "origin": "reconstruction",
}
OURS: dict[str, Any] = {"source": "this project", "origin": "extension"}
DECIDING = "cka_debiased"
TOGETHER = "all seeds together"
# Untrained models' curves break too: change points are those of the gain over them.
GAIN = "model of all tasks, above the untrained"


# Claims that each figure shows.
SHOWS = {
    "*cka*": ["holds", "own-task", "not-all", "lower-shared"],
    "transitions": ["transition", "early"],
    "accuracy": ["learned"],
}


def transitions(scores: pd.DataFrame) -> pd.DataFrame:
    """Change points of each pair's curves: one row per seed and pair, and one for all seeds.

    Also of the model of all tasks minus the untrained model. The curves of a seed's tasks share
    their breaks. Layer 0 is left out: it holds no computation. ``value`` is the number of breaks,
    ``first`` and ``last`` their layers.
    """
    rows = where(scores, metric=DECIDING)
    by_pair = {
        pair: where(rows[rows["layer"] > 0], pair=pair).pivot(
            index="layer", columns=["seed", "task"], values="value"
        )
        for pair in PAIRS
    }
    by_pair[GAIN] = by_pair[MULTI] - by_pair[UNTRAINED]
    found = []
    for pair, table in by_pair.items():
        seeds = sorted(table.columns.get_level_values("seed").unique())
        parts = [(seed, table.xs(seed, axis=1, level="seed")) for seed in seeds]
        for seed, curves in [*parts, (None, table)]:
            fit = change_points(curves.to_numpy(), at=curves.index.to_numpy())
            found.append(
                {
                    "metric": "change points",
                    "pair": pair,
                    "seed": seed,
                    "over": TOGETHER if seed is None else "seed",
                    "shape": fit.shape,
                    "value": float(len(fit.breaks)),
                    "first": min(fit.breaks, default=np.nan),
                    "last": max(fit.breaks, default=np.nan),
                }
            )
    return pd.DataFrame(found).astype({"seed": "Int64"})


class Curves:
    """The scores: one number per seed, the mean over tasks."""

    def __init__(self, scores: pd.DataFrame, places: pd.DataFrame) -> None:
        self.cka = where(scores, metric=DECIDING)
        self.accuracies = where(scores, metric="accuracy")
        self.places = places
        self.layers = [int(layer) for layer in sorted(self.cka["layer"].unique())]

    def mean(self, pair: str, layers: list[int], column: str = "value") -> np.ndarray:
        rows = where(self.cka, pair=pair, layer=layers)
        return rows.groupby("seed")[column].mean().to_numpy(dtype=float)

    @property
    def upper(self) -> list[int]:
        """The upper half of the layers."""
        return self.layers[len(self.layers) // 2 :]

    def fall(self, pair: str) -> np.ndarray:
        """CKA in the lowest third of the layers (without the embedding) minus the highest third."""
        third = max(1, (len(self.layers) - 1) // 3)
        return self.mean(pair, self.layers[1 : 1 + third]) - self.mean(pair, self.layers[-third:])

    def lowest_accuracy(self) -> np.ndarray:
        """Lowest accuracy of the seed's models on tasks they were trained on."""
        rows = where(self.accuracies, pair=["specialist", MULTI, CEILING])
        return rows.groupby("seed")["value"].min().to_numpy(dtype=float)

    def breaks(self, pair: str, column: str = "value") -> np.ndarray:
        rows = where(self.places, pair=pair, over="seed").sort_values("seed")
        return rows[column].to_numpy(dtype=float)

    def together(self, column: str) -> float:
        return float(where(self.places, pair=GAIN, over=TOGETHER)[column].item())


def claims(scores: pd.DataFrame, places: pd.DataFrame) -> list[lc.Claim]:
    """Decide the claims; each value is one seed."""
    seen = Curves(scores, places)
    multi, ceiling, other, floor = (seen.mean(pair, seen.upper) for pair in PAIRS)
    shuffled = seen.mean(MULTI, seen.upper, "null_mean").mean()
    depth = seen.breaks(GAIN, "first") / seen.layers[-1]
    broken = depth[np.isfinite(depth)]
    counted = {pair: seen.breaks(pair).mean() for pair in (MULTI, CEILING, UNTRAINED)}
    return [
        decide(
            "learned",
            "Every model answers unseen strings of its tasks (lowest accuracy)",
            seen.lowest_accuracy(),
            control={UNTRAINED: where(seen.accuracies, pair=UNTRAINED)["value"].mean()},
            at_least=0.9,
            scale=SHARE,
            **OURS,
        ),
        decide(
            "holds",
            "A model of all tasks represents a task like a specialist of it (CKA on the task's "
            "prompts, upper half of the layers, above that of an untrained model)",
            multi - floor,
            control={
                MULTI: multi.mean(),
                UNTRAINED: floor.mean(),
                CEILING: ceiling.mean(),
                "shuffled prompts": shuffled,
            },
            at_least=0,
            margin=SMALL,
            scale=SHARE.gain,
            **PAPER,
        ),
        decide(
            "own-task",
            "The model of all tasks is more like the specialist of a task than the specialist of "
            "another task is (CKA, upper half of the layers)",
            multi - other,
            control={MULTI: multi.mean(), OTHER: other.mean(), UNTRAINED: floor.mean()},
            at_least=0,
            margin=SMALL,
            scale=SHARE.gain,
            **OURS,
        ),
        decide(
            "not-all",
            "Two specialists of one task are more alike than the model of all tasks is to a "
            "specialist (CKA, upper half of the layers)",
            ceiling - multi,
            control={CEILING: ceiling.mean(), MULTI: multi.mean()},
            at_least=0,
            margin=SMALL,
            scale=SHARE.gain,
            **OURS,
        ),
        decide(
            "lower-shared",
            "Lower layers are shared more than higher ones (CKA of the model of all tasks with the "
            "specialist, lowest third of the layers minus highest)",
            seen.fall(MULTI),
            control={pair: seen.fall(pair).mean() for pair in (CEILING, OTHER, UNTRAINED)},
            at_least=0,
            margin=SMALL,
            scale=SHARE.gain,
            **PAPER,
        ),
        decide(
            "transition",
            "Layers form ranges with transitions between them (breaks in the curve of CKA of the "
            "model of all tasks with the specialist, above that of an untrained model)",
            seen.breaks(GAIN),
            control=counted | {TOGETHER: seen.together("value")},
            at_least=1,
            **PAPER,
        ),
        decide(
            "early",
            "The first transition lies in the lower half of the layers (its layer as a share of "
            "the depth, over the seeds that have one)",
            broken if broken.size else [np.nan],
            control={
                "share of seeds with one": broken.size / depth.size,
                TOGETHER: seen.together("first") / seen.layers[-1],
                "a random layer": float(np.mean(seen.layers[1:])) / seen.layers[-1],
            },
            at_most=0.5,
            scale=share(of=len(seen.layers)),
            n_seeds=int(broken.size),
            **PAPER,
        ),
    ]


def pictures(scores: pd.DataFrame, places: pd.DataFrame) -> dict[str, Any]:
    """The study's figures, by file name."""
    curves = where(scores, metric=["cka", DECIDING])
    over_tasks = _over_tasks(curves, ["metric", "pair", "layer", "seed"]).astype({"layer": int})
    found = {
        name: figures.curves(
            where(over_tasks, metric=name),
            color="pair",
            title=f"Similarity to a specialist, {title}",
            caption="CKA with a specialist over its task, same layer, mean over tasks.",
            y_title=title,
        )
        for name, title in ((DECIDING, "debiased CKA"), ("cka", "CKA"))
    }
    layers = sorted(over_tasks["layer"].unique())[1:]
    of_seeds = where(places, over="seed")
    shares = [
        {"layer": layer, "pair": pair, "value": float((ends == layer).any(axis=1).mean())}
        for pair, rows in of_seeds.groupby("pair", sort=False)
        for ends in [rows[["first", "last"]]]
        for layer in layers
    ]
    found["transitions"] = figures.curves(
        pd.DataFrame(shares),
        color="pair",
        band=None,
        title="Where the curves break",
        caption="Share of seeds whose curves have a break at the layer.",
        y_title="share of seeds",
    )
    found["accuracy"] = figures.bars(
        _over_tasks(where(scores, metric="accuracy"), ["pair", "seed"]),
        name="pair",
        title="Accuracy on a specialist's task",
        caption="Unseen strings, mean over the specialists' tasks.",
        value_title="accuracy",
    )
    return found


def _over_tasks(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    kept = [name for name in ("value", "null_mean", "null_std") if rows[name].notna().any()]
    return rows.groupby(by, sort=False)[kept].mean().reset_index()
