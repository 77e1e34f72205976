"""Exchangeable units: what moves together by brute force, and nothing finer or more often."""

from __future__ import annotations

from itertools import permutations
from math import factorial

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings, strategies as st

import lensclust as lc
from probes import nearest_neighbour, rsa
from probes.design.flips import flipped_p
from probes.design.units import Exchange, exchangeable, row_columns


def nested(wordings: list[int], copies: int = 2) -> pd.DataFrame:
    """Each task with wordings of its own."""
    return pd.DataFrame(
        [
            {"task": f"t{t}", "template": f"{t}.{w}", "input": f"x{x}"}
            for t, n in enumerate(wordings)
            for w in range(n)
            for x in range(copies)
        ]
    )


def crossed(tasks: int, templates: int, inputs: int = 3) -> pd.DataFrame:
    """Each template with every task."""
    return pd.DataFrame(
        [
            {"task": f"t{t}", "template": f"w{w}", "input": f"x{x}"}
            for w in range(templates)
            for t in range(tasks)
            for x in range(inputs)
        ]
    )


def found(frame: pd.DataFrame, by: str = "task", **options) -> Exchange:
    return exchangeable(frame[by].to_numpy(), frame, by=by, **options)


def partitions(labellings: np.ndarray) -> set[tuple[int, ...]]:
    """Labellings without their names: each row's label by its first row."""
    return {tuple(np.unique(one, return_index=True)[1][one].tolist()) for one in labellings}


def values(frame: pd.DataFrame, column: str) -> np.ndarray:
    return np.unique(frame[column], return_inverse=True)[1]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=2, max_size=3).filter(lambda n: sum(n) < 8))
def test_all_relabellings_of_nested_wordings_are_those_of_brute_force(wordings):
    frame = nested(wordings)
    exchange = found(frame)
    labels = np.repeat(np.arange(len(wordings)), wordings)
    # Every order of the wordings' labels, as a partition of the rows.
    every = {
        tuple(np.unique(one, return_index=True)[1][np.array(one)].tolist())
        for one in map(np.array, set(permutations(labels.tolist())))
    }
    got = exchange.labellings(10_000, seed=0)
    assert len(got) == len(partitions(got)) == len(every)
    assert exchange.smallest_p(10_000) == pytest.approx(1 / len(every))
    assert (got[0] == values(frame, "task")).all()
    sampled = partitions(exchange.labellings(20, seed=1))
    assert sampled <= partitions(got)


@pytest.mark.parametrize(("tasks", "templates"), [(2, 2), (2, 4), (3, 2), (3, 3)])
def test_crossed_wordings_permute_task_names_within_each(tasks, templates):
    frame = crossed(tasks, templates)
    exchange = found(frame)
    assert exchange.exchanged == "task within template"
    got = exchange.labellings(1000, seed=0)
    assert len(got) == len(partitions(got)) == factorial(tasks) ** (templates - 1)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(2, 4),
    st.integers(2, 5),
    st.booleans(),
    st.sampled_from([3, 40]),
)
def test_rows_of_a_unit_share_a_label_at_every_input_whatever_the_layout(seed, a, b, cross, n):
    rng = np.random.default_rng(seed)
    frame = crossed(a, b) if cross else nested(rng.integers(1, 4, a).tolist(), copies=b)
    # Rows left out at random and in any order.
    frame = frame.sample(frac=0.8, random_state=seed)
    if frame["task"].nunique() < 2:
        return
    exchange = found(frame)
    cell = frame["template"] + frame["task"]
    for one in exchange.labellings(n, seed=seed):
        assert (pd.Series(one).groupby(cell.to_numpy()).nunique() == 1).all()
        # As many wordings of each task, in each block, as there are.
        table = pd.crosstab(exchange.block, one[np.unique(exchange.unit, return_index=True)[1]])
        assert (table.to_numpy() == exchange._table()).all()
    for order in exchange.orders(n, seed=seed)[1:]:
        assert (pd.Series(exchange.unit[order]).groupby(exchange.unit).nunique() == 1).all()
        same_size = np.bincount(exchange.unit)[exchange.unit]
        if np.ptp(same_size) == 0:
            assert sorted(order.tolist()) == list(range(len(frame)))


def test_orders_keep_inputs_beside_each_other():
    frame = crossed(3, 3).sample(frac=1, random_state=0)
    x = frame["input"].to_numpy()
    for order in found(frame).orders(20, seed=0):
        assert (x[order] == x).all()


def test_some_wordings_of_one_label_and_some_of_several_stand_side_by_side():
    frame = pd.concat([nested([2, 2]), crossed(2, 2)], ignore_index=True)
    exchange = found(frame)
    assert exchange.exchanged == "template and task within template"
    # 4! / 2! / 2! orders of four wordings, two in each of two, up to the names of both tasks.
    assert len(exchange.labellings(1000, seed=0)) == 6 * 2 * 2 // 2


def test_what_tells_wordings_apart_is_decided_by_name_and_by_what_varies():
    plain = pd.DataFrame({"task": list("aabb"), "mood": list("xyxy")})
    assert found(plain).exchanged == "rows"
    assert "no template, wording or instruction" in found(plain).notes[0]
    by_input = plain.assign(input=list("uvuv"))
    assert found(by_input).exchanged == "rows within input"
    # Inputs of one task each move whole, unless none is repeated.
    assert found(plain.assign(input=list("uuvw"))).exchanged == "inputs"
    assert found(plain.assign(input=list("uvwx"))).exchanged == "rows"
    # A template that all rows share says nothing; the sentence does.
    same = plain.assign(template="one", instruction=["a/one"] * 2 + ["b/one"] * 2)
    assert found(same).exchanged == "rows"
    sentences = same.assign(wording=["do a", "make a", "do b", "make b"])
    assert found(sentences).exchanged == "wording"
    # One wording a task: the two cannot be told apart, and no p is small.
    alone = found(same.assign(wording=["do a"] * 2 + ["do b"] * 2))
    assert alone.smallest_p(999) == 1
    assert len(alone.labellings(999, seed=0)) == 1
    assert "no other labelling" in alone.coarse
    # The label is the wording: strings trade places within their task.
    strings = nested([2, 2], copies=4).assign(instruction=[f"s{i}" for i in range(16)])
    assert found(strings, by="template").exchanged == "instruction within task"
    for one in found(strings, by="template").labellings(20, seed=0):
        assert (one // 2 == values(strings, "task")).all()


def test_inputs_of_one_task_each_join_its_wordings():
    frame = nested([2, 2, 2])
    own = frame.assign(input=frame["task"] + frame["input"])
    assert found(own).smallest_p(99) == 1
    # An input that stands once joins nothing.
    once = frame.assign(input=[str(i) for i in range(len(frame))])
    assert len(found(once).labellings(99, seed=0)) == len(found(frame).labellings(99, seed=0)) == 15


def test_missing_wordings_stand_alone():
    frame = pd.DataFrame({"task": list("aabb"), "template": ["u", None, np.nan, "u"]})
    assert len(np.unique(row_columns(frame)["template"])) == 3


def test_units_override_columns():
    frame = nested([2, 2], copies=3)
    assert found(frame, units="rows").exchanged == "rows"
    assert len(np.unique(found(frame, units=["template", "input"]).unit)) == 12
    named, given = found(frame, units="template"), found(frame, units=frame["template"].to_numpy())
    assert (named.unit == given.unit).all()
    kept = np.array([0, 1, 2, 6, 7, 8])
    some = found(frame, units=frame["template"].to_numpy(), among=kept)
    assert len(some.unit) == 6
    with pytest.raises(lc.InputError, match="units='mood' is no column of these rows"):
        found(frame, units="mood")
    with pytest.raises(lc.InputError, match="units has 3 values for 12 rows"):
        found(frame, units=np.arange(3))


def test_unequal_units_and_inputs_of_some_tasks_are_noted():
    frame = nested([2, 2, 2, 2], copies=4)
    rows = frame[~((frame["template"] == "0.0") & (frame["input"] != "x0"))]
    assert any("1 to 4 rows changes how many rows a label has" in n for n in found(rows).notes)
    part = frame[(frame["task"] != "t0") | (frame["input"] < "x2")]
    assert any("not every value stands with every input" in n for n in found(part).notes)
    condition = part["input"].to_numpy()
    assert not any("every input" in n for n in found(part, condition=condition).notes)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 6))
def test_sign_flips_of_few_units_are_all_of_them(seed, units):
    rng = np.random.default_rng(seed)
    unit = np.arange(3 * units) % units
    change = rng.normal(size=(2, 3 * units))
    sums = np.stack([np.bincount(unit, row) for row in change])
    signs = np.array([[1 - 2 * ((i >> b) & 1) for b in range(units)] for i in range(2**units)])
    every = np.abs(sums @ signs.T)
    p, corrected = flipped_p(change, unit, 1000, seed=seed)
    observed = np.abs(sums.sum(1))
    np.testing.assert_allclose(p, (every >= observed[:, None] - 1e-9).mean(1))
    largest = every.max(0)
    np.testing.assert_allclose(corrected, (largest >= observed[:, None] - 1e-9).mean(1))


# -- units of different sizes -------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000))
def test_copies_of_some_wordings_are_no_further_evidence(seed):
    """p stays when the prompts of some wordings are there twice or three times."""
    rng = np.random.default_rng(seed)
    task, wording = (each.ravel() for each in np.mgrid[:4, :3])
    x = rng.normal(size=(12, 1, 1, 5)) + rng.normal(size=(4, 1, 1, 5))[task]
    rows = np.repeat(np.arange(12), 2)
    x = x[rows] + 0.3 * rng.normal(size=(24, 1, 1, 5))
    labels = {"task": task[rows], "template": (task * 3 + wording)[rows]}
    acts = xr.Dataset(
        {"resid": (("prompt", "position", "layer", "d_model"), x.astype(np.float32))},
        {"layer": [0], "position": ["answer"]}
        | {name: ("prompt", values.astype(str)) for name, values in labels.items()},
    )
    # Some wordings have more prompts; then each of them twice as many, or three times.
    times = np.array([1, *(1 + rng.integers(0, 2, 10)), 2])[rows]
    more = times * (1 + rng.integers(0, 2, 12))[rows]
    some, others = (acts.isel(prompt=np.repeat(np.arange(24), each)) for each in (times, more))
    options = {"permutations": 99, "seed": 0, "progress": False}
    similar = {"nuisance": None, "compare": "pearson", "distance": "euclidean", **options}
    found = [rsa(each, ["task"], **similar).frame["p"].item() for each in (some, others)]
    assert len(set(np.bincount(np.repeat(rows, more)))) == 1 or found[0] == found[1]
    near = [nearest_neighbour(each, **options)["p"].item() for each in (some, others)]
    assert near[0] == near[1]
