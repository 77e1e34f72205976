"""Moves along one direction: what they set, what they leave, and what they do to a model."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from hypothesis import given, settings, strategies as st

import lensclust as lc
from lensclust.activations.dataset import select
from lensclust.models.sites import Site
from probes.design.centroids import mean_states
from probes.linear.linear_probe import probe
from probes.patching.replay import replay
from probes.steering.directions import add_direction, project
from probes.steering.interventions import shift
from probes.steering.steering import steer
from tests.tiny import D_MODEL, D_VOCAB, hf_model

HERE = Site("resid", 0)


def dataset(states: np.ndarray, **labels: np.ndarray) -> xr.Dataset:
    return xr.Dataset(
        {"resid": (("prompt", "position", "layer", "d_model"), states[:, None, None])},
        {"layer": [0], "position": ["answer"]}
        | {name: ("prompt", np.asarray(values).astype(str)) for name, values in labels.items()},
    )


def two_tasks(seed: int, d: int = 5) -> tuple[xr.Dataset, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    states, task = rng.normal(size=(20, d)).astype("f4"), np.repeat(["a", "b"], 10)
    states[10:] += 2
    return dataset(states, task=task), states[:10], states[10:]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_project_sets_the_coordinate_and_nothing_else(seed: int) -> None:
    acts, a, b = two_tasks(seed)
    away = b.mean(0) - a.mean(0)
    unit = away / np.linalg.norm(away)
    new = np.random.default_rng(seed + 1).normal(size=(6, 5)).astype("f4")
    edit = project(mean_states(acts), "a", "b").edit_at(HERE)
    moved = edit(torch.from_numpy(new))
    np.testing.assert_allclose(moved.numpy() @ unit, np.full(6, b.mean(0) @ unit), atol=1e-4)
    others = np.eye(5) - np.outer(unit, unit)
    np.testing.assert_allclose(moved.numpy() @ others, new @ others, atol=1e-5)
    torch.testing.assert_close(edit(moved), moved, atol=1e-5, rtol=1e-5)
    # The source's mean goes where the shift takes it: to the target's.
    means = torch.from_numpy(a.mean(0, keepdims=True))
    there = shift(mean_states(acts), "a", "b").edit_at(HERE)(means)
    torch.testing.assert_close(edit(means), there, atol=1e-5, rtol=1e-5)


def test_project_between_equal_means_moves_nothing() -> None:
    states = np.random.default_rng(0).normal(size=(6, 4)).astype("f4")
    acts = dataset(np.concatenate([states, states]), task=np.repeat(["a", "b"], 6))
    found = project(mean_states(acts), "a", "b").edit_at(HERE)(torch.from_numpy(states))
    np.testing.assert_array_equal(found, states)


def test_project_with_a_condition_uses_those_that_both_have() -> None:
    acts, *_ = two_tasks(0)
    alone = dataset(np.full((3, 5), 99, "f4"), task=np.repeat("a", 3), input=np.repeat("z", 3))
    both = acts.assign_coords({"input": ("prompt", np.tile(["x", "y"], 10))})
    with_alone = xr.concat([both, alone], dim="prompt")
    states = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    found, truth = (
        project(mean_states(part, given="input"), "a", "b").edit_at(HERE)(states)
        for part in (with_alone, both)
    )
    torch.testing.assert_close(found, truth)
    own = acts.assign_coords({"input": ("prompt", acts.task.values)})
    with pytest.raises(lc.InputError, match="project: 'a' and 'b' share no input"):
        project(mean_states(own, given="input"), "a", "b").edit_at(HERE)


def test_project_refuses_what_the_centroids_do_not_hold() -> None:
    means = mean_states(two_tasks(0)[0])
    with pytest.raises(lc.InputError, match="task 'c' is not in these centroids"):
        project(means, "a", "c")
    with pytest.raises(lc.InputError, match="given twice"):
        project(means, "a", "a")
    with pytest.raises(lc.InputError, match="'resid 7' is not in these centroids"):
        project(means, "a", "b").edit_at(Site("resid", 7))


@settings(max_examples=20, deadline=None)
@given(strength=st.floats(-3, 3), seed=st.integers(0, 10**6))
def test_every_move_knows_its_size_and_its_twin_has_the_same(strength: float, seed: int) -> None:
    acts, a, _ = two_tasks(seed)
    states = torch.from_numpy(a)
    for move in (project(mean_states(acts), "a", "b"), add_direction(np.arange(5.0))):
        scaled = move.scaled(strength)
        sizes = move.size(states, HERE)
        by_hand = np.linalg.norm(move.edit_at(HERE)(states).numpy() - a, axis=1)
        np.testing.assert_allclose(sizes, by_hand, atol=1e-5)
        for other in (scaled, scaled.random_twin(seed)):
            torch.testing.assert_close(
                other.size(states, HERE), abs(strength) * sizes, atol=1e-4, rtol=1e-4
            )


def test_a_vector_for_each_site() -> None:
    vectors = {"resid 1": np.ones(3), Site("resid", 2): torch.full((3,), 2.0)}
    move, states = add_direction(vectors), torch.zeros(2, 3)
    assert move.edit_at(Site("resid", 1))(states).tolist() == [[1, 1, 1]] * 2
    assert move.edit_at(Site("resid", 2))(states).tolist() == [[2, 2, 2]] * 2
    with pytest.raises(lc.InputError, match="no vector for site 'resid 3': given"):
        move.edit_at(Site("resid", 3))
    with pytest.raises(lc.InputError, match="vector of 3 numbers at 'resid 1', whose states have"):
        move.edit_at(Site("resid", 1))(torch.zeros(2, 4))
    for bad in (np.array([1.0, np.nan]), {"resid 1": np.array([np.inf])}):
        with pytest.raises(lc.InputError, match="1 numbers that are not finite"):
            add_direction(bad)


def test_a_probes_direction_makes_the_probe_read_the_label() -> None:
    acts, a, b = two_tasks(0)
    sweep = probe(acts, groups=None, control=None, permutations=0, folds=2, jobs=1)
    push = add_direction({HERE: sweep.direction("b", HERE)})
    moved = acts.copy(deep=True)
    gap = float(np.linalg.norm(b.mean(0) - a.mean(0)))
    moved["resid"].values[:, 0, 0] = push.scaled(4 * gap).edit_at(HERE)(
        torch.from_numpy(select(acts, HERE).values)
    )
    assert (sweep.predict(acts, HERE) == "a").any()
    assert (sweep.predict(moved, HERE) == "b").all()


def test_steering_and_replay_agree_and_leave_the_model_alone() -> None:
    model, rng = lc.load(hf_model("gpt2")), np.random.default_rng(0)
    rows = pd.DataFrame({"task": ["a", "b"] * 5})
    prompts = lc.Prompts.from_token_lists(rng.integers(3, D_VOCAB, (10, 6)).tolist(), rows)
    acts = lc.extract(model, prompts, "resid", progress=False)
    site = Site("resid", 1)
    for move in (
        project(mean_states(acts), "a", "b"),
        add_direction(rng.normal(size=D_MODEL)),
    ):
        before = model(prompts.tokens)
        with steer(model, move, at=site, positions="last"):
            steered = model(prompts.tokens)[:, -1]
        moved = move.edit_at(site)(torch.from_numpy(select(acts, site).values))
        replayed = replay(model, prompts, [(site, moved)], lambda logits, rows: logits)[0]
        torch.testing.assert_close(steered, replayed, atol=1e-4, rtol=1e-4)
        assert torch.equal(before, model(prompts.tokens))
        assert not torch.allclose(before[:, -1], steered, atol=1e-3)
