"""Rows without a label, labels by any spelling, axes by name: one mechanism for every probe."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import lensclust as lc
import probes
from probes.steering.gating import only_members, only_near

N, D = 60, 6
MISSING = {"None": None, "NaN": np.nan, "NA": pd.NA, "NaT": pd.NaT, "empty": ""}


def activations(seed: int = 0) -> xr.Dataset:
    """Planted task directions; every label crossed with the others."""
    rng = np.random.default_rng(seed)
    task, word, wording = np.arange(N) % 3, np.arange(N) // 3 % 4, np.arange(N) // 12
    states = rng.normal(0, 1, (N, 1, 2, D)) + np.eye(3, D)[task][:, None, None]
    return xr.Dataset(
        {"resid": (("prompt", "position", "layer", "d_model"), states.astype("f4"))},
        {
            "layer": [0, 1],
            "position": ["answer"],
            "task": ("prompt", np.array(list("abc"), dtype=object)[task]),
            "input": ("prompt", word),
            "template": ("prompt", [f"t{i}" for i in wording]),
        },
    )


REPLACE = probes.replace(probes.mean_states(activations()), "b")


def without(acts: xr.Dataset, rows: list[int], name: str, missing: object) -> xr.Dataset:
    values = acts[name].values.astype(object)
    for row in rows:
        values[row] = missing
    return acts.assign_coords({name: ("prompt", values)})


QUIET: dict[str, Any] = {"progress": False}
CALLS = {
    "cluster": lambda a: probes.cluster(a, permutations=3, jobs=1, **QUIET).frame,
    "groups": lambda a: probes.cluster(a, permutations=3, jobs=1, **QUIET).groups,
    "centroids": lambda a: probes.cluster(a, permutations=3, jobs=1, **QUIET).centroids,
    "silhouettes": lambda a: probes.silhouettes(a, permutations=3, **QUIET),
    "probe": lambda a: probes.probe(a, control="input", permutations=3, jobs=1, **QUIET).frame,
    "nearest_neighbour": lambda a: probes.nearest_neighbour(
        a, permutations=3, per="input", **QUIET
    ),
    "rsa": lambda a: (
        probes.rsa(a, ["task", "input"], nuisance=["template"], permutations=9, **QUIET).frame
    ),
    "mean_states": lambda a: probes.mean_states(a, given="input"),
    "decode": lambda a: probes.decode(a, a, target="task", groups="template", resamples=9).frame,
    "membership": lambda a: probes.membership(a, a).drop(columns="prompt"),
    "erase": lambda a: moved(probes.erase(a, given="template")),
    "linear_transport": lambda a: moved(probes.linear_transport(a, "a", "b")),
    "only_near": lambda a: moved(
        only_near(
            probes.replace(probes.mean_states(activations()), "b"), a, "a", "b", given="input"
        )
    ),
}
USED = {
    **dict.fromkeys(CALLS, ("task", "input")),
    "probe": ("task", "input", "template"),
    "nearest_neighbour": ("task", "input", "template"),
    "rsa": ("task", "input", "template"),
    "decode": ("task", "template"),
    "erase": ("task", "template"),
}


def moved(intervention: probes.Intervention) -> np.ndarray:
    states = torch.from_numpy(np.random.default_rng(1).normal(size=(9, D)).astype("f4"))
    return intervention.edit_at(lc.Site("resid", 1))(states).numpy()


def same(found: Any, expected: Any) -> None:
    if isinstance(found, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected)
    elif isinstance(found, xr.Dataset):
        xr.testing.assert_equal(found, expected)
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", CALLS)
def test_rows_without_a_label_might_as_well_not_be_there(name, caplog):
    acts, rows = activations(), [0, 7, 8, 31]
    there = acts.isel(prompt=np.setdiff1d(np.arange(N), rows))
    expected = CALLS[name](there)
    kinds = list(MISSING.values())
    for number, label in enumerate(USED[name]):
        with caplog.at_level(logging.WARNING):
            found = CALLS[name](without(acts, rows, label, kinds[number]))
        same(found, expected)
        assert f"4 rows left out: without a label {label!r}" in caplog.text
        caplog.clear()


@pytest.mark.parametrize("missing", MISSING)
def test_places_are_those_of_all_prompts(missing):
    acts, rows = activations(), [0, 7, 8, 31]
    gone = without(acts, rows, "task", MISSING[missing])
    kept = np.setdiff1d(np.arange(N), rows)
    found = probes.cluster(gone, permutations=2, jobs=1, **QUIET)
    assert (found.assignments.values[:, rows] == -1).all()
    assert (found.assignments.values[:, kept] >= 0).all()
    assert "4 rows left out: without a label 'task'" in found.left_out
    sweep = probes.probe(gone, control=None, permutations=2, jobs=1, **QUIET)
    assert (sweep.fold[rows] == -1).all()
    assert (sweep.fold[kept] >= 0).all()
    assert set(probes.membership(gone, gone)["prompt"]) == set(kept.tolist())
    control = probes.dealt(gone)
    assert pd.isna(control.task.values[rows]).all() or (control.task.values[rows] == "").all()


def test_a_label_that_no_prompt_has():
    acts = without(activations(), list(range(N)), "task", None)
    with pytest.raises(lc.InputError, match="no prompt has all the labels"):
        probes.mean_states(acts)


def test_labels_are_named_by_their_text():
    """Numbers, texts and arrays of no axes name one label, in every move and result."""
    acts = activations()
    acts = acts.assign_coords(task=("prompt", np.arange(N) % 3))
    means, within = probes.mean_states(acts), probes.mean_states(acts, given="input")
    makers = {
        "shift": lambda a, b: probes.shift(means, a, b),
        "transport": lambda a, b: probes.transport(within, a, b),
        "replace": lambda a, b: probes.replace(means, b),
        "project": lambda a, b: probes.project(means, a, b),
        "linear": lambda a, b: probes.linear_transport(acts, a, b),
        "members": lambda a, b: only_members(probes.shift(means, a, b), means, a),
        "near": lambda a, b: only_near(probes.shift(means, a, b), acts, a, b),
    }
    for make in makers.values():
        expected = moved(make("0", "1"))
        for spelt in (int, float, np.int8, np.float32, torch.tensor, np.array):
            same(moved(make(spelt(0), spelt(1))), expected)
    # Means whose labels are numbers, as a user may have made them.
    same(
        moved(probes.shift(means.assign_coords(task=[0, 1, 2]), "0", 1)),
        moved(makers["shift"](0, 1)),
    )
    sweep = probes.probe(acts, control=None, permutations=0, jobs=1, **QUIET)
    same(sweep.direction(1, "resid 0"), sweep.direction("1", "resid 0"))
    with pytest.raises(lc.InputError, match="'7' is not in these centroids: they have"):
        probes.shift(means, 0, 7)
    with pytest.raises(lc.InputError, match="given twice"):
        probes.shift(means, 0, "0")


@pytest.mark.parametrize("name", CALLS)
def test_axes_are_taken_by_name(name):
    acts = activations()
    turned = acts.transpose("d_model", "layer", "position", "prompt")
    found, expected = CALLS[name](turned), CALLS[name](acts)
    if isinstance(found, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected, rtol=1e-5)
    elif isinstance(found, xr.Dataset):
        xr.testing.assert_allclose(found, expected)
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.isel(layer=1), r"no axis 'layer' any more.*acts.isel\(layer=\[0\]\)"),
        (lambda a: a.sel(position="answer"), "no axis 'position' any more"),
        (lambda a: a.isel(prompt=0), "no axis 'prompt' any more"),
        (lambda a: a.drop_vars("resid"), "hold no site"),
        (lambda a: a.drop_vars("task"), "label 'task' is not in these activations"),
        (lambda a: a.drop_vars("input"), r"given='input'.*or given=None for none"),
    ],
)
@pytest.mark.parametrize("name", ["cluster", "silhouettes", "membership"])
def test_what_lacks_a_part_is_told_in_one_line(name, change, message):
    with pytest.raises(lc.InputError, match=message) as error:
        CALLS[name](change(activations()))
    assert "\n" not in str(error.value)


def test_what_is_mistaken_for_something_else_is_told_in_one_line():
    """Without the types that tests check: as users call them."""
    program = """
        import pandas as pd, lensclust as lc, probes
        model, prompts = lc.load("native:sif-small"), lc.tasks.sif().where(split="new_string")
        rows = pd.DataFrame({"task": ["a"]})
        for call in (
            lambda: probes.cluster(prompts),
            lambda: probes.probe(prompts),
            lambda: probes.rsa(prompts, "task"),
            lambda: probes.decode(prompts, prompts, target="task", groups="template"),
            lambda: probes.silhouettes(prompts),
            lambda: probes.nearest_neighbour(prompts),
            lambda: probes.mean_states(prompts),
            lambda: probes.cka(prompts),
            lambda: probes.shift(prompts, 0, 1),
            lambda: lc.extract(model, "What is 2 + 2?", "resid"),
            lambda: lc.extract(model, ["What is 2 + 2?"], "resid"),
            lambda: lc.Prompts.from_texts(["a"], rows, "gpt2"),
            lambda: lc.Prompts.from_texts([3], rows, len),
            lambda: lc.Prompts.from_token_lists([[1]], None),
            lambda: lc.Prompts.from_token_lists([[1]], "task"),
            lambda: lc.Prompts.from_token_lists(5, rows),
            lambda: lc.Prompts.from_token_lists([[1]], rows, spans=[(0, 1)]),
            lambda: lc.Prompts.from_token_lists([[1]], rows, spans={"s": 3}),
        ):
            try:
                call()
                print("accepted")
            except lc.InputError as error:
                assert "\\n" not in str(error)
                print("refused")
            except Exception as error:
                print(type(error).__name__, error)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.split("\n")[:-1] == ["refused"] * 18


def test_states_that_are_not_there_are_refused() -> None:
    """xarray's ``where`` keeps the rows that it leaves out, as NaN."""
    acts = activations()
    left = acts.where(acts.task == "a")
    calls = [
        lambda: probes.mean_states(left),
        lambda: probes.erase(left).edit_at(lc.Site("resid", 1)),
        lambda: probes.linear_transport(left, "a", "b").edit_at(lc.Site("resid", 1)),
        lambda: probes.cluster(left, jobs=1, permutations=2),
    ]
    for call in calls:
        with pytest.raises(lc.InputError, match="rows hold NaN or infinity"):
            call()


def test_nuisances_of_prompts_in_another_order_are_refused() -> None:
    rows = pd.DataFrame({"task": list("abcabc"), "input": list("xxxyyy")})
    ids = [[1] * n for n in (3, 5, 2, 7, 4, 6)]
    prompts = lc.Prompts.from_token_lists(ids, rows)
    states = np.zeros((6, 1, 1, D), "f4")
    acts = xr.Dataset(
        {"resid": (("prompt", "position", "layer", "d_model"), states)},
        {"layer": [0], "position": ["answer"]}
        | {name: ("prompt", rows[name].to_numpy(object)) for name in rows},
    )
    assert probes.with_nuisances(acts, prompts).length.values.tolist() == [3, 5, 2, 7, 4, 6]
    order = [4, 0, 5, 1, 3, 2]
    moved = acts.isel(prompt=order)
    with pytest.raises(lc.InputError, match="prompt 0 has task='b' on one side and 'a' on the"):
        probes.with_nuisances(moved, prompts)
    found = probes.with_nuisances(moved, prompts.take(order))
    assert found.length.values.tolist() == [len(ids[i]) for i in order]
