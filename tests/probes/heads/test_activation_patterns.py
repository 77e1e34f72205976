"""Concentration and similarity of patterns against scipy, definitions, and what must hold."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings, strategies as st
from scipy import stats

import lensclust as lc
from lensclust.errors import InputError
from probes.heads.activation import HeadActivation, head_activation
from probes.heads.pattern_changes import change


def patterns(n: int = 30, blocks: int = 4, heads: int = 3, seed: int = 0) -> HeadActivation:
    """Prompts whose signed numbers scatter around those of a pattern of their own task."""
    rng = np.random.default_rng(seed)
    middle = rng.gamma(1.0, size=(2, blocks, heads))
    task = np.arange(n) % 2
    signed = (middle[task] + 0.3 * rng.standard_normal((n, blocks, heads))) * 0.01
    coords = {
        "block": np.arange(blocks),
        "head": np.arange(heads),
        "task": ("prompt", np.array(["add", "copy"], dtype=object)[task]),
        "size": ("prompt", np.arange(n)),
    }
    data = {"signed": (("prompt", "block", "head"), signed), "loss": ("prompt", np.ones(n))}
    return HeadActivation(xr.Dataset(data, coords))


def test_concentration_is_that_of_scipy_and_of_the_definitions() -> None:
    found = patterns()
    pattern = np.abs(found.signed.values).mean(0).ravel()
    apart = np.abs(pattern[:, None] - pattern).mean()
    expected = {
        "gini": apart / (2 * pattern.mean()),
        "cv": pattern.std() / pattern.mean(),
        "kurtosis": stats.kurtosis(pattern) + 3,
    }
    table = found.concentration().set_index("metric")
    for metric, value in expected.items():
        assert table.loc[metric, "value"] == pytest.approx(value)
        assert table.loc[metric, "ci_low"] < value < table.loc[metric, "ci_high"]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), factor=st.floats(1e-3, 1e3))
def test_concentration_and_correlations_know_no_unit_and_no_order(seed: int, factor: float) -> None:
    found = patterns(seed=seed)
    order = np.random.default_rng(seed).permutation(12)
    signed = found.signed.values.reshape(30, -1)[:, order].reshape(30, 4, 3)
    dealt = HeadActivation(found.data.assign(signed=(found.signed.dims, -factor * signed)))
    columns = ["value", "ci_low", "ci_high"]
    np.testing.assert_allclose(
        dealt.concentration(resamples=20)[columns],
        found.concentration(resamples=20)[columns],
        rtol=1e-6,
    )
    scaled = HeadActivation(found.data.assign(signed=factor * found.signed))
    same = found.similarity(scaled)
    assert same["pearson"] == pytest.approx(1)
    assert same["spearman"] == pytest.approx(1)
    difference = (1 - factor) * found.pattern.values
    assert same["mse"] == pytest.approx(float((difference**2).mean()), rel=1e-9, abs=1e-15)


def test_intervals_of_concentration_hold_what_many_prompts_show() -> None:
    """The interval is for the pattern that as many prompts give, noise included."""
    rng = np.random.default_rng(0)
    middle = rng.gamma(2.0, size=(6, 4)) + 1
    held = 0
    for seed in range(40):
        some = patterns(200, 6, 4, seed=seed)
        noise = np.random.default_rng(seed).standard_normal((200, 6, 4))
        found = HeadActivation(some.data.assign(signed=(some.signed.dims, middle + 0.5 * noise)))
        row = found.concentration(resamples=200).set_index("metric").loc["cv"]
        held += bool(row["ci_low"] < middle.std() / middle.mean() < row["ci_high"])
    # 38 of 40 are expected; fewer than 32 has a probability below 1 in 10,000.
    assert held >= 32


def test_similarity_is_symmetric_and_tells_tasks_apart() -> None:
    found = patterns(60)
    add, copy = found.where(task="add"), found.where(task=["copy"])
    halves = [add.take(range(0, 30, 2)), add.take(range(1, 30, 2))]
    assert add.similarity(copy).to_dict() == pytest.approx(copy.similarity(add).to_dict())
    assert halves[0].similarity(halves[1])["pearson"] > add.similarity(copy)["pearson"]
    assert halves[0].similarity(halves[1])["mse"] < add.similarity(copy)["mse"]
    assert np.isnan(add.similarity(_flat(add))["pearson"])


def test_prompts_are_taken_by_label_and_by_number() -> None:
    found = patterns()
    assert found.where(task="copy").data["size"].values.tolist() == list(range(1, 30, 2))
    assert found.where(task="copy", size=[1, 2, 3]).data["size"].values.tolist() == [1, 3]
    assert found.take([4, 0]).data["size"].values.tolist() == [4, 0]
    np.testing.assert_array_equal(found.take([4]).pattern, abs(found.signed[4]))


def test_the_frame_holds_means_and_intervals_over_prompts() -> None:
    found = patterns()
    values = np.abs(found.signed.values)
    interval = stats.t.interval(0.95, 29, values.mean(0), stats.sem(values, axis=0))
    frame = found.frame
    assert frame["site"].tolist()[:4] == ["head 0.0", "head 0.1", "head 0.2", "head 1.0"]
    np.testing.assert_allclose(frame["value"], values.mean(0).ravel())
    np.testing.assert_allclose(frame[["ci_low", "ci_high"]].T, np.reshape(interval, (2, -1)))
    single = found.take([0])
    assert single.frame["ci_low"].isna().all()
    assert single.concentration()["ci_low"].isna().all()
    assert found.plot().to_dict()["layer"][0]["mark"]["type"] == "rect"
    assert "4 blocks x 3 heads" in repr(found)


def test_a_series_is_as_far_from_its_ends_as_their_patterns_are() -> None:
    prompts = lc.tasks.sif().where(split="new_string").take(range(6))
    models = {step: lc.load("native:sif-small", seed=step) for step in (0, 3, 7)}
    found = change(models.items(), prompts)
    measured = {step: head_activation(model, prompts) for step, model in models.items()}
    again = change(measured.items())
    np.testing.assert_array_equal(again.frame["value"], found.frame["value"])
    table = found.frame.set_index(["metric", "reference", "step"])["value"]
    between = measured[3].similarity(measured[7])
    assert table["mse", "last", 3] == pytest.approx(between["mse"])
    assert table["1 - pearson", "last", 3] == pytest.approx(1 - between["pearson"])
    for metric in ("mse", "1 - pearson"):
        assert table[metric, "first", 0] == table[metric, "last", 7] == 0
        assert table[metric, "first", 7] == table[metric, "last", 0] > 0
    assert found.frame.query("reference == 'first' and step == 7")["share"].tolist() == [1, 1]
    assert "layer" in found.plot().to_dict()


def test_wrong_input_is_one_clear_line() -> None:
    found, other = patterns(), patterns(heads=2)
    model = lc.load("native:sif-small")
    for attempt, message in [
        (lambda: found.where(tasks="add"), "no label 'tasks': prompts have"),
        (lambda: found.where(block=1), "no label 'block'"),
        (lambda: found.where(task="divide"), "no prompt taken"),
        (lambda: found.take([]), "no prompt taken"),
        (lambda: found.similarity(other), r"\(4, 3\) and \(4, 2\) blocks and heads"),
        (lambda: found.concentration(resamples=0), "resamples of at least 1"),
        (lambda: found.concentration(confidence=1.0), "a confidence between 0 and 1"),
        (lambda: _flat(found, 0).concentration(), "the pattern is 0"),
        (lambda: change([(0, found)]), "1 steps, expected at least 2"),
        (lambda: change([(0, found), (0, found)]), "step 0 comes twice"),
        (lambda: change([(0, model)]), "no prompts to measure them by"),
        (lambda: change([(0, found), (1, found)]).plot("r2"), "metric 'r2' is not known"),
    ]:
        with pytest.raises(InputError, match=message) as raised:
            attempt()
        assert "\n" not in str(raised.value)


def _flat(found: HeadActivation, value: float = 1.0) -> HeadActivation:
    return HeadActivation(found.data.assign(signed=value * xr.ones_like(found.signed)))
