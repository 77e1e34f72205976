"""Clustering 144 heads: `cluster` against the loop over scikit-learn that one would write.

Both run k-means with the same restarts and seed on the same float32 states, so the scores agree
and a ratio shows the sweep alone. Each peer runs on one core. Repetitions are interleaved, and
the ratio is the median over them; worker processes are started before the first one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score
from threadpoolctl import threadpool_limits

from probes.clustering.agreement import METRICS
from probes.clustering.clustering import cluster

REPETITIONS = 3
BLOCKS, HEADS, WIDTH = 12, 12, 64
TASKS, INPUTS, TEMPLATES = 10, 12, 12
N_INIT, PERMUTATIONS = 4, 100

# metric -> score of every head
Scores = dict[str, np.ndarray]


def rows() -> list[dict[str, object]]:
    """One row for each way of grouping, each scope of the peer and each number of cores."""
    acts = _heads()
    # scikit-learn scores one labelling at a time, so its null is timed on one block's heads.
    block = acts.isel(block=slice(1))
    return [
        row
        for given in ("input", None)
        for row in (
            *_compare(acts, given, ["ari"], permutations=0),
            *_compare(block, given, ["ari", "ami"], permutations=PERMUTATIONS),
        )
    ]


def _heads() -> xr.Dataset:
    """States of 12 x 12 heads: input codes, and task codes that grow from head to head."""
    rng = np.random.default_rng(0)
    task, source, _ = (axis.ravel() for axis in np.mgrid[:TASKS, :INPUTS, :TEMPLATES])
    strength = np.linspace(0, 2, BLOCKS * HEADS).reshape(BLOCKS, HEADS, 1)
    z = rng.normal(size=(len(task), BLOCKS, HEADS, WIDTH))
    z += (strength * rng.normal(size=(TASKS, BLOCKS, HEADS, WIDTH)))[task]
    z += 2 * rng.normal(size=(INPUTS, BLOCKS, HEADS, WIDTH))[source]
    return xr.Dataset(
        {"z": (("prompt", "position", "block", "head", "d_head"), z[:, None].astype(np.float32))},
        {
            "block": range(BLOCKS),
            "head": range(HEADS),
            "position": ["answer"],
            "task": ("prompt", task.astype(str)),
            "input": ("prompt", source.astype(str)),
        },
    )


def _loop(acts: xr.Dataset, given: str | None, metrics: list[str], permutations: int) -> Scores:
    """k-means by head and group and scikit-learn's scores, of permuted labels too if asked for."""
    functions = {"ari": adjusted_rand_score, "ami": adjusted_mutual_info_score}
    tasks = acts["task"].values
    condition = np.zeros(len(tasks)) if given is None else acts[given].values
    groups = [np.flatnonzero(condition == value) for value in np.unique(condition)]
    rng = np.random.default_rng(0)
    values: dict[str, list[float]] = {metric: [] for metric in metrics}
    for block, head in np.ndindex(acts.sizes["block"], acts.sizes["head"]):
        x = acts["z"].values[:, 0, block, head]
        scores: dict[str, list[float]] = {metric: [] for metric in metrics}
        for group in groups:
            labels = tasks[group]
            k = len(set(labels))
            options: dict[str, Any] = {"n_init": N_INIT, "random_state": 0}
            found = KMeans(k, **options).fit_predict(x[group])
            for metric in metrics:
                scores[metric].append(functions[metric](labels, found))
            for _ in range(permutations):
                permuted = rng.permutation(labels)
                for metric in metrics:
                    functions[metric](permuted, found)
        for metric in metrics:
            values[metric].append(float(np.mean(scores[metric])))
    return {metric: np.array(means) for metric, means in values.items()}


def _compare(
    acts: xr.Dataset,
    given: str | None,
    metrics: list[str],
    *,
    permutations: int,
) -> list[dict[str, object]]:
    def ours(chosen: list[str] | None, jobs: int) -> Scores:
        frame = cluster(
            acts, given=given, n_init=N_INIT, jobs=jobs, metrics=chosen or METRICS
        ).frame
        return {m: frame.loc[frame["metric"] == m, "value"].to_numpy() for m in metrics}

    peer = "loop over scikit-learn: k-means, " + " and ".join(m.upper() for m in metrics)
    peer += f", {permutations} permutations" if permutations else ", no null"
    ways: dict[str, Callable[[], Scores]] = {
        peer: lambda: _loop(acts, given, metrics, permutations),
        "all five scores and their nulls, one core": lambda: ours(None, 1),
        "all five scores and their nulls, two cores": lambda: ours(None, 2),
        "the peer's scores and their nulls, one core": lambda: ours(metrics, 1),
        "the peer's scores and their nulls, two cores": lambda: ours(metrics, 2),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, Scores] = {}
    with threadpool_limits(1):
        ours(metrics, 2)  # starts the worker processes
        for _ in range(REPETITIONS):
            for way, run in ways.items():
                start = time.perf_counter()
                found[way] = run()
                times[way].append(time.perf_counter() - start)
    heads, prompts = acts.sizes["block"] * HEADS, acts.sizes["prompt"]
    sweep = f"k-means by task given {given or 'nothing'}, {heads} heads x {prompts} prompts"
    return [
        {
            "what": f"{sweep}: {way}",
            "peer": peer,
            "ours / peer": float(np.median(np.divide(times[way], times[peer]))),
            "peer, seconds": float(np.median(times[peer])),
            "largest difference": float(
                max(np.abs(found[way][metric] - found[peer][metric]).max() for metric in metrics)
            ),
        }
        for way in ways
        if way != peer
    ]


if __name__ == "__main__":
    for row in rows():
        print(*row.values(), sep=" | ")
