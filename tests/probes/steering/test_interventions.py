"""Moves between planted clusters land where arithmetic says; their controls are as long."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings, strategies as st

import lensclust as lc
from lensclust.models.sites import Site
from probes.design.centroids import mean_states
from probes.steering.interventions import dealt, replace, shift, transport
from tests.tiny import hf_model

TASKS, INPUTS, COPIES, D = 4, 3, 5, 12
LAST = Site("resid", 1)


def grid(*, seed: int = 0, drop: tuple[tuple[str, str], ...] = ()) -> xr.Dataset:
    """Inputs far apart, a task code of its own inside each; cells ``(task, input)`` left out."""
    rng = np.random.default_rng(seed)
    task, source, _ = (a.ravel() for a in np.mgrid[:TASKS, :INPUTS, :COPIES])
    values = rng.normal(size=(len(task), 1, 2, D))
    values += (40 * rng.normal(size=(INPUTS, D)))[source][:, None, None]
    values += (3 * rng.normal(size=(TASKS, INPUTS, D)))[task, source][:, None, None]
    labels = {"task": task.astype(str), "input": source.astype(str)}
    acts = xr.Dataset(
        {"resid": (("prompt", "position", "layer", "d_model"), values.astype("f4"))},
        {"layer": [0, 1], "position": ["answer"]}
        | {name: ("prompt", values) for name, values in labels.items()},
    )
    kept = [cell not in drop for cell in zip(*labels.values(), strict=True)]
    return acts.isel(prompt=np.flatnonzero(kept))


def rows_of(acts: xr.Dataset, task: str, source: str | None = None) -> np.ndarray:
    here = acts.task.values == task
    here &= (acts.input.values == source) if source is not None else True
    return acts.resid.sel(layer=1).values[here, 0].astype("f8")


def some_states(n: int = 200, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def test_shift_adds_the_difference_of_the_means():
    acts, states = grid(), some_states(7)
    moved = shift(mean_states(acts), "0", "2").edit_at(LAST)(states)
    expected = rows_of(acts, "2").mean(0) - rows_of(acts, "0").mean(0)
    np.testing.assert_allclose(moved - states, np.tile(expected, (7, 1)), atol=1e-4)


def test_shift_given_a_condition_averages_over_those_that_both_labels_have():
    acts = grid(drop=(("0", "1"), ("2", "0")))
    moved = shift(mean_states(acts, given="input"), "0", "2").edit_at(LAST)(torch.zeros(1, D))
    expected = rows_of(acts, "2", "2").mean(0) - rows_of(acts, "0", "2").mean(0)
    np.testing.assert_allclose(moved[0], expected, atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 999))
def test_transport_takes_a_mean_to_the_mean_of_the_other_task(seed):
    acts = grid(seed=seed)
    edit = transport(mean_states(acts, given="input"), "1", "3").edit_at(LAST)
    for source in map(str, range(INPUTS)):
        start, stop = (rows_of(acts, task, source).mean(0) for task in "13")
        moved = edit(torch.from_numpy(start[None].astype("f4")))
        np.testing.assert_allclose(moved[0], stop, atol=1e-3)


def test_transport_moves_a_state_by_the_nearest_mean_that_has_both_ends():
    acts = grid(drop=(("1", "0"), ("3", "2")))
    edit = transport(mean_states(acts, given="input"), "1", "3").edit_at(LAST)
    only = rows_of(acts, "3", "1").mean(0) - rows_of(acts, "1", "1").mean(0)
    states = torch.from_numpy(rows_of(acts, "2").astype("f4"))
    np.testing.assert_allclose(edit(states) - states, np.tile(only, (len(states), 1)), atol=1e-4)


def test_transport_does_not_depend_on_the_rows_beside_a_state():
    acts = grid()
    edit = transport(mean_states(acts, given="input"), "0", "1").edit_at(LAST)
    states = torch.from_numpy(rows_of(acts, "0").astype("f4"))
    alone = torch.cat([edit(row[None]) for row in states])
    assert torch.equal(edit(states), alone)


def test_replacing_forgets_the_state():
    acts = grid()
    means = (mean_states(acts), mean_states(acts, given="input"))
    for centroids in means:
        for n in (1, INPUTS, 8):
            moved = replace(centroids, "2").edit_at(LAST)(some_states(n))
            expected = np.tile(rows_of(acts, "2").mean(0), (n, 1))
            np.testing.assert_allclose(moved, expected, atol=1e-4)


@pytest.mark.parametrize("kind", [shift, transport])
def test_a_random_twin_moves_as_far_and_elsewhere(kind):
    move = kind(mean_states(grid(), given="input"), "0", "2")
    states = some_states()
    real = move.edit_at(LAST)(states) - states
    twin = move.random_twin().edit_at(LAST)(states) - states
    torch.testing.assert_close(twin.norm(dim=1), real.norm(dim=1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(move.random_twin().size(states, LAST), move.size(states, LAST))
    cosine = torch.cosine_similarity(real, twin)
    # A random direction's cosine has mean 0 and standard deviation 1 / sqrt(d).
    assert abs(cosine.mean()) < 4 / np.sqrt(D * len(states))
    assert cosine.std() == pytest.approx(1 / np.sqrt(D), rel=0.3)


def test_a_random_twin_is_drawn_by_seed_and_site_and_leaves_the_global_state_alone():
    move = shift(mean_states(grid()), "0", "2")
    states = some_states(6)
    before = torch.random.get_rng_state()
    first = move.random_twin(3).edit_at(LAST)(states)
    assert torch.equal(first, move.random_twin(3).edit_at(LAST)(states))
    assert not torch.allclose(first, move.random_twin(4).edit_at(LAST)(states))
    elsewhere = move.random_twin(3).edit_at(Site("resid", 0))(states) - states
    assert not torch.allclose(
        torch.nn.functional.normalize(first - states), torch.nn.functional.normalize(elsewhere)
    )
    assert torch.equal(before, torch.random.get_rng_state())


@settings(max_examples=10, deadline=None)
@given(st.floats(-3, 3))
def test_scaling_goes_that_much_further(strength):
    move, states = shift(mean_states(grid()), "0", "2"), some_states(5)
    full = move.edit_at(LAST)(states) - states
    scaled = move.scaled(strength).edit_at(LAST)(states) - states
    torch.testing.assert_close(scaled, strength * full, rtol=1e-4, atol=1e-5)


def test_scaled_by_nothing_changes_nothing():
    move, states = transport(mean_states(grid(), given="input"), "0", "2"), some_states(5)
    assert torch.equal(move.scaled(0).edit_at(LAST)(states), states)


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_no_number_is_refused(strength):
    with pytest.raises(lc.InputError, match="expected a number"):
        shift(mean_states(grid()), "0", "2").scaled(strength)


def test_matching_norms_keeps_the_direction():
    centroids = mean_states(grid(), given="input")
    own, other = shift(centroids, "0", "1"), transport(centroids, "0", "2")
    states = some_states()
    matched = own.norm_matched(other).edit_at(LAST)(states) - states
    lengths = (other.edit_at(LAST)(states) - states).norm(dim=1)
    torch.testing.assert_close(matched.norm(dim=1), lengths, rtol=1e-4, atol=1e-4)
    direction = torch.cosine_similarity(matched, own.edit_at(LAST)(states) - states)
    torch.testing.assert_close(direction, torch.ones(len(states)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moves_keep_the_dtype_of_the_states_and_stay_finite(dtype):
    centroids = mean_states(grid(), given="input")
    still = shift(centroids, "0", "1").scaled(0)
    states = some_states(4).to(dtype)
    for move in (
        shift(centroids, "0", "1"),
        transport(centroids, "0", "1"),
        transport(centroids, "0", "1").random_twin(),
        still.norm_matched(shift(centroids, "0", "1")),
        replace(centroids, "1"),
    ):
        moved = move.edit_at(LAST)(states)
        assert moved.dtype == dtype
        assert moved.isfinite().all(), move.name


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 999), st.sampled_from([None, "input"]))
def test_dealing_keeps_the_labels_of_each_condition(seed, condition):
    acts = grid(drop=(("0", "1"),))
    found = dealt(acts, given=condition, seed=seed)
    assert found.drop_vars("task").equals(acts.drop_vars("task"))
    for part in [None] if condition is None else np.unique(acts.input):
        here = slice(None) if part is None else acts.input.values == part
        assert sorted(found.task.values[here]) == sorted(acts.task.values[here])
    assert (found.task.values != acts.task.values).any()
    assert dealt(acts, given=condition, seed=seed).equals(found)


def test_means_of_dealt_labels_lie_close_together():
    acts = grid()
    real, control = (
        mean_states(given, given="input").resid.std("task").mean()
        for given in (acts, dealt(acts, given="input"))
    )
    assert control < real / 1.5


def test_heads_are_moved_in_their_own_coordinates():
    bridge = lc.load(hf_model("gpt2"))
    prompts = lc.tasks.sif(n_tasks=3, n_inputs=4, mappings_per_task=3, strings_per_regex=4)
    acts = lc.extract(bridge, prompts.where(split="train"), "head")
    site, states = Site("head", 1, 2), torch.zeros(1, bridge.cfg.d_head)
    moved = shift(mean_states(acts), "0", "1").edit_at(site)(states)
    z = acts.z.sel(block=1, head=2, position="answer").values
    tasks = acts.task.values.astype(str)
    expected = z[tasks == "1"].mean(0) - z[tasks == "0"].mean(0)
    np.testing.assert_allclose(moved[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: shift(c, "0", "9"), "task '9' is not in these centroids: they have"),
        (lambda c: transport(c, "9", "0"), "task '9' is not in these centroids"),
        (lambda c: replace(c, "9"), "task '9' is not in these centroids"),
        (lambda c: shift(c, "0", "0"), "task '0' given twice"),
        (lambda c: transport(c, "1", "1"), "task '1' given twice"),
        (
            lambda c: shift(c, "0", "1", by="mood"),
            r"'mood' is not .*mean_states\(acts, by='mood'",
        ),
        (
            lambda c: shift(c, "0", "1").edit_at(Site("resid", 7)),
            "site 'resid 7' is not in these centroids",
        ),
        (
            lambda c: replace(c, "1").edit_at(Site("head", 0, 0)),
            "site 'head 0.0' is not in these centroids",
        ),
        (lambda c: transport(c, "0", "1").edit_at(LAST), "'0' and '1' share no input"),
        (lambda c: shift(c, "0", "1").edit_at(LAST), "'0' and '1' share no input"),
        (
            lambda c: transport(c.isel(input=0, drop=True), "0", "1").edit_at(LAST),
            r"label 'input' is not .* mean_states\(acts, given='input'\)",
        ),
    ],
)
def test_wrong_moves_are_one_clear_line(make, message, recwarn):
    apart = (("0", "0"), ("1", "1"), ("1", "2"))
    centroids = mean_states(grid(drop=apart), given="input")
    with pytest.raises(lc.InputError, match=message) as caught:
        make(centroids)
    assert "\n" not in str(caught.value)
    assert not recwarn.list
