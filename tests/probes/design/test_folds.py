"""Folds and permuted labels: groups stay whole, and nothing finer than the exchangeable moves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings, strategies as st

import lensclust as lc
from probes.design.folds import deal, design


def labelled(**labels) -> xr.Dataset:
    return xr.Dataset({}, {name: ("prompt", np.asarray(v)) for name, v in labels.items()})


def plan(acts, **options):
    usual: dict[str, Any] = {"target": "task", "groups": "template", "control": None}
    usual |= {"permutations": 20, "folds": 3}
    return design(acts, **(usual | options))


def count(first, second):
    """Rows by pair of values, in the order of the values."""
    table = np.zeros((first.max() + 1, second.max() + 1), dtype=int)
    np.add.at(table, (first, second), 1)
    return table


@given(st.lists(st.integers(0, 4), min_size=6, max_size=60), st.integers(2, 6), st.integers(0, 99))
def test_every_stratum_is_dealt_evenly(strata, folds, seed):
    strata = np.unique(strata, return_inverse=True)[1]
    table = count(strata, deal(strata, folds, np.random.default_rng(seed)))
    table = np.pad(table, ((0, 0), (0, folds - table.shape[1])))
    assert (table.max(1) - table.min(1) <= 1).all()
    assert np.ptp(table.sum(0)) <= 1


@settings(max_examples=30)
@given(st.integers(0, 99), st.sampled_from(["groups", "labels", "rows", "none"]))
def test_groups_stay_whole_and_permutations_keep_what_folds_were_dealt_by(seed, world):
    rng = np.random.default_rng(seed)
    template = np.repeat(np.arange(12), 10)
    task = rng.integers(0, 3, 120)
    if world == "groups":
        task = rng.permutation(np.arange(12) % 3)[template]
    found = plan(
        labelled(task=task.astype(str), template=template),
        groups=None if world == "none" else "template",
        exchange="rows" if world == "rows" else "labels",
        units="rows" if world == "none" else None,
        seed=seed,
    )
    if world != "none":
        assert (count(template, found.fold) > 0).sum(1).tolist() == [1] * 12
    true, *permuted = found.codes.T.astype(int)
    assert (true == task).all()
    assert any((one != true).any() for one in permuted)
    for one in permuted:
        if world in ("groups", "none"):
            assert (count(found.fold, one) == count(found.fold, true)).all()
        if world == "groups":
            assert ((count(template, one) > 0).sum(1) == 1).all()
        if world == "rows":
            assert (count(template, one) == count(template, true)).all()
        if world == "labels":  # rows of one label in one group still share one
            cell = template * 3 + true
            assert ((count(cell, one) > 0).sum(1) <= 1).all()
            assert ((count(template, one) > 0) == (count(template, true) > 0)).all()


def test_folds_and_controls_do_not_depend_on_the_number_of_permutations():
    rng = np.random.default_rng(0)
    acts = labelled(
        task=rng.integers(0, 3, 120), template=np.arange(120) % 12, input=np.arange(120) % 7
    )
    few, many = (plan(acts, control="input", permutations=n, seed=3) for n in (0, 50))
    assert (few.fold == many.fold).all()
    assert (few.codes == many.codes[:, : few.codes.shape[1]]).all()
    for control in few.codes.T[1:]:
        assert ((count(acts.input.values, control.astype(int)) > 0).sum(1) == 1).all()
        assert len(np.unique(control)) > 1


def test_a_label_of_one_group_is_noted_and_unequal_ones_too():
    acts = labelled(
        task=["a"] * 12 + ["b"] * 12 + ["lonely"] * 2, template=[*np.arange(24) // 3, 8, 8]
    )
    notes = plan(acts).notes
    assert "1 of 3 task labels have one template or fold only, such as 'lonely'" in notes[0]
    uneven = labelled(task=["a"] * 9 + ["b"] * 27, template=[*np.arange(9) % 3, *np.arange(27) % 3])
    assert any("3 to 9 rows changes how many rows a label has" in n for n in plan(uneven).notes)


def test_few_labellings_are_noted():
    acts = labelled(task=["a", "b"] * 6, template=np.arange(12) // 2 % 3)
    # Two orders in each of three templates; swapping the names of both tasks changes nothing.
    found = plan(acts)
    assert any(
        "4 distinct relabellings by exchanging task within template" in n for n in found.notes
    )
    assert found.codes.shape[1] == 4
    assert found.smallest_p == 0.25


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ({"task": ["a"] * 12}, {}, "every row has task 'a', expected two labels"),
        ({}, {"folds": 7}, "folds=7, expected 2 to 6, the number of groups of 'template'"),
        ({}, {"folds": 1}, "folds=1, expected 2 to 6"),
        ({}, {"groups": None, "folds": 13}, "folds=13, expected 2 to 12, the number of rows"),
        ({}, {"target": "mood"}, "label 'mood' is not in these activations: they have"),
        ({}, {"groups": "mood"}, "label 'mood'"),
        ({}, {"control": "mood"}, "label 'mood'"),
        ({"input": ["x"] * 12}, {"control": "input"}, "control 'input' is the same in every row"),
        ({}, {"exchange": "all"}, "exchange 'all' is not known: expected one of"),
        ({}, {"exchange": "rows"}, "every template has one label"),
        ({"template": np.repeat([0, 1], 6)}, {"folds": 2}, "nothing to learn: 2 of 2 task labels"),
        (
            {"task": np.repeat(["a", "b"], 6), "template": np.arange(12) // 3},
            {"folds": 4},
            "no labels can be exchanged \\(template, 4 folds\\)",
        ),
    ],
)
def test_what_cannot_be_planned_is_one_clear_line(labels, options, message):
    whole = {"task": np.repeat(["a", "b"], 6), "template": np.arange(12) // 2} | labels
    with pytest.raises(lc.InputError, match=message):
        plan(labelled(**whole), **options)
