"""Clustering by site: planted structure is found, noise is not, and nothing else matters."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings, strategies as st
from scipy.stats import ortho_group

import lensclust as lc
from lensclust.models.sites import Site
from probes import cluster
from tests.tiny import hf_model

TASKS, INPUTS, COPIES, D = 4, 3, 6, 10


def planted(strength: float, *, seed: int = 0, layers: int = 2) -> xr.Dataset:
    """Input codes far apart, and in the last layer task codes of a given strength inside them."""
    rng = np.random.default_rng(seed)
    task, source, copy = (a.ravel() for a in np.mgrid[:TASKS, :INPUTS, :COPIES])
    by_input = 20 * rng.normal(size=(INPUTS, D))
    by_pair = strength * rng.normal(size=(TASKS, INPUTS, D))
    noise = rng.normal(size=(len(task), 1, layers, D))
    noise += by_input[source][:, None, None]
    noise[:, 0, -1] += by_pair[task, source]
    labels = {"task": task.astype(str), "input": source.astype(str), "template": copy.astype(str)}
    return xr.Dataset(
        {"resid": (("prompt", "position", "layer", "d_model"), noise.astype(np.float32))},
        {"layer": range(layers), "position": ["answer"]}
        | {name: ("prompt", values) for name, values in labels.items()},
    )


def score(clusters, site="resid 1", metric="ari", by="task") -> float:
    rows = clusters.frame.query("site == @site and metric == @metric and by == @by")
    return float(rows["value"].item())


def test_planted_tasks_are_found_given_the_input_and_noise_is_not():
    clusters = cluster(planted(8.0), jobs=1)
    assert score(clusters) > 0.95
    rows = clusters.frame.set_index(["site", "metric"])
    assert rows.loc[("resid 1", "ari"), "p"] <= 0.01
    for metric in ("ari", "ami"):
        noise = rows.loc[("resid 0", metric)]
        assert abs(noise["value"] - noise["null_mean"]) < 4 * noise["null_std"]
    # F1 has a floor, which the null shows.
    assert rows.loc[("resid 0", "pair_f1"), "null_mean"] > 0.15
    assert clusters.best() == Site("resid", 1)


def test_without_the_condition_the_input_is_found_instead():
    clusters = cluster(planted(1.0), given=None, k=INPUTS, score_against=["input"], jobs=1)
    assert score(clusters, by="input") == pytest.approx(1)
    assert score(clusters, by="task") < 0.1


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 999))
def test_rotation_order_and_names_do_not_matter(seed):
    acts = planted(8.0, seed=seed)
    rng = np.random.default_rng(seed)
    turned = acts.assign(
        resid=acts.resid
        @ xr.DataArray(ortho_group.rvs(D, random_state=seed).astype("f4"), dims=("d_model", "e"))
    ).rename(e="d_model")
    turned = turned.transpose("prompt", "position", "layer", "d_model")
    shuffled = turned.isel(prompt=rng.permutation(acts.sizes["prompt"]))
    renamed = shuffled.assign_coords(
        task=("prompt", np.array(["z", "y", "x", "w"])[shuffled.task.values.astype(int)])
    )
    expected, found = cluster(acts, jobs=1), cluster(renamed, jobs=1)
    assert score(found) == pytest.approx(score(expected), abs=0.15)
    assert score(found, metric="silhouette") == pytest.approx(
        score(expected, metric="silhouette"), abs=1e-4
    )


def test_centroids_are_group_means():
    acts = planted(3.0)
    clusters = cluster(acts, jobs=1)
    assert clusters.centroids.resid.dims == ("layer", "input", "task", "d_model")
    for task in ("0", "3"):
        here = (acts.task.values == task) & (acts.input.values == "1")
        np.testing.assert_allclose(
            clusters.centroids.resid.sel(layer=1, input="1", task=task),
            acts.resid.sel(layer=1)[here, 0].mean("prompt"),
            rtol=1e-5,
        )
    everything = cluster(acts, given=None, jobs=1).centroids.resid
    assert everything.dims == ("layer", "task", "d_model")


def test_assignments_agree_with_the_scores():
    from sklearn.metrics import adjusted_rand_score

    acts = planted(4.0)
    clusters = cluster(acts, jobs=1)
    found = clusters.assignments.sel(site="resid 1").values
    inputs, tasks = acts.input.values, acts.task.values
    apart = [adjusted_rand_score(tasks[inputs == i], found[inputs == i]) for i in np.unique(inputs)]
    assert score(clusters) == pytest.approx(np.mean(apart))
    groups = clusters.groups.query("site == 'resid 1' and metric == 'ari'")
    assert groups["value"].tolist() == pytest.approx(apart)


def test_worker_processes_change_nothing():
    acts = planted(2.0)
    one, two = cluster(acts, jobs=1), cluster(acts, jobs=2)
    assert one.frame.equals(two.frame)
    assert one.centroids.equals(two.centroids)


def test_heads_are_clustered_by_their_contribution_to_the_residual_stream():
    bridge = lc.load(hf_model("gpt2"))
    prompts = lc.Prompts.from_token_lists(
        [[5 + i % 4, 20 + i % 7, 40 + i // 4 % 3] for i in range(60)],
        pd.DataFrame(
            {"task": [str(i % 4) for i in range(60)], "input": [str(i // 4 % 3) for i in range(60)]}
        ),
    )
    acts = lc.extract(bridge, prompts, "head")
    small = cluster(acts, jobs=1)
    full = lc.head_residual(acts, bridge).sel(block=1, head=2).values[:, :, None]
    as_layer = xr.Dataset(
        {"resid": (("prompt", "position", "layer", "d_model"), full)},
        {"layer": [0], "position": ["answer"], "task": acts.task, "input": acts.input},
    )
    direct = cluster(as_layer, jobs=1)
    for metric in ("ari", "silhouette"):
        assert score(small, "head 1.2", metric) == pytest.approx(
            score(direct, "resid 0", metric), abs=1e-3
        )


def test_what_cannot_be_clustered_is_left_out_with_one_reason(caplog, recwarn):
    acts = planted(8.0)
    labels = acts.task.values.copy()
    labels[0] = "lonely"
    inputs = acts.input.values.copy()
    inputs[(inputs == "2") & (labels != "1")] = "0"
    odd = acts.assign_coords(task=("prompt", labels), input=("prompt", inputs))
    with caplog.at_level(logging.WARNING):
        clusters = cluster(odd, score_against=["input"], jobs=1)
    assert len(caplog.records) == len(clusters.left_out) == 3
    assert "1 rows left out" in clusters.left_out[0]
    assert "1 of 3 groups left out: fewer than two task labels" in clusters.left_out[1]
    assert "constant given input" in clusters.left_out[2]
    assert clusters.assignments.values[:, 0].tolist() == [-1, -1]
    assert not recwarn.list


def test_identical_states_score_zero_with_one_reason(recwarn):
    acts = planted(1.0)
    clusters = cluster(acts.assign(resid=acts.resid * 0), jobs=1)
    assert clusters.left_out == ("6 of 6 partitions scored 0: fewer distinct states than clusters",)
    assert (clusters.frame["value"] == 0).all()
    assert not recwarn.list


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "mood"}, "label 'mood' is not in these activations: give"),
        ({"given": "mood"}, "label 'mood'"),
        ({"k": 25}, "k=25 clusters requested, but at most 24 rows"),
        ({"k": 1}, "k=1, expected at least 2"),
        ({"permutations": 0}, "permutations=0, expected at least 1"),
        ({"kinds": []}, "kinds: none given"),
        ({"scale": "log"}, "scale 'log' is not known"),
        ({"kinds": "head"}, "site 'head' is not in these activations: they hold"),
        ({"position": "start"}, "position 'start' is not in these activations"),
        ({"by": "input"}, "nothing to cluster by 'input' given 'input'"),
        ({"metrics": []}, "metrics: none given"),
        ({"metrics": ["ari", "vibes"]}, "metric 'vibes' is not known"),
        ({"by": "model"}, "label 'model' is 'tiny' for all 72 prompts, expected at least two"),
    ],
)
def test_wrong_options_are_one_clear_line(options, message):
    acts = planted(1.0).assign_coords(model=("prompt", ["tiny"] * (TASKS * INPUTS * COPIES)))
    with pytest.raises(lc.InputError, match=message):
        cluster(acts, jobs=1, **options)


def test_results_show_themselves():
    clusters = cluster(planted(8.0), jobs=1)
    assert "best ARI" in repr(clusters)
    assert "<table" in clusters._repr_html_()
    assert clusters.plot("ami").to_dict()
    with pytest.raises(lc.InputError, match="metric 'vibes' is not known"):
        clusters.plot("vibes")


def test_chosen_metrics_are_those_of_the_whole_and_nothing_else():
    acts = planted(3.0)
    whole = cluster(acts, jobs=1).frame
    for metrics in (["ari", "ami"], "silhouette"):
        chosen = cluster(acts, metrics=metrics, jobs=1)
        expected = whole[whole["metric"].isin([metrics] if metrics == "silhouette" else metrics)]
        pd.testing.assert_frame_equal(chosen.frame, expected.reset_index(drop=True))
    assert "best SILHOUETTE" in repr(chosen)
    assert "<table" in chosen._repr_html_()
    with pytest.raises(lc.InputError, match="metric 'ari' is not known: expected one of"):
        chosen.best()


@pytest.mark.parametrize("jobs", [1, 2])
def test_states_that_are_not_finite_are_refused_with_their_site(jobs):
    acts = planted(3.0)
    acts.resid[[7, 30], 0, 1, 4] = [np.nan, np.inf]
    with pytest.raises(lc.InputError, match=r"'resid 1': 2 of 72 rows hold NaN .* first is row 7"):
        cluster(acts, jobs=jobs)


def worded(
    *, task: float, wording: float, seed: int, source: float = 3, crossed: bool = False
) -> xr.Dataset:
    """Five tasks of four wordings, three inputs; codes of tasks and wordings of given strengths."""
    rng = np.random.default_rng(seed)
    which, said, given = (a.ravel() for a in np.mgrid[:5, :4, :3])
    cell = 4 * which + said
    states = 0.3 * rng.normal(size=(60, 1, 1, D)) + source * rng.normal(size=(3, 1, 1, D))[given]
    states += task * rng.normal(size=(5, 1, 1, D))[which]
    states += wording * rng.normal(size=(20, 1, 1, D))[cell]
    labels = {"task": which, "template": said if crossed else cell, "input": given}
    return xr.Dataset(
        {"resid": (("prompt", "position", "layer", "d_model"), states.astype(np.float32))},
        {"layer": [0], "position": ["answer"]}
        | {name: ("prompt", values.astype(str)) for name, values in labels.items()},
    )


@pytest.mark.parametrize("crossed", [False, True])
def test_states_that_know_wordings_only_are_not_significant_and_tasks_are(crossed):
    options = {"metrics": ["ari", "cross_wording_ari"], "n_init": 1, "jobs": 1}
    p = {
        task: [
            cluster(worded(task=task, wording=1, seed=s, crossed=crossed), seed=s, **options).frame[
                "p"
            ]
            for s in range(20)
        ]
        for task in (0.0, 2.0)
    }
    # Five of 20 at .05 come up once in 3,000 times by chance.
    assert ((np.array(p[0.0]) <= 0.05).sum(0) < 5).all()
    assert ((np.array(p[2.0]) <= 0.05).sum(0) > 15).all()
    # Single rows as units call nearly every draw a task.
    options |= {"units": "rows", "permutations": 40}
    fooled = [
        cluster(worded(task=0, wording=1, source=0, seed=s), given=None, **options)
        .frame["p"]
        .iloc[0]
        for s in range(8)
    ]
    assert (np.array(fooled) <= 0.05).sum() > 5


def test_one_relabelling_serves_all_inputs():
    """The null of a mean over inputs that repeat each other is as wide as that of one input."""
    one = worded(task=0, wording=1, seed=3).isel(prompt=slice(0, None, 3))
    copies = [one.assign_coords(input=("prompt", [str(i)] * 20)) for i in range(9)]
    many = xr.concat(copies, dim="prompt")
    alone, repeated = (
        cluster(acts.sortby("template"), metrics="ari", n_init=1, jobs=1).frame.iloc[0]
        for acts in (one, many)
    )
    assert repeated["n_groups"] == 9
    assert repeated["value"] == pytest.approx(alone["value"])
    assert repeated["null_std"] == pytest.approx(alone["null_std"])
    assert repeated["p"] == alone["p"]


def test_agreement_across_wordings_is_left_out_where_there_is_none():
    acts = worded(task=1, wording=1, seed=0)
    one = acts.assign_coords(template=("prompt", acts.task.values))
    clusters = cluster(one, jobs=1, n_init=1)
    assert "cross_wording_ari" not in set(clusters.frame["metric"])
    assert any(
        "cross_wording_ari and cross_wording_f1 by task left out" in n for n in clusters.notes
    )
    assert (clusters.frame["p"] == 1).all()
    assert (clusters.frame["smallest_p"] == 1).all()
    assert clusters.frame.notna()[["value", "null_mean", "null_std", "p"]].all().all()
    with pytest.raises(lc.InputError, match="expected a task in two wordings of one group"):
        cluster(one, metrics="cross_wording_ari", jobs=1)
    rows = cluster(acts.drop_vars(["template"]), jobs=1, n_init=1)
    assert any("single rows trade labels" in note for note in rows.notes)


@given(seed=st.integers(0, 99))
@settings(max_examples=5, deadline=None)
def test_p_is_said_to_be_one_where_every_relabelling_only_renames(seed: int) -> None:
    """Each task has one wording at each input: whatever trades wordings, the parts are the same."""
    rng = np.random.default_rng(seed)
    task, word = (each.ravel() for each in np.mgrid[0:3, 0:4].repeat(3, axis=2))
    halves = rng.permutation(4)[word] // 2
    states = rng.normal(0, 0.1, (len(task), 1, 1, 5)) + 3 * np.eye(3, 5)[task][:, None, None]
    acts = xr.Dataset(
        {"resid": (("prompt", "position", "layer", "d_model"), states.astype("f4"))},
        {"layer": [0], "position": ["answer"]}
        | {"task": ("prompt", [f"t{i}" for i in task]), "input": ("prompt", word)}
        | {"template": ("prompt", [f"t{i} w{j}" for i, j in zip(task, halves, strict=True)])},
    )
    options = {"jobs": 1, "metrics": "ari", "progress": False}
    found = cluster(acts, **options).frame.iloc[0]
    assert found.value == found.null_mean == found.p == found.smallest_p == 1
    assert "no other labelling" in cluster(acts, **options).notes[0]
    # Where inputs compete, the same wordings make other parts.
    assert cluster(acts, given=None, **options).frame.iloc[0].smallest_p < 0.1
