"""Neighbours and silhouettes: scikit-learn's own, planted structure found, chance elsewhere."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings, strategies as st
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

import lensclust as lc
from probes import cluster
from probes.similarity.neighbours import nearest_neighbour, neighbours, silhouettes, vote
from tests.probes.clustering.test_clustering import COPIES, INPUTS, TASKS, planted


def test_neighbours_are_found_across_templates_only():
    acts = planted(8.0)
    scores = nearest_neighbour(acts).set_index("site")
    assert scores.loc["resid 1", "value"] > 0.9
    assert scores.loc["resid 0", "value"] < 0.5
    # With wording that gives the task away, holding templates apart must hide it.
    wording = np.eye(TASKS * COPIES)[
        acts.task.values.astype(int) * COPIES + acts.template.values.astype(int)
    ]
    states = 5 * wording + 0.01 * np.random.default_rng(0).normal(size=wording.shape)
    dims = ("prompt", "position", "layer", "d_model")
    worded = acts.drop_vars(["resid", "layer"]).assign_coords(layer=[0])
    worded["resid"] = (dims, states[:, None, None].astype(np.float32))
    assert nearest_neighbour(worded, apart=[])["value"].item() == 1
    assert nearest_neighbour(worded)["value"].item() < 0.5
    per = nearest_neighbour(acts, per="input")
    assert per.groupby("site")["value"].mean()["resid 1"] == pytest.approx(
        scores.loc["resid 1", "value"]
    )
    with pytest.raises(lc.InputError, match="none is left for row 0"):
        nearest_neighbour(acts.isel(prompt=acts.template.values == "0"))


@pytest.mark.parametrize("k", [1, 5, 10])
def test_ten_neighbours_decode_a_planted_task_and_no_noise(k):
    scores = nearest_neighbour(planted(8.0), k=k).set_index("site")
    assert set(scores["metric"]) == {f"{k}nn_accuracy"}
    assert scores.loc["resid 1", "value"] > 0.9
    assert scores.loc["resid 1", "p"] < 0.02
    noise = scores.loc["resid 0"]
    assert abs(noise["value"] - noise["null_mean"]) < 4 * noise["null_std"]
    assert noise["null_mean"] == pytest.approx(1 / TASKS, abs=0.1)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 7))
def test_neighbours_and_votes_equal_scikit_learn_and_counting(seed, k):
    rng = np.random.default_rng(seed)
    x, labels = rng.normal(size=(30, 4)), rng.integers(0, 3, 30)
    found = neighbours(x, np.arange(30)[None], k)
    peer = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(x)
    np.testing.assert_array_equal(found, peer.kneighbors(return_distance=False))
    # `most_common` keeps the order of first appearance among the level ones, as we promise to.
    expected = [Counter(row).most_common(1)[0][0] for row in labels[found].tolist()]
    assert vote(labels[found]).tolist() == expected


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_order_of_prompts_and_names_of_labels_do_not_matter(seed):
    # In single precision, which of two is nearer can hang on the order of a sum.
    acts = planted(2.0, seed=seed).astype(np.float64)
    order = np.random.default_rng(seed).permutation(acts.sizes["prompt"])
    moved = acts.isel(prompt=order)
    moved = moved.assign_coords(task=("prompt", np.array(list("dbca"))[moved.task.astype(int)]))
    for k in (1, 6):
        one, other = nearest_neighbour(acts, k=k), nearest_neighbour(moved, k=k)
        np.testing.assert_array_equal(one["value"], other["value"])


def test_equally_near_prompts_stand_in_their_order():
    x = np.array([[1.0, 0], [0, 1], [0, 1], [0, 1], [1, 1]])
    assert neighbours(x, np.arange(5)[None], 3)[0].tolist() == [4, 1, 2]


@pytest.mark.parametrize("given_input", ["input", None])
def test_silhouettes_are_those_of_cluster_and_of_scikit_learn(given_input):
    acts = planted(3.0)
    alone = silhouettes(acts, given=given_input)
    beside = cluster(acts, given=given_input, metrics="silhouette", jobs=1).frame
    for column in ("site", "by", "given", "value", "null_mean", "null_std", "p", "n_groups"):
        assert alone[column].tolist() == beside[column].tolist()
    x, tasks = acts.resid.sel(layer=1).values[:, 0], acts.task.values
    conditions = acts.input.values if given_input else np.zeros(len(tasks))
    groups = [conditions == value for value in np.unique(conditions)]
    expected = np.mean([silhouette_score(x[g], tasks[g]) for g in groups])
    assert alone["value"].iloc[1] == pytest.approx(expected, abs=1e-5)


def test_planted_states_lie_apart_and_noise_does_not():
    scores = silhouettes(planted(8.0)).set_index("site")
    assert scores.loc["resid 1", "value"] > 0.5
    assert scores.loc["resid 1", "p"] < 0.02
    noise = scores.loc["resid 0"]
    assert abs(noise["value"] - noise["null_mean"]) < 4 * noise["null_std"]


@pytest.mark.parametrize("probe", [nearest_neighbour, silhouettes])
def test_states_that_are_not_finite_are_refused_with_their_site(probe):
    acts = planted(3.0)
    acts.resid[3, 0, 1, 4] = -np.inf
    with pytest.raises(lc.InputError, match=r"'resid 1': 1 of 72 rows hold NaN .* first is row 3"):
        probe(acts)


def with_one_task(acts: xr.Dataset) -> xr.Dataset:
    return acts.assign_coords(task=("prompt", ["copy"] * acts.sizes["prompt"]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda a: nearest_neighbour(with_one_task(a)),
            "neighbour: label 'task' is 'copy'",
        ),
        (lambda a: silhouettes(with_one_task(a)), "silhouettes: label 'task' is 'copy' for all 72"),
        (lambda a: nearest_neighbour(a, k=0), "k of at least 1, given 100, 0"),
        (lambda a: nearest_neighbour(a, permutations=1), "permutations of at least 2"),
        (lambda a: nearest_neighbour(a, k=61), "60 are left for row 0, expected at least k=61"),
        (lambda a: nearest_neighbour(a, target="mood"), "label 'mood' is not in these"),
        (lambda a: silhouettes(a, scale="log"), "scale 'log' is not known"),
        (lambda a: silhouettes(a, permutations=0), "permutations=0, expected at least 1"),
        (lambda a: silhouettes(a, by="input"), "silhouettes: nothing to cluster by 'input'"),
    ],
)
def test_wrong_options_are_one_clear_line(call, message):
    assert INPUTS * TASKS * COPIES == 72
    with pytest.raises(lc.InputError, match=message):
        call(planted(1.0))
