"""k-means of stacked matrices against scikit-learn, through the torch code that a GPU runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from hypothesis import given, settings, strategies as st
from scipy.stats import binomtest
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from lensclust.errors import InputError
from probes.clustering.agreement import AGREEMENT
from probes.clustering.clustering import cluster
from probes.clustering.kmeans_batched import STACK_BYTES, partition, partitions
from tests.devices import DEVICES

WORLDS = st.tuples(
    st.integers(0, 10_000), st.integers(2, 8), st.sampled_from([2, 5, 40]), st.floats(0.2, 4)
)


def mixture(seed: int, k: int, d: int, apart: float, rows: int = 90):
    """Gaussian clusters, from overlapping to well apart, and the cluster of each row."""
    rng = np.random.default_rng(seed)
    label = np.arange(rows) % k
    x = apart * rng.normal(size=(k, d))[label] + rng.normal(size=(rows, d))
    return (x + 10 * rng.normal(size=d)).astype(np.float32), label


def inertia(x: np.ndarray, labels: np.ndarray) -> float:
    """Sum of squares within clusters, in float64."""
    parts = [x[labels == each].astype(np.float64) for each in np.unique(labels)]
    return sum(((part - part.mean(0)) ** 2).sum() for part in parts)


def scikit_learn(x: np.ndarray, k: int, *, n_init: Any, seed: int) -> Any:
    return KMeans(k, n_init=n_init, random_state=seed).fit(x).inertia_


@pytest.mark.parametrize("device", DEVICES)
def test_where_there_are_clusters_it_misses_them_no_more_often_than_scikit_learn(device):
    worse = np.zeros(2, dtype=int)  # ours, theirs
    for seed in range(60):
        k = 2 + seed % 7
        x, _ = mixture(seed, k, (2, 5, 40)[seed % 3], 4.0)
        found: Any = partition(x, k, n_init=10, seed=seed, device=device)
        ours, theirs = inertia(x, found), scikit_learn(x, k, n_init=10, seed=seed)
        worse += ours > 1.01 * theirs, theirs > 1.01 * ours
    # Either may end in a local minimum; most draws have none.
    assert worse.sum() < 20
    assert not worse.sum() or binomtest(worse[0], worse.sum(), alternative="greater").pvalue > 0.01


@pytest.mark.parametrize("device", DEVICES)
def test_without_clusters_neither_wins_on_average(device):
    drawn = [mixture(seed, 6, 8, 0.5)[0] for seed in range(20)]
    ours: Any = partitions(drawn, [6] * 20, n_init=4, seed=0, device=device)
    ratio = [
        inertia(x, found) / scikit_learn(x, 6, n_init=4, seed=1)
        for x, found in zip(drawn, ours, strict=True)
    ]
    error = np.std(ratio, ddof=1) / np.sqrt(20)
    assert np.mean(ratio) <= 1 + 3 * error


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(2, 8), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_planted_clusters_are_found_exactly(device, seed, k, scale):
    rng = np.random.default_rng(seed)
    label = rng.permutation(np.arange(60) % k)
    x = (20 * np.eye(k, 12)[label] + rng.normal(size=(60, 12))) * scale
    found = partition(x.astype(np.float32), k, n_init=4, seed=seed, device=device)
    assert adjusted_rand_score(label, found) == 1.0


@settings(max_examples=15, deadline=None)
@given(world=WORLDS)
def test_the_end_is_where_no_row_is_nearer_to_another_mean(world):
    seed, k, d, apart = world
    x, _ = mixture(seed, k, d, apart)
    found: Any = partition(x, k, n_init=1, seed=seed, device="cpu")
    assert len(np.unique(found)) == k
    means = np.stack([x[found == each].astype(np.float64).mean(0) for each in range(k)])
    away = ((x[:, None] - means) ** 2).sum(-1)
    # Centres may stop short of their means by what counts as settled.
    slack = 0.1 * np.sqrt(x.var(0).mean())
    assert (np.sqrt(away[np.arange(len(x)), found]) <= np.sqrt(away.min(1)) + slack).all()


@settings(max_examples=10, deadline=None)
@given(world=WORLDS)
def test_rotation_order_of_rows_and_offset_do_not_matter(world):
    seed, k, d, _ = world
    rng = np.random.default_rng(seed)
    label = np.arange(90) % k
    x = (30 * np.eye(k, max(d, k))[label] + rng.normal(size=(90, max(d, k)))).astype(np.float32)
    turn, _ = np.linalg.qr(rng.normal(size=(x.shape[1], x.shape[1])))
    order = rng.permutation(len(x))
    found: Any = partition(x, k, n_init=6, seed=seed, device="cpu")
    turned = (x @ turn + 5)[order].astype(np.float32)
    other = partition(turned, k, n_init=6, seed=seed, device="cpu")
    assert adjusted_rand_score(found[order], other) == 1.0


def test_what_is_stacked_beside_a_matrix_does_not_matter(monkeypatch):
    drawn = [mixture(seed, 4, 6, 1.0)[0] for seed in range(5)]
    alone = [partition(x, 4, n_init=3, seed=7, device="cpu") for x in drawn]
    together = partitions(drawn, [4] * 5, n_init=3, seed=7, device="cpu")
    monkeypatch.setattr("probes.clustering.kmeans_batched.STACK_BYTES", STACK_BYTES // 2**16)
    in_pieces = partitions(drawn, [4] * 5, n_init=3, seed=7, device="cpu")
    for each in (together, in_pieces):
        assert all((a == b).all() for a, b in zip(alone, each, strict=True))


def test_few_distinct_rows():
    twice = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)
    assert partition(twice, 4, n_init=2, seed=0, device="cpu") is None
    exact = partition(twice, 3, n_init=2, seed=0, device="cpu")
    assert adjusted_rand_score(np.repeat(range(3), 4), exact) == 1.0
    # As many rows as clusters, and rows that differ by rounding only, far from the origin.
    alone: Any = partition(np.eye(5, dtype=np.float32), 5, n_init=1, seed=0, device="cpu")
    assert set(alone) == set(range(5))
    near = np.nextafter(np.full((6, 1), 1e4, np.float32), np.float32(np.inf))
    near[:3] = 1e4
    assert adjusted_rand_score(
        [0, 0, 0, 1, 1, 1], partition(near, 2, n_init=1, seed=0, device="cpu")
    )


def test_an_emptied_cluster_takes_the_farthest_row():
    from probes.clustering.kmeans_batched import _filled, _means

    x = torch.tensor([[[0.0], [1.0], [10.0], [11.0]]])
    labels = torch.tensor([[[0, 0, 0, 0]]])
    means, counts = _means(x, labels, 3)
    apart = (x[:, None, :, 0] - means[:, :, :1, 0]).square()
    filled = _filled(x, labels, apart, means, counts)
    # 11 and 0 lie equally far from 5.5 and leave: what is left of cluster 0 is {1, 10}.
    assert filled[0, 0, 0].item() == 5.5
    assert sorted(filled[0, 0, 1:, 0].tolist()) == [0.0, 11.0]


@pytest.mark.parametrize("given_input", ["input", None])
def test_cluster_gives_the_scores_of_the_cpu_where_tasks_are_planted(given_input):
    rng = np.random.default_rng(0)
    task, word = np.divmod(np.arange(80) % 40, 10)
    states = rng.normal(size=(80, 1, 3, 16)).astype(np.float32)
    states[:, 0, 2] += 12 * np.eye(4, 16)[task]
    labels = pd.DataFrame({"task": task, "input": word}).astype(str)
    acts = xr.Dataset(
        {"resid": (("prompt", "position", "layer", "d_model"), states)},
        {"position": ["answer"], "layer": [0, 1, 2]}
        | {name: ("prompt", labels[name].to_numpy()) for name in labels},
    )
    options = {"given": given_input, "permutations": 20, "jobs": 1, "metrics": list(AGREEMENT)}
    cpu, there = cluster(acts, **options), cluster(acts, device="cpu", **options)
    columns = ["value", "null_mean", "null_std"]
    planted = [found.frame.query("layer == 2")[columns] for found in (cpu, there)]
    np.testing.assert_allclose(*planted, atol=1e-12)
    assert (there.frame.query("layer == 2 and metric == 'ari'")["value"] == 1).all()
    assert there.frame.query("layer < 2 and metric == 'ari'")["value"].max() < 0.5
    np.testing.assert_array_equal(cpu.centroids.resid, there.centroids.resid)


def test_a_device_that_is_not_there_is_one_line():
    acts = xr.Dataset(
        {"resid": (("prompt", "position", "layer", "d_model"), np.ones((4, 1, 1, 2), np.float32))},
        {"position": ["answer"], "layer": [0], "task": ("prompt", list("abab"))},
    )
    with pytest.raises(InputError, match=r"^device 'abacus'"):
        cluster(acts, given=None, device="abacus", jobs=1)
