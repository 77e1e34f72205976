"""How often intervals hold the truth, under the layouts that the studies have.

Levels: near the floor, in the middle, near the ceiling of what the measure can be. Seeds, inputs,
wordings and tasks differ by normal effects of standard deviation `SPREAD` on the logit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from scipy.special import expit, logit
from scipy.stats import spearmanr
from sklearn.metrics import adjusted_rand_score

from lensclust.results.statistics import Mean, agreement, correlation, mean_of, share
from studies.realistic.claims import MODEL
from studies.realistic.units import Source, redrawn

LEVELS = {"near the floor": 0.03, "in the middle": 0.5, "near the ceiling": 0.97}
SPREAD = 0.8
LEAST = 0.9
# So often a cell below it is drawn again, before it is called short.
AGAIN = 2000

# A draw of measurements at a level -> the interval; and the mean of many such.
Draw = Callable[[np.random.Generator, float], Mean]


def _chances(rng: np.random.Generator, level: float, *effects: np.ndarray) -> np.ndarray:
    return expit(logit(level) + SPREAD * np.sum(effects, axis=0))


def over_seeds(n: int, prompts: int = 200) -> Draw:
    """Accuracy of one model a seed."""

    def draw(rng: np.random.Generator, level: float) -> Mean:
        right = rng.binomial(prompts, _chances(rng, level, rng.normal(size=n)))
        return mean_of(right / prompts, scale=share(of=prompts))

    return draw


def gains(n: int, prompts: int = 200) -> Draw:
    """Accuracy above a control's of the same seed, which is at half of the level."""

    def draw(rng: np.random.Generator, level: float) -> Mean:
        seed = rng.normal(size=n)
        own, other = (
            rng.binomial(prompts, _chances(rng, at, seed, rng.normal(size=n) / 2))
            for at in (level, level / 2)
        )
        return mean_of((own - other) / prompts, scale=share(of=prompts).gain)

    return draw


def clusterings(n: int, rows: int = 200, tasks: int = 10) -> Draw:
    """ARI of one model a seed, some of whose prompts lie in another task's cluster."""
    label = np.arange(rows) % tasks

    def draw(rng: np.random.Generator, level: float) -> Mean:
        values = []
        for right in _chances(rng, level, rng.normal(size=n)):
            found = np.where(rng.random(rows) < right, label, rng.integers(0, tasks, rows))
            values.append(adjusted_rand_score(label, found))
        return mean_of(values, scale=agreement(of=rows))

    return draw


def orders(n: int, points: int) -> Draw:
    """Rank correlation of a score with layer, a seed each."""

    def draw(rng: np.random.Generator, level: float) -> Mean:
        size = 2 * (1 - level)
        layers = np.arange(points)
        noise = points * size * rng.normal(size=(n, points)) / 2
        values = [np.asarray(spearmanr(layers, layers * level + e))[0] for e in noise]
        return mean_of(values, scale=correlation(of=points))

    return draw


def neighbours(inputs: int, wordings: int, tasks: int) -> Draw:
    """Whether each prompt's neighbour has its task: inputs crossed with wordings."""
    row, word = (each.ravel() for each in np.mgrid[:inputs, : wordings * tasks])

    def draw(rng: np.random.Generator, level: float) -> Mean:
        effects = rng.normal(size=inputs)[row] / 2, rng.normal(size=wordings * tasks)[word]
        right = rng.random(len(row)) < _chances(rng, level, *effects)
        return mean_of(
            right.astype(float), scale=share(of=100), units={"input": row, "wording": word}
        )

    return draw


def agreements(inputs: int, wordings: int, tasks: int) -> Draw:
    """Agreement across wordings, where wordings, inputs and prompts are misread."""
    cells = np.stack([each.ravel() for each in np.mgrid[:inputs, :tasks, :wordings]], axis=1)
    labels = {"input": cells[:, 0], "task": cells[:, 1]}
    labels["instruction"] = cells[:, 1] * wordings + cells[:, 2]
    names = [str(i) for i in range(inputs)]

    def draw(rng: np.random.Generator, level: float) -> Mean:
        effects = (
            rng.normal(size=inputs)[labels["input"]] / 2,
            rng.normal(size=wordings * tasks)[labels["instruction"]],
        )
        right = rng.random(len(cells)) < _chances(rng, level, *effects)
        clusters = np.where(right, labels["task"], rng.integers(0, tasks, len(cells)))
        found = xr.DataArray(
            clusters[None],
            dims=("site", "prompt"),
            coords={"site": ["resid 0"]} | {k: ("prompt", v) for k, v in labels.items()},
        )
        source = Source(MODEL, 0, pd.DataFrame(), found, "input")
        return redrawn(source, dict.fromkeys(names, "resid 0")).mean()

    return draw


def pairs(tasks: int, prompts: int = 20) -> Draw:
    """Answers moved from one task to another, a share each ordered pair."""
    pair = np.array([(a, b) for a in range(tasks) for b in range(tasks) if a != b])

    def draw(rng: np.random.Generator, level: float) -> Mean:
        effects = (rng.normal(size=tasks)[pair[:, 0]], rng.normal(size=tasks)[pair[:, 1]])
        right = rng.binomial(prompts, _chances(rng, level, *effects)) / prompts
        return mean_of(right, scale=share(of=prompts), units={"task": pair})

    return draw


KINDS: Mapping[str, Draw] = {
    "accuracy over 3 seeds": over_seeds(3),
    "accuracy over 5 seeds": over_seeds(5),
    "accuracy gained over 3 seeds": gains(3),
    "accuracy gained over 5 seeds": gains(5),
    "ARI over 3 seeds": clusterings(3),
    "ARI over 5 seeds": clusterings(5),
    "rank correlation over 5 layers, 3 seeds": orders(3, 5),
    "rank correlation over 9 checkpoints, 5 seeds": orders(5, 9),
    "neighbours over 24 inputs and 72 wordings": neighbours(24, 6, 12),
    "agreement over 24 inputs and 72 wordings": agreements(24, 6, 12),
    "agreement over 24 inputs and 48 wordings": agreements(24, 4, 12),
    "ordered pairs of 3 tasks": pairs(3),
    "ordered pairs of 5 tasks": pairs(5),
}


def covered(draws: int, kinds: Mapping[str, Draw] = KINDS) -> pd.DataFrame:
    """A row a kind and level: share of intervals that hold the truth, and their median width."""
    return pd.DataFrame(_rows(draws, kinds))


def intervals_page(found: pd.DataFrame, draws: int) -> str:
    """The page of the docs."""
    lines = [
        "# Coverage of intervals",
        "",
        f"Written by `make calibrate`: {draws} draws of each layout that the studies have, where "
        "seeds, inputs, wordings and tasks differ by normal effects of standard deviation "
        f"{SPREAD} on the logit (inputs by half of it). Each cell: share of 95 % intervals that "
        f"hold the mean of all draws (at least {LEAST} is asked; a cell below it is drawn again, "
        f"{AGAIN:,} times), and their median width. "
        "Accuracies are of 200 prompts, ordered pairs of 20 prompts each; the levels are "
        f"{', '.join(f'{name} {value}' for name, value in LEVELS.items())} (of agreement and "
        "rank correlation: the share of what is read or ordered right).",
        "",
        "| interval of | " + " | ".join(LEVELS) + " |",
        "|---|" + "---|" * len(LEVELS),
    ]
    for kind, rows in found.groupby("kind", sort=False):
        at = rows.set_index("level").loc[list(LEVELS)]
        cells = [f"{row.covered:.3f}; {row.width:.2g}" for row in at.itertuples()]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _rows(draws: int, kinds: Mapping[str, Draw]) -> Iterator[dict[str, Any]]:
    for kind, draw in kinds.items():
        for level, value in LEVELS.items():
            row = _row(draw, value, draws)
            if row["covered"] < LEAST and draws < AGAIN:
                row = _row(draw, value, AGAIN)
            yield {"kind": kind, "level": level} | row


def _row(draw: Draw, level: float, draws: int) -> dict[str, Any]:
    rng = np.random.default_rng(draws)
    found = [draw(rng, level) for _ in range(draws)]
    # Intervals are of the mean over units; so is the mean of all draws.
    truth = float(np.mean([each.value for each in found]))
    return {
        "covered": float(np.mean([each.low <= truth <= each.high for each in found])),
        "width": float(np.median([each.high - each.low for each in found])),
        "inside range": all(
            each.scale.low <= each.low < each.high <= each.scale.high for each in found
        ),
    }
