"""Scores of partitions against scikit-learn, on every contingency that comes up."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from sklearn import metrics
from sklearn.cluster import KMeans

from probes.clustering.agreement import (
    AGREEMENT,
    Pairs,
    contingency,
    counted_agreement,
    distances,
    score_groups,
    silhouette,
)
from probes.clustering.kmeans import partition
from probes.design.groups import Group
from probes.design.units import exchangeable

labellings = st.integers(2, 40).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 5), min_size=n, max_size=n),
        st.lists(st.integers(0, 4), min_size=n, max_size=n),
    )
)


def pair_f1(labels: np.ndarray, clusters: np.ndarray) -> float:
    (_, fp), (fn, tp) = metrics.pair_confusion_matrix(labels, clusters)
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0


def matched_f1(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Rename each cluster to its matched label, then ask scikit-learn for the macro-F1."""
    kinds, groups = np.unique(labels), np.unique(clusters)
    f1 = np.array([[metrics.f1_score(labels == k, clusters == g) for k in kinds] for g in groups])
    rows, columns = linear_sum_assignment(f1, maximize=True)
    return f1[rows, columns].sum() / len(kinds)


ORACLES = {
    "ari": metrics.adjusted_rand_score,
    "ami": metrics.adjusted_mutual_info_score,
    "pair_f1": pair_f1,
    "matched_f1": matched_f1,
}


@settings(max_examples=30, deadline=None)
@given(labellings, st.integers(0, 99))
def test_scores_equal_scikit_learn_for_true_and_permuted_labels(pair, seed):
    labels, clusters = (np.unique(side, return_inverse=True)[1] for side in map(np.array, pair))
    if labels.max() == 0 or clusters.max() == 0:
        return  # one label or one cluster: convention, tested below
    rng = np.random.default_rng(seed)
    codes = np.stack([labels, rng.permutation(labels), rng.permutation(labels)])
    table = contingency(clusters, codes, int(clusters.max()) + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, oracle in ORACLES.items():
            # A metric that cannot exceed its expectation is 0 here and 1 or 0 there.
            expected = [oracle(row, clusters) for row in codes]
            if len(np.unique(clusters)) == len(clusters) or len(np.unique(labels)) == len(labels):
                continue
            np.testing.assert_allclose(AGREEMENT[name](table), expected, atol=1e-9, err_msg=name)


@settings(max_examples=30, deadline=None)
@given(labellings, st.integers(0, 99))
def test_names_of_clusters_and_labels_do_not_matter(pair, seed):
    labels, clusters = map(np.array, pair)
    rng = np.random.default_rng(seed)
    renamed = rng.permutation(6)[labels], rng.permutation(6)[clusters]
    for score in AGREEMENT.values():
        one = score(contingency(clusters, labels[None], 6))
        other = score(contingency(renamed[1], renamed[0][None], 6))
        # Macro-F1 is over the labels that the codes count up to, so none may be missing.
        if len(np.unique(labels)) == labels.max() + 1 == renamed[0].max() + 1:
            np.testing.assert_allclose(one, other, atol=1e-9)


def test_one_cluster_scores_nothing_and_perfect_clusters_score_one():
    labels = np.repeat(np.arange(4), 5)
    alone = contingency(np.zeros(20, dtype=int), labels[None], 4)
    perfect = contingency(np.array([2, 0, 3, 1])[labels], labels[None], 4)
    for name, score in AGREEMENT.items():
        assert score(perfect)[0] == pytest.approx(1), name
        if name in ("ari", "ami"):
            assert score(alone)[0] == pytest.approx(0), name


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 5))
def test_silhouette_equals_scikit_learn(seed, n_labels):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(n_labels), rng.integers(0, n_labels, 15)])
    x = rng.normal(size=(len(labels), 3)) + labels[:, None]
    codes = np.stack([labels, rng.permutation(labels)])
    expected = [metrics.silhouette_score(x, row) for row in codes]
    np.testing.assert_allclose(silhouette(distances(x), codes), expected, atol=1e-5)


def test_fewer_distinct_rows_than_clusters_score_zero_without_a_warning(recwarn):
    x = np.ones((12, 3))
    group = Group("all", np.arange(12), 3, {"task": np.repeat([0, 1, 2], 4)[None]})
    scores, clusters = score_groups(x, [group], scale="none", n_init=2, seed=0)
    assert all(value[0, 0] == 0 for value in scores.values())
    assert (clusters == -1).all()
    assert partition(np.arange(6.0)[:, None] // 3, 3, n_init=1, seed=0) is None
    assert not recwarn.list


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 8), st.integers(1, 4), st.sampled_from(["f4", "f8"]))
def test_partition_is_the_one_scikit_learn_finds(seed, k, n_init, dtype):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(60, 5)) + 2 * rng.normal(size=(k, 5))[rng.integers(0, k, 60)]).astype(
        dtype
    )
    alone = KMeans(k, n_init=n_init, random_state=seed).fit(x).labels_
    found = partition(x, k, n_init=n_init, seed=seed)
    assert metrics.adjusted_rand_score(alone, found) == 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 1e4))
def test_distances_survive_a_far_origin(seed, offset):
    x = np.random.default_rng(seed).normal(size=(12, 4)) + offset
    x[5] = x[2]
    found = distances(x)
    np.testing.assert_allclose(found, cdist(x, x), rtol=1e-5, atol=1e-6)
    assert found[5, 2] < 1e-6


def by_hand(clusters, labels, wordings) -> tuple[float, float]:
    """Agreement over pairs of rows with different wordings, pair by pair."""
    one, other = np.triu_indices(len(labels), 1)
    apart = wordings[one] != wordings[other]
    together = (clusters[one] == clusters[other])[apart]
    alike = (labels[one] == labels[other])[apart]
    if not apart.any() or alike.all() or not alike.any():
        return np.nan, np.nan
    expected = together.sum() * alike.sum() / len(alike)
    best = (together.sum() + alike.sum()) / 2
    both = (together & alike).sum()
    return (both - expected) / (best - expected), metrics.f1_score(alike, together)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_agreement_across_wordings_is_that_of_pairs_with_different_wordings(seed, nested):
    rng = np.random.default_rng(seed)
    n, wordings = int(rng.integers(6, 30)), np.arange(5)
    wording = rng.integers(0, 5, n)
    labels = (wordings % 3)[wording] if nested else rng.integers(0, 3, n)
    frame = pd.DataFrame({"label": labels, "template": wording})
    if len(set(labels)) < 2:
        return
    exchange = exchangeable(labels, frame, by="label")
    codes = exchange.labellings(5, seed=seed)
    clusters = rng.integers(0, 3, n)
    wording, cell = (np.unique(x, return_inverse=True)[1] for x in (wording, wording * 3 + labels))
    pairs = Pairs.of(contingency(clusters, codes, 3)).across(clusters, cell, wording)
    expected = np.array([by_hand(clusters, one, wording) for one in codes])
    known = ~np.isnan(expected[:, 0])
    np.testing.assert_allclose(pairs.adjusted()[known], expected[known, 0], atol=1e-9)
    np.testing.assert_allclose(pairs.f1()[known], expected[known, 1], atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_counted_rows_are_rows_that_stand_so_often(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(6, 30))
    wording, clusters, labels = rng.integers(0, 5, n), rng.integers(0, 3, n), rng.integers(0, 3, n)
    counts = np.stack([np.ones(5, dtype=int), *rng.integers(0, 3, (4, 5))])[:, wording]
    found = counted_agreement(clusters, labels, wording, counts.astype(float))
    for value, count in zip(found, counts, strict=True):
        rows = np.repeat(np.arange(n), count)
        expected = by_hand(clusters[rows], labels[rows], wording[rows])[0] if len(rows) else np.nan
        if np.isfinite(expected):
            assert value == pytest.approx(expected)


@pytest.mark.parametrize("nested", [True, False])
def test_clusters_of_wordings_agree_across_wordings_by_chance_alone(nested):
    """Mean over all relabellings of what knows the wording only: 0; of what knows the label: 1."""
    wording = np.repeat(np.arange(6 if nested else 3), 6)
    labels = wording // 2 if nested else np.tile([0, 0, 1, 1, 2, 2], 3)
    frame = pd.DataFrame({"label": labels, "template": wording})
    codes = exchangeable(labels, frame, by="label").labellings(1000, seed=0)
    cell = np.unique(wording * 3 + labels, return_inverse=True)[1]
    for clusters in (wording % 4, np.where(wording > 1, 0, wording)):
        pairs = Pairs.of(contingency(clusters, codes, 6)).across(clusters, cell, wording)
        assert pairs.adjusted().mean() == pytest.approx(0, abs=1e-9)
    perfect = Pairs.of(contingency(labels, codes, 6)).across(labels, cell, wording)
    assert perfect.adjusted()[0] == perfect.f1()[0] == 1
    assert perfect.adjusted()[1:].max() < 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_label_sizes_may_differ_between_labellings(seed):
    rng = np.random.default_rng(seed)
    clusters = np.concatenate([[0, 1, 2], rng.integers(0, 3, 20)])
    codes = rng.integers(0, 4, (5, 23))
    codes[:, :2] = [0, 1]
    for name, oracle in ORACLES.items():
        expected = [oracle(np.unique(row, return_inverse=True)[1], clusters) for row in codes]
        found = AGREEMENT[name](contingency(clusters, codes, 3))
        np.testing.assert_allclose(found, expected, atol=1e-9, err_msg=name)
