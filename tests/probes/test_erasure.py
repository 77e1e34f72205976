"""Erasure: after it no linear classifier can tell, which equal class means prove."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from concept_erasure import LeaceEraser
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

import lensclust as lc
from lensclust.sites import Site
from probes.erasure import erase, erase_random

TASKS, INPUTS, COPIES, D = 4, 3, 15, 16
SITE = Site("resid", 0)


def planted(*, seed: int = 0, positions: tuple[str, ...] = ("answer",)) -> xr.Dataset:
    """Inputs far apart and task codes of their own inside each."""
    rng = np.random.default_rng(seed)
    task, source, _ = (a.ravel() for a in np.mgrid[:TASKS, :INPUTS, :COPIES])
    values = rng.normal(size=(len(task), len(positions), 1, D))
    values += (30 * rng.normal(size=(INPUTS, D)))[source][:, None, None]
    values += (3 * rng.normal(size=(TASKS, INPUTS, D)))[task, source][:, None, None]
    labels = {"task": task.astype(str), "input": source.astype(str)}
    return xr.Dataset(
        {"resid": (("prompt", "position", "layer", "d_model"), values)},
        {"layer": [0], "position": list(positions)}
        | {name: ("prompt", values) for name, values in labels.items()},
    )


def states_of(acts: xr.Dataset) -> torch.Tensor:
    return torch.from_numpy(acts.resid.values[:, 0, 0])


def spread(values: np.ndarray, labels: np.ndarray) -> float:
    """Largest distance of a class mean from the mean of all."""
    return max(
        float(np.abs(values[labels == label].mean(0) - values.mean(0)).max())
        for label in np.unique(labels)
    )


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 999))
def test_class_means_are_equal_after_erasure(seed):
    acts = planted(seed=seed)
    before = states_of(acts)
    after = erase(acts).edit_at(SITE)(before).numpy()
    assert spread(before.numpy(), acts.task.values) > 0.5
    assert spread(after, acts.task.values) < 1e-8
    # And nothing was thrown away with it.
    assert np.linalg.matrix_rank(after - after.mean(0), tol=1e-6) == D - (TASKS - 1)


def test_no_linear_classifier_beats_chance_where_one_did():
    acts = planted()
    before, labels = states_of(acts).numpy(), acts.task.values
    for values, low, high in (
        (before, 0.6, 1.0),
        (erase(acts).edit_at(SITE)(torch.from_numpy(before)).numpy(), 0.0, 1 / TASKS + 0.01),
    ):
        classifier = LogisticRegression(C=1e6, max_iter=5000).fit(values / 10, labels)
        assert low <= classifier.score(values / 10, labels) <= high


def test_erasure_is_that_of_the_authors_package():
    acts = planted()
    x = states_of(acts)
    _, code = np.unique(acts.task.values, return_inverse=True)
    expected = LeaceEraser.fit(x, torch.nn.functional.one_hot(torch.from_numpy(code)).double())(x)
    torch.testing.assert_close(erase(acts).edit_at(SITE)(x), expected)


@pytest.mark.parametrize("labels", [2, TASKS])
def test_given_a_condition_its_class_means_are_equal_inside_it(labels):
    acts = planted()
    acts = acts.isel(prompt=np.flatnonzero(acts.task.values.astype(int) < labels))
    for way, bound in ((erase(acts, given="input"), 1e-8), (erase(acts), np.inf)):
        after = way.edit_at(SITE)(states_of(acts)).numpy()
        inside = [
            spread(after[acts.input.values == value], acts.task.values[acts.input.values == value])
            for value in np.unique(acts.input)
        ]
        assert max(inside) < bound
    # The plain eraser leaves what differs from input to input: that is why `given` exists.
    assert max(inside) > 0.5


def test_conditions_stay_where_they_were():
    acts = planted()
    after = erase(acts, given="input").edit_at(SITE)(states_of(acts)).numpy()
    for value in np.unique(acts.input):
        here = acts.input.values == value
        np.testing.assert_allclose(after[here].mean(0), states_of(acts)[here].mean(0), atol=1e-8)


@pytest.mark.parametrize("condition", [None, "input"])
def test_the_control_removes_as_many_directions_and_leaves_the_label(condition):
    acts = planted()
    x = states_of(acts)
    edit = erase_random(acts, given=condition).edit_at(SITE)
    here = np.ones(len(x), bool) if condition is None else acts.input.values == "1"
    after = edit(x)[here].numpy()
    assert np.linalg.matrix_rank(after - after.mean(0), tol=1e-6) == D - (TASKS - 1)
    moved = (edit(x) - x)[here].numpy()
    assert np.linalg.matrix_rank(moved, tol=1e-6) == TASKS - 1
    np.testing.assert_allclose(after.mean(0), x[here].mean(0), atol=1e-8)
    assert spread(after, acts.task.values[here]) > 0.5
    torch.testing.assert_close(edit(edit(x)), edit(x))


def test_the_control_is_drawn_by_seed():
    acts = planted()
    x = states_of(acts)
    first, again, other = (erase_random(acts, seed=seed).edit_at(SITE)(x) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_a_label_that_says_nothing_is_erased_without_harm():
    rng = np.random.default_rng(0)
    acts = planted()
    noise = acts.assign(resid=(acts.resid.dims, rng.normal(size=acts.resid.shape)))
    x = states_of(noise)
    lost = (erase(noise).edit_at(SITE)(x) - x).norm() / x.norm()
    control = (erase_random(noise).edit_at(SITE)(x) - x).norm() / x.norm()
    assert lost < 1.5 * control


@pytest.mark.parametrize("make", [erase, erase_random])
def test_one_label_or_one_row_in_a_condition_leaves_it_as_it_is(make):
    acts = planted()
    inputs, tasks = acts.input.values.copy(), acts.task.values.copy()
    tasks[inputs == "0"] = "0"
    inputs[-1] = "lonely"
    odd = acts.assign_coords(input=("prompt", inputs), task=("prompt", tasks))
    before = states_of(odd)
    after = make(odd, given="input").edit_at(SITE)(before)
    assert after.isfinite().all()
    torch.testing.assert_close(after[inputs == "0"], before[inputs == "0"])
    torch.testing.assert_close(after[-1], before[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edits_keep_dtype_and_input(dtype):
    acts = planted().astype("f2")
    x = states_of(acts).to(dtype)
    kept = x.clone()
    for make in (erase, erase_random):
        for condition in (None, "input"):
            assert make(acts, given=condition).edit_at(SITE)(x).dtype == dtype
    assert torch.equal(x, kept)


def test_wrong_labels_and_positions_are_one_clear_line():
    two = planted(positions=("answer", "first"))
    for make in (erase, erase_random):
        with pytest.raises(lc.InputError, match="label 'mood' is not in these activations"):
            make(two, by="mood")
        with pytest.raises(lc.InputError, match="label 'mood' is not in these activations"):
            make(two, given="mood")
        with pytest.raises(lc.InputError, match="name one of them"):
            make(two).edit_at(SITE)
        with pytest.raises(lc.InputError, match="'resid 4' is not in these activations"):
            make(two, position="first").edit_at(Site("resid", 4))
        assert make(two, position="first").edit_at(SITE)(states_of(two)).shape == (
            len(two.prompt),
            D,
        )
