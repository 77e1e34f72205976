"""Decoding with and without demonstrations: scikit-learn's folds by hand, planted change, noise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import RidgeClassifier

import lensclust as lc
from probes import decode
from probes.design.folds import design
from tests.calibration.layouts import LAYOUTS, states
from tests.probes.similarity.test_rdm_alignment import planted


def test_accuracies_equal_ridge_classifiers_of_scikit_learn():
    sides = [planted(activity=strength, seed=1) for strength in (0.3, 0.8)]
    found = decode(*sides, target="activity", groups="name", penalty=0.01, folds=3)
    plan = design(sides[0], target="activity", groups="name", control=None, folds=3, permutations=0)
    labels = sides[0].activity.values
    for condition, acts in zip(("without", "with"), sides, strict=True):
        x, right = acts.resid.values[:, 0, 0], np.zeros(len(labels), dtype=bool)
        for fold in range(3):
            test = plan.fold == fold
            train = x[~test]
            # Our penalty is in units of the mean eigenvalue of the training scatter.
            scale = ((train - train.mean(0)) ** 2).sum() / x.shape[1]
            peer = RidgeClassifier(alpha=0.01 * scale).fit(train, labels[~test])
            right[test] = peer.predict(x[test]) == labels[test]
        np.testing.assert_array_equal(found.right.sel(condition=condition, site="resid 0"), right)
        assert found.frame[f"accuracy_{condition}"].item() == right.mean()
    assert found.frame["value"].item() == pytest.approx(
        found.frame["accuracy_with"].item() - found.frame["accuracy_without"].item()
    )


def test_a_planted_change_is_found_and_its_interval_holds_it():
    found = decode(planted(), planted(activity=2.0), target="activity", groups="name", folds=3)
    row = found.frame.iloc[0]
    assert row["ci_low"] > 0.3
    assert row["p"] < 0.1  # six items: two of 64 exchanges do as well
    assert "resid 0" in repr(found)


def test_states_of_one_strength_change_as_often_as_stated():
    frames = [
        decode(
            planted(activity=0.5, seed=seed),
            planted(activity=0.5, seed=1000 + seed),
            target="activity",
            groups="name",
            folds=3,
            resamples=199,
            seed=seed,
        ).frame
        for seed in range(150)
    ]
    p = np.array([frame["p"].item() for frame in frames])
    for level in (0.05, 0.2):
        assert (p <= level).sum() <= stats.binom.ppf(0.999, len(p), level)


def test_wordings_that_are_alike_are_no_evidence():
    """Without relabelled probes, noise of whole wordings is called a change in 9 % of draws."""
    layout, found = LAYOUTS["repeated inputs"], []
    for seed in range(60):
        sides = [states(layout, task=0, seed=[seed, side]) for side in range(2)]
        options = {"target": "task", "groups": "template", "folds": 3, "resamples": 99}
        alone, both = (decode(*sides, **options, permutations=n, seed=seed).frame for n in (0, 99))
        assert both["p"].item() >= alone["p"].item()
        found.append(both["p"].item())
    assert (np.array(found) <= 0.05).sum() <= stats.binom.ppf(0.999, len(found), 0.05)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda a: a.isel(prompt=slice(5)), {}, "36 prompts without and 5 with"),
        (lambda a: a.isel(prompt=slice(None, None, -1)), {}, "prompt 0 has activity='a0' on one"),
        (lambda a: a.assign_coords(layer=[1]), {}, "hold other sites"),
        (lambda a: a, {"kind": "logistic"}, "kind 'logistic' is not known"),
        (lambda a: a, {"resamples": 1}, "resamples=1"),
        (lambda a: a, {"folds": 99}, "folds=99"),
    ],
)
def test_wrong_options_are_one_clear_line(change, options, message):
    acts = planted()
    with pytest.raises(lc.InputError, match=message):
        decode(acts, change(acts), target="activity", groups="name", **options)
