"""Linear maps against scikit-learn and scipy, and against what was planted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from hypothesis import given, settings, strategies as st
from scipy.linalg import inv, sqrtm
from scipy.stats import ortho_group
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import Ridge

import lensclust as lc
from lensclust.activations.dataset import select
from lensclust.models.sites import Site
from probes.design.centroids import mean_states
from probes.steering.interventions import Intervention, shift, transport
from probes.steering.linear_maps import (
    PENALTIES,
    LinearMap,
    gaussian_map,
    linear_transport,
    ridge_map,
)
from probes.steering.steering import steer
from tests.tiny import D_VOCAB, hf_model

HERE = Site("resid", 0)
FITS = [{"fit": "ridge"}, {"fit": "ridge", "penalty": None}, {"fit": "gaussian"}]


def dataset(states: np.ndarray, task: np.ndarray, condition: np.ndarray) -> xr.Dataset:
    return xr.Dataset(
        {"resid": (("prompt", "position", "layer", "d_model"), states[:, None, None])},
        {"layer": [0], "position": ["answer"]}
        | {"task": ("prompt", task.astype(str)), "input": ("prompt", condition.astype(str))},
    )


def ragged(seed: int = 0, *, conditions: int = 5, d: int = 6) -> xr.Dataset:
    """Two tasks whose conditions have one to four states; the last condition of each is its own."""
    rng = np.random.default_rng(seed)
    parts = []
    for task, own in (("a", conditions), ("b", conditions + 1)):
        for condition in [*range(conditions), own]:
            n = int(rng.integers(1, 5))
            parts.append(
                (rng.normal(size=(n, d)) + rng.normal(size=d), [task] * n, [condition] * n)
            )
    states, task, condition = (np.concatenate(part) for part in zip(*parts, strict=True))
    return dataset(states.astype("f4"), task, condition)


def paired(acts: xr.Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Source states, the move of each one's condition, its weight and its condition, by loops."""
    x = acts.resid.values[:, 0, 0].astype(np.float64)
    task, condition = acts.task.values, acts.input.values
    shared = [c for c in np.unique(condition) if {"a", "b"} <= set(task[condition == c])]
    rows, moves, weights, groups = [], [], [], []
    for c in shared:
        a, b = (x[(condition == c) & (task == name)] for name in ("a", "b"))
        rows += list(a)
        moves += [b.mean(0) - a.mean(0)] * len(a)
        weights += [1 / len(a) / len(shared)] * len(a)
        groups += [c] * len(a)
    return np.array(rows), np.array(moves), np.array(weights), np.array(groups)


def mean_eigenvalue(x: np.ndarray, weight: np.ndarray) -> float:
    return float(np.linalg.eigvalsh(np.cov(x.T, aweights=weight, bias=True)).mean())


def fitted(move: Intervention) -> LinearMap:
    found = move.edit_at(HERE)
    assert isinstance(found, LinearMap)
    return found


@pytest.mark.parametrize("d", [3, 40])
@pytest.mark.parametrize("penalty", [1e-3, 1, 50.0])
def test_ridge_is_scikit_learns(penalty: float, d: int) -> None:
    acts = ragged(d=d)
    x, moves, weight, _ = paired(acts)
    alpha = penalty * mean_eigenvalue(x, weight)
    truth = Ridge(alpha=alpha, solver="svd").fit(x, moves, sample_weight=weight)
    new = np.random.default_rng(1).normal(size=(7, d))
    found = fitted(linear_transport(acts, "a", "b", penalty=penalty))(torch.from_numpy(new))
    np.testing.assert_allclose(found.numpy(), new + truth.predict(new), atol=1e-8)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_an_infinite_penalty_is_the_mean_shift(seed: int) -> None:
    acts, states = ragged(seed), torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    found = linear_transport(acts, "a", "b", penalty=float("inf")).edit_at(HERE)(states)
    means = shift(mean_states(acts, given="input"), "a", "b").edit_at(HERE)(states)
    torch.testing.assert_close(found, means, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_the_chosen_penalty_predicts_left_out_conditions_best(seed: int) -> None:
    """Against one scikit-learn fit for every condition left out."""
    x, moves, weight, groups = paired(ragged(seed))
    unit = mean_eigenvalue(x, weight)
    errors = []
    for penalty in PENALTIES:
        error = 0.0
        for group in np.unique(groups):
            seen = groups != group
            ridge = Ridge(alpha=penalty * unit if np.isfinite(penalty) else 1e12, solver="svd")
            predicted = ridge.fit(x[seen], moves[seen], sample_weight=weight[seen]).predict(
                x[~seen]
            )
            error += float((weight[~seen, None] * (predicted - moves[~seen]) ** 2).sum())
        errors.append(error)
    chosen = fitted(linear_transport(ragged(seed), "a", "b", penalty=None)).penalty
    assert chosen == PENALTIES[int(np.argmin(errors))]


def test_two_conditions_leave_the_shift_when_the_penalty_is_chosen() -> None:
    assert np.isinf(fitted(linear_transport(ragged(conditions=2), "a", "b", penalty=None)).penalty)


def planted(seed: int, *, linear: bool, conditions: int = 30, d: int = 4) -> xr.Dataset:
    """Moves that are a linear function of the condition's place, or drawn anew for each."""
    rng = np.random.default_rng(seed)
    place, slope = 3 * rng.normal(size=(conditions, d)), rng.normal(size=(d, d))
    moves = place @ slope if linear else rng.normal(size=(conditions, d))
    codes = np.repeat(np.arange(conditions), 4)
    noise = 0.1 * rng.normal(size=(2, len(codes), d))
    states = np.concatenate([place[codes] + noise[0], (place + moves)[codes] + noise[1]])
    return dataset(states, np.repeat(["a", "b"], len(codes)), np.tile(codes, 2))


def error_on_new_conditions(acts: xr.Dataset, make) -> float:
    """Squared distance from moved new states to their condition's target mean."""
    new = acts.input.values.astype(int) < 10
    known, asked = acts.isel(prompt=~new), acts.isel(prompt=new)
    goal = mean_states(asked, given="input").resid.sel(layer=0, task="b")
    source = asked.isel(prompt=np.flatnonzero(asked.task.values == "a"))
    moved = make(known).edit_at(HERE)(torch.from_numpy(select(source, HERE).values)).numpy()
    return float(((moved - goal.sel(input=source.input).values) ** 2).mean())


@pytest.mark.parametrize("seed", range(3))
def test_a_linear_law_carries_over_to_new_conditions(seed: int) -> None:
    acts = planted(seed, linear=True)
    ridge, nearest, mean = (
        error_on_new_conditions(acts, make)
        for make in (
            lambda known: linear_transport(known, "a", "b", penalty=None),
            lambda known: transport(mean_states(known, given="input"), "a", "b"),
            lambda known: shift(mean_states(known), "a", "b"),
        )
    )
    assert ridge < 0.05 * min(nearest, mean)


def test_where_moves_follow_no_law_the_chosen_penalty_does_as_well_as_the_shift() -> None:
    errors = np.array(
        [
            [
                error_on_new_conditions(
                    planted(seed, linear=False),
                    lambda known, p=penalty: linear_transport(known, "a", "b", penalty=p),
                )
                for penalty in (None, float("inf"), 1e-3)
            ]
            for seed in range(12)
        ]
    ).mean(0)
    assert errors[0] < 1.05 * errors[1] < errors[2]


def whole_map(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The optimal transport matrix between two normal distributions, by matrix square roots."""
    cov_a, cov_b = (LedoitWolf().fit(x).covariance_ for x in (a, b))
    half = np.real(sqrtm(cov_a))
    return inv(half) @ np.real(sqrtm(half @ cov_b @ half)) @ inv(half)


@pytest.mark.parametrize(("n_a", "n_b", "d"), [(200, 90, 5), (7, 9, 40), (12, 60, 20), (3, 3, 8)])
def test_gaussian_is_scipys(n_a: int, n_b: int, d: int) -> None:
    rng = np.random.default_rng(d)
    a = rng.normal(size=(n_a, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)
    b = rng.normal(size=(n_b, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)
    # States that the fit has seen, and others that leave the span of those.
    new = np.concatenate([a[:3], 3 * rng.normal(size=(6, d))])
    truth = b.mean(0) + (new - a.mean(0)) @ whole_map(a, b).T
    found = gaussian_map(a, b)(torch.from_numpy(new)).numpy()
    np.testing.assert_allclose(found, truth, atol=1e-6 * np.abs(truth).max())


def test_gaussian_gives_the_targets_mean_and_covariance() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(20_000, 4)) @ rng.normal(size=(4, 4)) + 5 for _ in range(2))
    moved = gaussian_map(a, b)(torch.from_numpy(a)).numpy()
    np.testing.assert_allclose(moved.mean(0), b.mean(0), atol=1e-9)
    np.testing.assert_allclose(np.cov(moved.T), np.cov(b.T), atol=0.01 * np.cov(b.T).max())


def test_equal_covariances_leave_the_mean_shift() -> None:
    rng = np.random.default_rng(0)
    a, away, new = rng.normal(size=(30, 50)), rng.normal(size=50), rng.normal(size=(4, 50))
    moved = gaussian_map(a, a + away)(torch.from_numpy(new)).numpy()
    np.testing.assert_allclose(moved, new + away, atol=1e-9)


def test_gaussian_where_a_side_does_not_vary() -> None:
    rng = np.random.default_rng(0)
    one, other, cloud = np.full((9, 4), 2.0), np.full((5, 4), 3.0), rng.normal(size=(9, 4))
    shifted = gaussian_map(one, other)(torch.from_numpy(cloud)).numpy()
    np.testing.assert_allclose(shifted, cloud + 1)
    np.testing.assert_allclose(gaussian_map(cloud, one)(torch.from_numpy(cloud)).numpy(), one)
    for source in (one, cloud[:2]):
        with pytest.raises(lc.InputError, match="covariance given is singular"):
            gaussian_map(source, cloud)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(4, 12))
def test_a_rotated_space_gives_the_rotated_map(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    a, b, new = (rng.normal(size=(n, 6)) for _ in range(3))
    codes, turn = np.arange(n) % 4, ortho_group.rvs(6, random_state=seed)
    moves = rng.normal(size=(4, 6))
    for plain, turned in (
        (gaussian_map(a, b), gaussian_map(a @ turn, b @ turn)),
        (ridge_map(a, moves, codes, 0.5), ridge_map(a @ turn, moves @ turn, codes, 0.5)),
    ):
        expected = plain(torch.from_numpy(new)).numpy() @ turn
        np.testing.assert_allclose(
            turned(torch.from_numpy(new @ turn)).numpy(), expected, atol=1e-6
        )


@pytest.mark.parametrize("options", FITS)
@pytest.mark.parametrize("kind", ["resid 2", "head 1.2"])
def test_in_a_running_model(options: dict, kind: str) -> None:
    """The last token's state is what the map makes of it, and the model is left as it was."""
    model, rng = lc.load(hf_model("llama")), np.random.default_rng(0)
    rows = pd.DataFrame({"task": ["a", "b"] * 12, "input": np.repeat(range(4), 6)})
    prompts = lc.Prompts.from_token_lists(rng.integers(3, D_VOCAB, (24, 5)).tolist(), rows)
    acts = lc.extract(model, prompts, kind, progress=False)
    move, site = linear_transport(acts, "a", "b", **options), Site.parse(kind)
    before = model(prompts.tokens)
    seen = []
    spied = steer(model, _spy(seen), at=kind, positions="last")
    with steer(model, move, at=kind, positions="last"), spied:
        after = model(prompts.tokens)
    expected = move.edit_at(site)(torch.from_numpy(select(acts, site).values))
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(before, after)
    assert torch.equal(before, model(prompts.tokens))
    assert move.edit_at(site)(seen[0].bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(
        move.random_twin().size(seen[0], site), move.size(seen[0], site), atol=1e-5, rtol=1e-5
    )


def _spy(seen: list[torch.Tensor]) -> Intervention:
    def edit(states):
        seen.append(states.clone())
        return states

    return Intervention("spy", lambda site: edit)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": "lasso"}, "fit 'lasso' is not known"),
        ({"penalty": 0}, "penalty=0, expected"),
        ({"penalty": float("nan")}, "penalty=nan, expected"),
        ({"by": "topic"}, "label 'topic' is not in these activations"),
        ({"given": "topic"}, "label 'topic' is not in these activations"),
        ({"given": "task"}, "'a' and 'b' share no task"),
        ({"source": "c"}, "task 'c' is not in these activations"),
        ({"source": "b"}, "task 'b' given twice"),
    ],
)
def test_refused_at_the_door(options: dict, message: str) -> None:
    asked: dict[str, Any] = {"source": "a", "target": "b"} | options
    with pytest.raises(lc.InputError, match=message):
        linear_transport(ragged(), **asked)


def test_states_that_are_not_finite_are_refused() -> None:
    acts = ragged()
    acts.resid[0, 0, 0, 0] = np.nan
    with pytest.raises(lc.InputError, match=r"site 'resid 0': .* rows hold NaN or infinity"):
        linear_transport(acts, "a", "b").edit_at(HERE)
