"""Gates move the states of one cluster and leave every other to the bit."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from hypothesis import given, settings, strategies as st
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestCentroid

import lensclust as lc
from lensclust.models.sites import Site
from probes.design.centroids import mean_states
from probes.steering.gating import only_members, only_near
from probes.steering.interventions import Intervention, shift, transport
from probes.steering.steering import steer
from tests.tiny import hf_model

SITE = Site("resid", 0)
# Any move that changes every state: what the gate lets through is what differs.
AWAY = Intervention("away", lambda site: lambda states: states + 1)


def acts(points: np.ndarray, **labels: list[str]) -> xr.Dataset:
    coords = {name: ("prompt", values) for name, values in labels.items()}
    return xr.Dataset(
        {"resid": (("prompt", "position", "layer", "d_model"), points[:, None, None])},
        {**coords, "position": ["answer"], "layer": [0]},
    )


def planted(rng: np.random.Generator, n: int = 6, noise: float = 0.1, d: int = 24) -> xr.Dataset:
    """Three tasks with two inputs each, far apart; ``n`` states of each."""
    labels = [(task, x) for task in "abc" for x in "xy" for _ in range(n)]
    centers = {pair: 4 * rng.normal(size=d) for pair in sorted(set(labels))}
    points = np.stack([centers[pair] + noise * rng.normal(size=d) for pair in labels])
    return acts(
        points.astype(np.float32), task=[a for a, _ in labels], input=[x for _, x in labels]
    )


def moved(gate: Intervention, states: np.ndarray) -> np.ndarray:
    before = torch.from_numpy(states)
    after = gate.edit_at(SITE)(before)
    rows = (after != before).any(1)
    assert torch.equal(after[~rows], before[~rows])
    assert torch.equal(after[rows], before[rows] + 1)
    return rows.numpy()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), n_labels=st.integers(2, 6), d=st.integers(2, 12))
def test_members_are_those_of_the_nearest_centroid(seed, n_labels, d):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(5 * n_labels, d)).astype(np.float32)
    labels = [f"t{i % n_labels}" for i in range(len(points))]
    gate = only_members(AWAY, mean_states(acts(points, task=labels)), "t1")
    new = rng.normal(size=(40, d)).astype(np.float32)
    expected = NearestCentroid().fit(points, labels).predict(new) == "t1"
    assert (moved(gate, new) == expected).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_members_given_a_condition_are_nearest_to_any_mean_of_their_label(seed):
    rng = np.random.default_rng(seed)
    known = planted(rng, noise=6)
    # A pair that was never seen has no mean, and attracts nothing.
    known = known.isel(prompt=np.flatnonzero((known.task != "b") | (known.input != "y")))
    means = mean_states(known, given="input")
    new = 4 * rng.normal(size=(40, 24)).astype(np.float32)
    points = known.resid.values[:, 0, 0].astype(np.float64)
    cells = [f"{a}{x}" for a, x in zip(known.task.values, known.input.values, strict=True)]
    names = sorted(set(cells))
    centers = np.stack([points[[c == name for c in cells]].mean(0) for name in names])
    owner = np.array(names)[cdist(new, centers).argmin(1)]
    gate = only_members(AWAY, means, "a", given="input")
    assert (moved(gate, new) == [name[0] == "a" for name in owner]).all()


def test_a_gated_shift_of_planted_clusters_moves_its_own_only():
    rng = np.random.default_rng(0)
    known = planted(rng)
    task = known.task.values
    for gate in (
        only_members(AWAY, mean_states(known), "a"),
        only_members(AWAY, mean_states(known, given="input"), "a", given="input"),
        # Knows nothing of c, which lies as far away as b does.
        only_near(AWAY, known.isel(prompt=np.flatnonzero(task != "c")), "a", "b", given="input"),
    ):
        assert (moved(gate, known.resid.values[:, 0, 0]) == (task == "a")).all()


@pytest.mark.parametrize("n", [1, 2, 8])
def test_a_gate_of_few_examples_holds_for_new_states(n):
    # Noise as large as in states of real prompts: usual distances are much larger than 0.
    rng = np.random.default_rng(1)
    every = planted(rng, n=40, noise=1.0)
    nth = np.tile(np.arange(40), 6)
    task = every.task.values
    examples = every.isel(prompt=np.flatnonzero((nth < n) & (task != "c")))
    gate = only_near(AWAY, examples, "a", "b", given="input")
    new = every.isel(prompt=np.flatnonzero(nth >= 8))
    found = moved(gate, new.resid.values[:, 0, 0])
    assert found[new.task.values == "a"].mean() > 0.95
    assert found[new.task.values != "a"].mean() < 0.05


def test_in_noise_a_gate_of_members_is_no_better_than_chance():
    rng = np.random.default_rng(2)
    points = rng.normal(size=(300, 16)).astype(np.float32)
    labels = [f"t{i}" for i in rng.integers(3, size=300)]
    gate = only_members(AWAY, mean_states(acts(points, task=labels)), "t0")
    new = rng.normal(size=(3000, 16)).astype(np.float32)
    owner = rng.integers(3, size=3000)
    found = moved(gate, new)
    assert abs(found[owner == 0].mean() - found[owner != 0].mean()) < 0.08


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_rotated_space_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    known = planted(rng, n=3, noise=1.0)
    turn = np.linalg.qr(rng.normal(size=(24, 24)))[0].astype(np.float32)
    turned = known.assign(resid=(known.resid.dims, known.resid.values @ turn))
    new = (known.resid.values[:, 0, 0] + rng.normal(size=(18, 24))).astype(np.float32)
    for make in (
        lambda a: only_members(AWAY, mean_states(a, given="input"), "a", given="input"),
        lambda a: only_near(AWAY, a, "a", "b", given="input"),
    ):
        assert (moved(make(known), new) == moved(make(turned), new @ turn)).all()


def test_a_gate_leaves_lengths_to_the_move_and_twins_follow_it():
    known = planted(np.random.default_rng(3))
    means = mean_states(known, given="input")
    gate = only_members(transport(means, "a", "b"), means, "a", given="input")
    states = torch.from_numpy(known.resid.values[:, 0, 0])
    torch.testing.assert_close(gate.random_twin().size(states, SITE), gate.size(states, SITE))
    assert gate.name == "transport, members"
    torch.testing.assert_close(gate.scaled(0.5).size(states, SITE), gate.size(states, SITE) / 2)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_a_steered_model_is_left_as_it_was(error):
    model = lc.load(hf_model("llama"))
    rows = {"task": ["a", "b", "a", "b"]}
    tokens = torch.randint(3, 60, (4, 6), generator=torch.Generator().manual_seed(0))
    prompts = lc.Prompts.from_token_lists(tokens.tolist(), pd.DataFrame(rows))
    means = mean_states(lc.extract(model, prompts, "resid"))
    gate = only_members(shift(means, "a", "b"), means, "a")
    before, weights = model(tokens), lc.fingerprint(model)
    with (
        pytest.raises(error) if error else nullcontext(),
        steer(model, gate, at="resid 2", positions="last"),
    ):
        assert not torch.equal(model(tokens), before)
        if error:
            raise error
    assert torch.equal(model(tokens), before)
    assert lc.fingerprint(model) == weights
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda a: only_members(AWAY, mean_states(a), "z"), "task 'z' is not in these centroids"),
        (lambda a: only_members(AWAY, mean_states(a), "a", given="input"), "not by 'input'"),
        (lambda a: only_members(AWAY, mean_states(a.isel(prompt=[0])), "a"), "the only label"),
        (lambda a: only_near(AWAY, a, "a", "z"), "task 'z' is not in these activations"),
        (lambda a: only_near(AWAY, a, "a", "a"), "task 'a' given twice"),
        (
            lambda a: only_members(AWAY, mean_states(a, given="input"), "a").edit_at(SITE),
            "expected by",
        ),
        (
            lambda a: only_members(AWAY, mean_states(a), "a").edit_at(Site("resid", 7)),
            "'resid 7' is not in these",
        ),
        (
            lambda a: only_near(AWAY, a, "a", "b").edit_at(Site("resid", 7)),
            "'resid 7' is not in these",
        ),
    ],
)
def test_unusable_gates_are_one_clear_line(make, message):
    with pytest.raises(lc.InputError, match=message):
        make(planted(np.random.default_rng(0)))
