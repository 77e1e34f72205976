"""The nearest cluster: planted ones are named, noise is not, and scikit-learn agrees."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings, strategies as st
from sklearn.neighbors import NearestCentroid

import lensclust as lc
from probes.clustering.nearest_clusters import membership
from tests.tiny import hf_model

TASKS, INPUTS, COPIES, D = 4, 3, 12, 10


def planted(strength: float, *, seed: int = 0, positions: tuple[str, ...] = ("answer",)):
    """Two sets of states around the same input and task codes; tasks only in the last layer."""
    rng = np.random.default_rng(seed)
    task, source, _ = (a.ravel() for a in np.mgrid[:TASKS, :INPUTS, :COPIES])
    by_input = 20 * rng.normal(size=(INPUTS, D))
    by_pair = strength * rng.normal(size=(TASKS, INPUTS, D))
    found = []
    for _ in range(2):
        values = rng.normal(size=(len(task), len(positions), 2, D))
        values += by_input[source][:, None, None]
        values[:, :, 1] += by_pair[task, source][:, None]
        labels = {"task": task.astype(str), "input": source.astype(str)}
        found.append(
            xr.Dataset(
                {"resid": (("prompt", "position", "layer", "d_model"), values.astype("f4"))},
                {"layer": [0, 1], "position": list(positions)}
                | {name: ("prompt", values) for name, values in labels.items()},
            )
        )
    return found


def test_planted_clusters_are_named_and_noise_is_not():
    new, known = planted(6.0)
    found = membership(new, known)
    assert found.query("layer == 1")["right"].all()
    noise = found.query("layer == 0")["right"]
    # One in four is right by chance; 4 standard deviations of so many guesses.
    assert abs(noise.mean() - 1 / TASKS) < 4 * np.sqrt(3 / 16 / len(noise))
    assert found["prompt"].value_counts().eq(2).all()


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 999), st.floats(0, 3))
def test_right_near_and_margin_say_the_same(seed, strength):
    new, known = planted(strength, seed=seed)
    found = membership(new, known)
    assert found["margin"].between(-1, 1).all()
    assert (found["right"] == (found["margin"] > 0)).all()
    assert (found["right"] == (found["nearest"] == new.task.values[found["prompt"]])).all()


def test_labels_dealt_anew_are_not_found():
    new, known = planted(6.0)
    dealt = known.task.values.copy()
    rng = np.random.default_rng(1)
    for value in np.unique(known.input):
        rows = np.flatnonzero(known.input.values == value)
        dealt[rows] = dealt[rng.permutation(rows)]
    found = membership(new, known.assign_coords(task=("prompt", dealt)))
    # Whole clusters go to one wrong mean, so the cluster is the unit.
    cells = TASKS * INPUTS
    share = found.query("layer == 1")["right"].mean()
    assert abs(share - 1 / TASKS) < 4 * np.sqrt(3 / 16 / cells)


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_without_a_condition_it_is_the_nearest_centroid_of_scikit_learn(strength):
    new, known = planted(strength)
    found = membership(new, known, given=None)
    for layer in (0, 1):
        train, test = (a.resid.sel(layer=layer).values[:, 0].astype("f8") for a in (known, new))
        expected = NearestCentroid().fit(train, known.task.values).predict(test)
        rows = found[found["layer"] == layer].set_index("prompt").sort_index()
        assert rows["nearest"].tolist() == expected.tolist()


def test_given_a_condition_it_is_that_of_each_part_alone():
    new, known = planted(1.0)
    rows = membership(new, known).query("layer == 1").set_index("prompt").sort_index()
    for value in np.unique(known.input):
        here = [np.flatnonzero(a.input.values == value) for a in (known, new)]
        train, test = (
            a.resid.sel(layer=1).values[index, 0].astype("f8")
            for a, index in zip((known, new), here, strict=True)
        )
        expected = NearestCentroid().fit(train, known.task.values[here[0]]).predict(test)
        assert rows.loc[here[1], "nearest"].tolist() == expected.tolist()


def test_order_of_prompts_does_not_matter():
    new, known = planted(1.0)
    order = np.random.default_rng(2).permutation(new.sizes["prompt"])
    key = ["site", "prompt"]
    straight = membership(new, known).set_index(key)
    turned = membership(new.isel(prompt=order), known.isel(prompt=order[::-1]))
    turned = turned.assign(prompt=order[turned["prompt"]]).set_index(key)
    assert (turned["nearest"].reindex(straight.index) == straight["nearest"]).all()
    np.testing.assert_allclose(
        turned["margin"].reindex(straight.index), straight["margin"], atol=1e-5
    )


def test_labels_may_be_numbers_and_states_half_precision_or_of_one_position():
    new, known = planted(6.0, positions=("first", "answer"))
    as_numbers = [
        a.assign_coords(task=("prompt", a.task.values.astype(int))).astype("f2")
        for a in (new, known)
    ]
    with pytest.raises(lc.InputError, match="name one of them"):
        membership(new, known)
    found = membership(*as_numbers, position="answer")
    assert found.query("layer == 1")["right"].all()


def test_heads_are_compared_by_what_they_add_to_the_residual_stream():
    bridge = lc.load(hf_model("gpt2"))
    prompts = lc.tasks.sif(n_tasks=3, n_inputs=4, mappings_per_task=4, strings_per_regex=12)
    known, new = (
        lc.extract(bridge, prompts.where(split=split), "head", progress=False)
        for split in ("train", "new_string")
    )
    found = membership(new, known, given=None, kinds="head")
    full = [lc.head_residual(a, bridge).sel(block=1, head=2).values[:, 0] for a in (known, new)]
    tasks = known.task.values.astype(str)
    expected = NearestCentroid().fit(full[0].astype("f8"), tasks).predict(full[1].astype("f8"))
    rows = found[found["site"] == "head 1.2"].set_index("prompt").sort_index()
    assert (rows["nearest"].to_numpy() == expected).mean() > 0.99


def test_states_that_are_not_finite_are_refused():
    new, known = planted(3.0)
    new.resid[5, 0, 1, 2] = np.nan
    with pytest.raises(lc.InputError, match="'resid 1': 1 of 144 rows hold NaN"):
        membership(new, known)


def without(acts: xr.Dataset, **labels: str) -> xr.Dataset:
    keep = np.zeros(acts.sizes["prompt"], bool)
    for name, value in labels.items():
        keep |= acts[name].values != value
    return acts.isel(prompt=np.flatnonzero(keep))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda k: k, {"by": "mood"}, "label 'mood' is not in these activations"),
        (lambda k: k, {"given": "mood"}, "label 'mood' is not in these activations"),
        (lambda k: k, {"kinds": "head"}, "site 'head' is not in these activations"),
        (lambda k: k, {"position": "start"}, "position 'start' is not in these activations"),
        (lambda k: without(k, input="2"), {}, "no known prompt has input '2'"),
        (lambda k: without(k, task="3"), {}, r"known prompts have task \['0', '1', '2'\]"),
        (lambda k: without(k, task="3", input="1"), {}, r"input '1': known prompts have task"),
        (lambda k: without(k, task="3"), {"given": None}, r"known prompts have task"),
    ],
)
def test_what_cannot_be_named_is_one_clear_line(change, options, message):
    new, known = planted(3.0)
    with pytest.raises(lc.InputError, match=message) as caught:
        membership(new, change(known), **options)
    assert "\n" not in str(caught.value)


def test_one_label_alone_is_refused():
    new, known = (a.isel(prompt=np.flatnonzero(a.task.values == "0")) for a in planted(3.0))
    with pytest.raises(lc.InputError, match="and one other at least"):
        membership(new, known)
