"""Erasure: after it no linear classifier can tell, which equal class means prove."""

from __future__ import annotations

import logging
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from concept_erasure import LeaceEraser
from hypothesis import given, settings, strategies as st
from sklearn.linear_model import LinearRegression, LogisticRegression

import lensclust as lc
from lensclust.models.sites import Site
from probes.steering.erasure import erase, erase_random, erase_reassigned

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
    edit = erase_random(acts, given=condition, matched="dimensions").edit_at(SITE)
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
    control = erase_random(noise, matched="dimensions").edit_at(SITE)(x)
    assert lost < 1.5 * (control - x).norm() / x.norm()


def of(
    values: np.ndarray, task: np.ndarray, source: np.ndarray | None = None, **labels: np.ndarray
) -> xr.Dataset:
    """States ``(prompt, d)`` with their labels, as they would be stored."""
    labels = {"task": task, **labels} | ({} if source is None else {"input": source})
    return xr.Dataset(
        {"resid": (("prompt", "position", "layer", "d_model"), values[:, None, None])},
        {"layer": [0], "position": ["answer"]}
        | {name: ("prompt", column.astype(str)) for name, column in labels.items()},
    )


def removed(before: torch.Tensor, after: torch.Tensor) -> float:
    """Mean squared distance by which states are moved, over their variance."""
    total = (before - before.mean(0)).square().sum()
    return float((after - before).square().sum() / total)


def lost(before: torch.Tensor, after: torch.Tensor) -> float:
    """Share of the total variance that is gone."""
    return 1 - float(after.var(0).sum() / before.var(0).sum())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 9999),
    n=st.integers(20, 90),
    d=st.integers(4, 40),
    tasks=st.integers(2, 5),
    inputs=st.integers(1, 3),
    steep=st.floats(0, 2),
    signal=st.floats(0, 3),
    shrinkage=st.booleans(),
)
def test_the_control_removes_as_much_variance_in_every_condition(
    seed: int,
    n: int,
    d: int,
    tasks: int,
    inputs: int,
    steep: float,
    signal: float,
    shrinkage: bool,
) -> None:
    rng = np.random.default_rng(seed)
    task, source = rng.integers(0, tasks, n), rng.integers(0, inputs, n)
    values = rng.normal(size=(n, d)) * np.exp(steep * rng.normal(size=d))
    values += signal * rng.normal(size=(tasks, d))[task]
    # So far apart that every state is nearest to its own condition's mean.
    values += 1e4 * np.eye(d)[source]
    acts = of(values, task, source)
    options: dict[str, Any] = {"given": "input", "shrinkage": shrinkage}
    x = states_of(acts)
    erased = erase(acts, **options).edit_at(SITE)(x)
    edit = erase_random(acts, **options, seed=seed).edit_at(SITE)
    control = edit(x)
    torch.testing.assert_close(edit(control), control)
    for value in range(inputs):
        here = source == value
        if len(np.unique(task[here])) < 2:
            assert torch.equal(control[here], x[here])
            continue
        share = removed(x[here], erased[here])
        assert removed(x[here], control[here]) == pytest.approx(share, abs=1e-5)
        assert lost(x[here], control[here]) == pytest.approx(share, abs=1e-5)
        if not shrinkage:
            assert lost(x[here], erased[here]) == pytest.approx(share, abs=1e-5)
            # What moves has no fewer dimensions.
            ranks = [
                np.linalg.matrix_rank((each - x)[here].numpy(), tol=1e-6)
                for each in (control, erased)
            ]
            assert ranks[0] >= ranks[1]


@pytest.mark.parametrize("shrinkage", [True, False])
def test_conditions_that_overlap_are_matched_on_the_rows_that_each_edit_changes(shrinkage):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        task, source = rng.integers(0, 3, 90), rng.integers(0, 3, 90)
        values = rng.normal(size=(90, 12)) + 2 * rng.normal(size=(3, 12))[task]
        acts = of(values + rng.normal(size=(3, 12))[source], task, source)
        x = states_of(acts)
        means = torch.stack([x[source == value].mean(0) for value in range(3)])
        nearest = torch.cdist(x, means).argmin(1).numpy()
        assert (nearest != source).any()
        options: dict[str, Any] = {"given": "input", "shrinkage": shrinkage}
        moved = [
            (make(acts, **options).edit_at(SITE)(x) - x).square().sum(1).numpy()
            for make in (erase, erase_random)
        ]
        for value in range(3):
            erased, control = (each[nearest == value].sum() for each in moved)
            assert control == pytest.approx(erased, rel=1e-4)


def accuracy(values: torch.Tensor, labels: np.ndarray, train: np.ndarray) -> float:
    """Of a linear read-out, on rows that it was not fitted on."""
    x = values.numpy()
    scaled = (x - x[train].mean(0)) / x[train].std()
    reader = LogisticRegression(C=100, max_iter=5000).fit(scaled[train], labels[train])
    return float(reader.score(scaled[~train], labels[~train]))


def worded(*, wordings: int = 4, rows: int = 12, d: int = 32, seed: int = 0) -> xr.Dataset:
    """Tasks told apart in every state, and wordings of each task as well."""
    rng = np.random.default_rng(seed)
    task, wording, _ = (a.ravel() for a in np.mgrid[:TASKS, :wordings, :rows])
    values = rng.normal(size=(len(task), d))
    values += 2 * rng.normal(size=(TASKS, d))[task]
    values += 1 * rng.normal(size=(TASKS, wordings, d))[task, wording]
    return of(values, task, template=task * wordings + wording)


def test_erasing_the_label_breaks_a_linear_read_out_and_neither_control_does():
    """The model of a task that is read linearly: the label, not the variance, carries it."""
    acts = worded()
    x, labels = states_of(acts), acts.task.values
    train = np.random.default_rng(1).random(len(x)) < 0.5
    erased = erase(acts).edit_at(SITE)(x)
    assert removed(x, erased) > 0.3  # far more than 3 of 32 dimensions hold on average
    assert accuracy(x, labels, train) > 0.95
    assert accuracy(erased, labels, train) < 1 / TASKS + 0.1
    for seed in range(5):
        control = erase_random(acts, seed=seed).edit_at(SITE)(x)
        assert accuracy(control, labels, train) > 0.8
        reassigned = erase_reassigned(acts, seed=seed).edit_at(SITE)(x)
        assert accuracy(reassigned, labels, train) > 0.8
    few = erase_random(acts, matched="dimensions").edit_at(SITE)(x)
    assert removed(x, few) < 0.5 * removed(x, erased)


def gap_over_control(acts: xr.Dataset, read: np.ndarray, matched: str, seed: int) -> float:
    """Accuracy of a fixed read-out after the control less that after the erasure."""
    x = states_of(acts)
    reader = LogisticRegression(C=1, max_iter=3000).fit(x.numpy(), read)
    left = [
        reader.score(way.edit_at(SITE)(x).numpy(), read)
        for way in (erase(acts), erase_random(acts, matched=matched, seed=seed))
    ]
    return left[1] - left[0]


def test_what_is_read_beside_the_label_is_no_effect_of_it_once_variance_is_matched():
    """Two independent labels in one loud subspace of 8 of 64 dimensions, and one of them erased.

    A read-out of the other suffers for the variance alone: random dimensions find an effect of
    the label there, as much variance finds none, and finds one where the label itself is read.
    """
    gaps: dict[str, list[float]] = {"dimensions": [], "variance": [], "label": []}
    for seed in range(12):
        rng = np.random.default_rng(seed)
        task, other = rng.integers(0, 6, 480), rng.integers(0, 4, 480)
        loud = np.linalg.qr(rng.normal(size=(64, 64)))[0][:8]
        codes = rng.normal(size=(6, 8))[task] + rng.normal(size=(4, 8))[other]
        acts = of(0.5 * rng.normal(size=(480, 64)) + 2 * codes @ loud, task)
        for matched in ("dimensions", "variance"):
            gaps[matched].append(gap_over_control(acts, other, matched, seed))
        gaps["label"].append(gap_over_control(acts, task, "variance", seed))
    assert np.mean(gaps["dimensions"]) > 0.01
    assert np.mean(gaps["variance"]) < 0
    assert np.mean(gaps["label"]) > 0.5


def test_a_share_that_no_projection_holds_is_refused():
    """In two dimensions of unlike variance a shrunk erasure may fall between what two hold."""
    for seed in range(999):
        rng = np.random.default_rng(seed)
        task = np.tile([0, 1], 6)
        acts = of(rng.normal(size=(12, 2)) * [1, 0.7] + task[:, None], task)
        x = states_of(acts)
        share = removed(x, erase(acts).edit_at(SITE)(x))
        variances = np.linalg.eigvalsh(np.cov(x.numpy().T))
        largest = variances[1] / variances.sum()
        edit = erase_random(acts).edit_at
        if not largest + 1e-3 < share < 1 - 1e-3:
            assert removed(x, edit(SITE)(x)) == pytest.approx(share, abs=1e-5)
            continue
        with pytest.raises(lc.InputError, match="which no random projection can match there"):
            edit(SITE)
        return
    raise AssertionError("no such case was found")


def shrunk(x: np.ndarray) -> np.ndarray:
    """Optimal linear shrinkage of a covariance matrix (Bodnar, Gupta & Parolya 2014, eq. 4.5)."""
    n, p = x.shape
    s = np.cov(x.T, bias=True)
    target = np.eye(p) * np.trace(s) / p
    norm, inner = np.sum(target**2), np.sum(s * target)
    alpha = 1 - np.trace(s) ** 2 * norm / n / (np.sum(s**2) * norm - inner**2)
    return alpha * s + (1 - alpha) * inner / norm * target


@pytest.mark.parametrize("shrinkage", [True, False])
def test_erasure_is_its_formula_with_and_without_shrinkage(shrinkage):
    acts = planted()
    acts = acts.isel(prompt=np.flatnonzero(acts.input == "0")[::2])
    x, labels = states_of(acts).numpy(), acts.task.values
    centred = x - x.mean(0)
    sigma = shrunk(x) if shrinkage else np.cov(x.T)
    variances, vectors = np.linalg.eigh(sigma)
    whiten = vectors / np.sqrt(variances) @ vectors.T
    one_hot = (labels[:, None] == np.unique(labels)).astype(float)
    basis = np.linalg.svd(whiten @ centred.T @ (one_hot - one_hot.mean(0)))[0][:, : TASKS - 1]
    expected = x - centred @ whiten @ basis @ basis.T @ np.linalg.inv(whiten)
    after = erase(acts, shrinkage=shrinkage).edit_at(SITE)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(after, expected, atol=1e-8)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), shrinkage=st.booleans())
def test_least_squares_is_at_chance_exactly_either_way(seed: int, shrinkage: bool) -> None:
    acts = planted(seed=seed)
    x = states_of(acts)
    one_hot = (acts.task.values[:, None] == np.unique(acts.task)).astype(float)
    after = erase(acts, shrinkage=shrinkage).edit_at(SITE)(x).numpy()
    for values, low, high in ((x.numpy(), 0.05, 1.0), (after, -1e-12, 1e-12)):
        # The erased directions are empty, and least squares may not make them up again.
        kept = np.linalg.svd(values - values.mean(0), full_matrices=False)
        scores = kept[0][:, kept[1] > 1e-6 * kept[1][0]]
        assert low <= LinearRegression().fit(scores, one_hot).score(scores, one_hot) <= high


def test_shrinkage_changes_how_far_states_move_and_not_what_is_left_to_read():
    """45 rows in 40 dimensions: without it new states move further, and for nothing."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        task = np.tile([0, 1], 400)
        values = rng.normal(size=(800, 40)) + 1.5 * rng.normal(size=(2, 40))[task]
        acts, new = of(values[:45], task[:45]), torch.from_numpy(values[45:])
        x = states_of(acts)
        edits = [erase(acts, shrinkage=each).edit_at(SITE) for each in (True, False)]
        shrunk_here, plain_here = (removed(x, edit(x)) for edit in edits)
        assert shrunk_here > plain_here
        after = [edit(new) for edit in edits]
        shrunk_new, plain_new = (removed(new, each) for each in after)
        assert shrunk_new < plain_new
        left = [LinearRegression().fit(each, task[45:]).score(each, task[45:]) for each in after]
        assert left[0] == pytest.approx(left[1], abs=1e-6)


def leace_of(labels: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    _, code = np.unique(labels, return_inverse=True)
    return LeaceEraser.fit(x, torch.nn.functional.one_hot(torch.from_numpy(code)).double())(x)


def test_whole_wordings_are_reassigned_where_each_has_one_label(caplog):
    """Two tasks of two wordings each: beside the truth there are two ways to pair them."""
    acts = worded(wordings=2)
    acts = acts.isel(prompt=np.flatnonzero(np.isin(acts.task, ["0", "1"])))
    x, wording = states_of(acts), acts.template.values
    ways = {
        pair: leace_of(np.isin(wording, pair), x) for pair in combinations(np.unique(wording), 2)
    }
    truth = erase(acts).edit_at(SITE)(x)
    others = [each for pair, each in ways.items() if "0" in pair and pair != ("0", "1")]
    torch.testing.assert_close(ways["0", "1"], truth)
    met = set()
    for seed in range(8):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = erase_reassigned(acts, seed=seed).edit_at(SITE)(x)
        # The few relabellings that there are do not pass unnoticed.
        assert "3 distinct relabellings by exchanging template" in caplog.text
        met |= {n for n, each in enumerate(others) if torch.allclose(found, each)}
        assert any(torch.allclose(found, each) for each in others)
    assert met == {0, 1}


def test_names_trade_within_wordings_where_each_has_several_labels():
    rng = np.random.default_rng(0)
    task, wording, _ = (a.ravel() for a in np.mgrid[:2, :2, :20])
    acts = of(rng.normal(size=(80, 6)) + 2 * task[:, None], task, template=wording)
    x = states_of(acts)
    swapped = np.where(wording == 1, 1 - task, task)
    torch.testing.assert_close(
        erase_reassigned(acts).edit_at(SITE)(x), leace_of(swapped, x), rtol=1e-9, atol=1e-9
    )
    # Single rows, where someone says that they are exchangeable.
    rows = erase_reassigned(acts, units="rows").edit_at(SITE)(x)
    assert not torch.allclose(rows, leace_of(swapped, x))


def test_one_relabelling_serves_all_inputs():
    rng = np.random.default_rng(0)
    task, wording, source, _ = (a.ravel() for a in np.mgrid[:2, :2, :3, :20])
    wording = 2 * task + wording
    values = rng.normal(size=(len(task), 8)) + 100 * np.eye(8)[source]
    values += rng.normal(size=(4, 3, 8))[wording, source]
    acts = of(values, task, source, template=wording)
    found = erase_reassigned(acts, given="input").edit_at(SITE)(states_of(acts))
    ways = []
    for pair in ((0, 2), (0, 3)):
        expected = states_of(acts).clone()
        for value in range(3):
            here = source == value
            expected[here] = leace_of(np.isin(wording, pair)[here], states_of(acts)[here])
        ways.append(bool(torch.allclose(found, expected)))
    assert sum(ways) == 1


def test_without_another_labelling_there_is_no_such_control():
    acts = worded(wordings=1)
    with pytest.raises(lc.InputError, match="gives no labelling of 'task' but the true one"):
        erase_reassigned(acts)
    assert erase_reassigned(acts, units="rows").name == "erase, reassigned labels"


def test_rows_without_a_label_are_left_out_of_the_relabelling_too():
    acts = worded(wordings=2)
    units = acts.template.values.copy()
    gone = acts.task.values.astype(object)
    gone[:5] = None
    short = acts.isel(prompt=slice(5, None))
    found, expected = (
        erase_reassigned(each, units=column).edit_at(SITE)(states_of(acts))
        for each, column in (
            (acts.assign_coords(task=("prompt", gone)), units),
            (short, units[5:]),
        )
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("make", [erase, erase_random, erase_reassigned])
def test_one_label_or_one_row_in_a_condition_leaves_it_as_it_is(make):
    acts = planted()
    inputs, tasks = acts.input.values.copy(), acts.task.values.copy()
    tasks[inputs == "0"] = "0"
    inputs[-1] = "alone"
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
    for make in (erase, erase_random, erase_reassigned):
        for condition in (None, "input"):
            assert make(acts, given=condition).edit_at(SITE)(x).dtype == dtype
    assert torch.equal(x, kept)


def test_wrong_labels_and_positions_are_one_clear_line():
    two = planted(positions=("answer", "first"))
    with pytest.raises(lc.InputError, match="matched='rank', expected one of"):
        erase_random(two, matched="rank")
    for make in (erase, erase_random, erase_reassigned):
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
