"""Probe sweeps: what is planted is found where it was planted, and p means what it says."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy.stats import binomtest, kstest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import NearestCentroid

import lensclust as lc
from lensclust.models.sites import Site
from probes.linear.linear_probe import probe
from probes.linear.moments import SOLVERS
from tests.tiny import hf_model

TASKS, TEMPLATES, INPUTS, D = 4, 10, 3, 8
KINDS = (*SOLVERS, "logistic")


def dataset(states, **labels) -> xr.Dataset:
    """Activations of layers ``(prompt, layer, d)``, with labels."""
    return xr.Dataset(
        {"resid": (("prompt", "position", "layer", "d_model"), states[:, None].astype("f4"))},
        {"layer": range(states.shape[1]), "position": ["answer"]}
        | {name: ("prompt", np.asarray(values).astype(str)) for name, values in labels.items()},
    )


def planted(strength=3.0, *, layers=6, at=4, seed=0) -> xr.Dataset:
    """Noise, the wording in every layer, and the task in one of them."""
    rng = np.random.default_rng(seed)
    task, template, source = (a.ravel() for a in np.mgrid[:TASKS, :TEMPLATES, :INPUTS])
    states = rng.normal(size=(len(task), layers, D))
    states += rng.normal(size=(TEMPLATES, TASKS, layers, D))[template, task]
    states[:, at] += strength * rng.normal(size=(TASKS, D))[task]
    return dataset(states, task=task, template=template, input=source)


def scores(sweep, metric="accuracy") -> pd.DataFrame:
    """Rows by site, of the first penalty."""
    rows = sweep.frame[sweep.frame["metric"] == metric]
    return rows[rows["penalty"].isna() | (rows["penalty"] == sweep.penalty)].set_index("site")


def alpha(x, penalty) -> float:
    return penalty * float(np.square(x - x.mean(0)).sum()) / x.shape[1]


ORACLES = {
    "ridge": lambda x, a: RidgeClassifier(alpha=alpha(x, a)),
    "lda": lambda x, a: LinearDiscriminantAnalysis(solver="eigen", shrinkage=a / (1 + a)),
    "mass_mean": lambda x, a: NearestCentroid(),
    "logistic": lambda x, a: LogisticRegression(C=1 / alpha(x, a), tol=1e-8, max_iter=2000),
}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_scikit_learn_fold_by_fold(kind):
    acts = planted(0.7, layers=2, at=1)
    sweep = probe(acts, kind=kind, penalties=[0.1, 1.0], permutations=0, control=None, jobs=1)
    penalties = [np.nan] if kind == "mass_mean" else [0.1, 1.0]
    assert set(sweep.fold) == set(range(5))
    for layer in range(2):
        x, y = acts.resid.values[:, 0, layer].astype(float), acts.task.values
        for penalty in penalties:
            plain, balanced = [], []
            for fold in range(5):
                train, test = sweep.fold != fold, sweep.fold == fold
                found = ORACLES[kind](x[train], penalty).fit(x[train], y[train]).predict(x[test])
                plain.append(np.mean(found == y[test]))
                balanced.append(balanced_accuracy_score(y[test], found))
            rows = sweep.frame[sweep.frame["layer"] == layer]
            rows = rows[rows["penalty"].isna() | (rows["penalty"] == penalty)].set_index("metric")
            assert rows.loc["accuracy", "value"] == pytest.approx(np.mean(plain))
            assert rows.loc["balanced_accuracy", "value"] == pytest.approx(np.mean(balanced))
        fitted = ORACLES[kind](x, penalties[0]).fit(x, y)
        assert (sweep.predict(acts, Site("resid", layer)) == fitted.predict(x)).all()


@pytest.mark.parametrize("kind", SOLVERS)
def test_a_task_planted_at_one_site_is_found_there_and_nowhere_else(kind):
    sweep = probe(planted(), kind=kind, permutations=400, jobs=1)
    for metric in ("accuracy", "balanced_accuracy", "selectivity"):
        rows = scores(sweep, metric)
        # Corrected for looking at six sites: in one sweep of noise in a hundred any is below.
        assert rows.index[rows["p_corrected"] < 0.01].tolist() == ["resid 4"]
        assert rows["value"]["resid 4"] > 2 * rows["null_mean"]["resid 4"]
        assert (rows["p_corrected"] >= rows["p"]).all()
        assert ((rows["ci_low"] <= rows["value"]) & (rows["value"] <= rows["ci_high"])).all()
    assert sweep.best() == Site("resid", 4)


def test_logistic_finds_the_same():
    sweep = probe(
        planted(layers=3, at=1), kind="logistic", penalties=[0.1], permutations=20, jobs=1
    )
    rows = scores(sweep)
    assert rows.index[rows["p"] <= 1 / 21].tolist() == ["resid 1"]
    assert not sweep.notes


def unstructured(world: str, seed: int) -> xr.Dataset:
    """States that know the wording of a prompt and nothing of its label."""
    rng = np.random.default_rng(seed)
    if world == "constant in a template":
        template = np.repeat(np.arange(24), 12)
        task = rng.permutation(np.arange(24) % 3)[template]
        wording = template
    else:
        template, task, _ = (a.ravel() for a in np.mgrid[:8, :3, :12])
        wording = template * 3 + task
        if world == "row by row":
            task, wording = rng.integers(0, 3, len(template)), template
    states = rng.normal(size=(wording.max() + 1, 2, 6))[wording]
    states += rng.normal(size=states.shape)
    return dataset(states, task=task, template=template)


def p_values(world: str, draws: int, **options) -> tuple[np.ndarray, np.ndarray]:
    """Of one site, and of the best of two corrected for having looked at both."""
    options |= {"control": None, "permutations": 59, "penalties": [0.1], "folds": 4, "jobs": 1}
    frames = [
        scores(probe(unstructured(world, seed), seed=seed, **options)) for seed in range(draws)
    ]
    return (
        np.array([frame["p"].iloc[0] for frame in frames]),
        np.array([frame["p_corrected"].min() for frame in frames]),
    )


@pytest.mark.parametrize(
    ("world", "options"),
    [
        ("constant in a template", {}),
        pytest.param("constant in a template", {"groups": None}, marks=pytest.mark.slow),
        pytest.param("one instruction a template and task", {}, marks=pytest.mark.slow),
        pytest.param("row by row", {"exchange": "rows"}, marks=pytest.mark.slow),
    ],
)
def test_p_is_uniform_where_labels_have_no_structure(world, options):
    for p in p_values(world, 200, **options):
        assert kstest(p, "uniform").pvalue > 1e-3


@pytest.mark.parametrize(
    ("world", "options"),
    [
        ("constant in a template", {"groups": None, "units": "rows"}),
        ("one instruction a template and task", {"exchange": "rows"}),
    ],
)
def test_p_would_lie_if_rows_of_one_wording_were_exchanged(world, options):
    """Why the test above can fail: these worlds fool a null that permutes single rows."""
    p, _ = p_values(world, 60, **options)
    false_alarms = int((p <= 0.05).sum())
    assert binomtest(false_alarms, len(p), 0.05, alternative="greater").pvalue < 1e-3


def test_selectivity_takes_away_what_is_memorised():
    """States that only tell inputs apart: a probe for the task reads off its input's task."""
    rng = np.random.default_rng(0)
    source = np.tile(np.arange(12), 20)
    acts = dataset(
        rng.normal(size=(12, 1, 30))[source] + 0.1 * rng.normal(size=(240, 1, 30)),
        task=source % 3, template=np.arange(240) // 12, input=source,
    )  # fmt: skip
    sweep = probe(acts, jobs=1, permutations=10)
    assert scores(sweep)["value"].item() == 1
    assert abs(scores(sweep, "selectivity")["value"].item()) < 0.05
    # Where states hold the task and not the input, a control task cannot be memorised.
    other = probe(planted(6.0), jobs=1)
    assert scores(other, "selectivity")["value"]["resid 4"] > 0.3


def test_names_units_and_batches_do_not_matter(monkeypatch):
    acts = planted(1.0)
    names = np.array(["a", "b", "c", "d"])
    renamed = acts.assign_coords(task=("prompt", names[acts.task.values.astype(int)]))
    renamed = renamed.assign(resid=1000 * acts.resid.astype("f8") + 3)
    one = probe(acts, jobs=1)
    monkeypatch.setattr("probes.linear.site_fits.BATCH_ROWS", 17)
    two = probe(renamed, jobs=1)
    columns = ["value", "ci_low", "null_mean", "null_std", "p", "p_corrected"]
    pd.testing.assert_frame_equal(one.frame[columns], two.frame[columns])
    found = one.predict(acts, "resid 4").astype(int)
    assert (names[found] == two.predict(renamed, "resid 4")).all()


def test_heads_are_probed_by_their_contribution_and_predicted_from_what_is_stored(tmp_path):
    bridge = lc.load(hf_model("gpt2"))
    prompts = lc.Prompts.from_token_lists(
        [[5 + i % 4, 20 + i % 7, 40 + i // 4 % 3] for i in range(90)],
        pd.DataFrame({"task": [f"t{i % 4}" for i in range(90)], "template": np.arange(90) % 9}),
    )
    acts = lc.extract(bridge, prompts, ["head", "resid"], progress=False)
    options: dict[str, Any] = {"control": None, "permutations": 5, "jobs": 1, "penalties": [0.1]}
    apart: dict[str, Any] = options | {"jobs": 2}
    sweep = probe(acts, kinds="head", **options)
    full = lc.head_residual(acts, bridge).sel(block=1, head=2).values
    spanned = np.linalg.svd(full[:, 0] - full[:, 0].mean(0), full_matrices=False)[2][:8]
    direct = dataset(full @ spanned.T, task=acts.task, template=acts.template)
    expected = probe(direct, **options)
    assert (sweep.predict(acts, "head 1.2") == expected.predict(direct, "resid 0")).all()
    mine, theirs = (
        s.frame[s.frame.site == site][["value", "null_mean"]].to_numpy()
        for s, site in ((sweep, "head 1.2"), (expected, "resid 0"))
    )
    np.testing.assert_allclose(mine, theirs, atol=0.03)
    # The direction for z writes along the probe of the contribution.
    w_o = bridge.blocks[1].attn.W_O[2].detach().numpy()
    written = sweep.direction("t1", "head 1.2") @ w_o
    along = expected.direction("t1", "resid 0") @ spanned
    assert written @ along / np.linalg.norm(written) == pytest.approx(1, abs=1e-3)
    # From disk, in half precision and over processes.
    stored = lc.extract(bridge, prompts, ["head", "resid"], store=tmp_path / "acts", progress=False)
    pd.testing.assert_frame_equal(probe(stored, **apart).frame, probe(acts, **options).frame)
    broken = acts.copy(deep=True)
    broken.resid[4, 0, 1] = np.nan
    with pytest.raises(lc.InputError, match="resid 1 has NaN or infinite values in 1 of 90 rows"):
        probe(broken, **apart)
    half = acts.assign(resid=acts.resid.astype("f2"))
    whole = half.assign(resid=half.resid.astype("f8"))
    pd.testing.assert_frame_equal(
        probe(half, kinds="resid", **options).frame, probe(whole, kinds="resid", **options).frame
    )


@pytest.mark.parametrize("kind", KINDS)
def test_moving_along_a_direction_raises_its_label(kind):
    acts = planted(layers=2, at=1)
    sweep = probe(acts, kind=kind, penalties=[0.1], permutations=0, control=None, jobs=1)
    for label in sweep.directions.task.values:
        direction = sweep.direction(str(label), "resid 1")
        assert np.linalg.norm(direction) == pytest.approx(1)
        pushed = acts.assign(resid=acts.resid + 1e3 * direction.astype("f4"))
        assert (sweep.predict(pushed, "resid 1") == label).all()


def test_more_features_than_rows_and_a_layer_in_which_nothing_varies():
    rng = np.random.default_rng(0)
    template = np.arange(40) // 4
    states = np.stack([rng.normal(size=(40, 300)), np.full((40, 300), 0.1)], axis=1)
    acts = dataset(states, task=np.arange(40) % 2, template=template)
    for kind in KINDS:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sweep = probe(acts, kind=kind, control=None, permutations=5, jobs=1)
        values = sweep.frame[sweep.frame["layer"] == 1]
        assert (values["value"] == 0.5).all()
        assert (values["p"] == 1).all()
        assert sweep.frame["value"].notna().all()
        with pytest.raises(lc.InputError, match="nothing varies at 'resid 1'"):
            sweep.direction("0", "resid 1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "svm"}, "kind 'svm' is not known: expected one of"),
        ({"target": "mood"}, "label 'mood' is not in these activations: give"),
        ({"folds": 11}, "folds=11, expected 2 to 10, the number of groups of 'template'"),
        ({"penalties": []}, "penalties=\\[\\], expected numbers from"),
        ({"penalties": [0.0]}, "penalties=\\[0.0\\], expected numbers from"),
        ({"permutations": -1}, "permutations=-1, expected 0 or more"),
        ({"kinds": "head"}, "site 'head' is not in these activations: they hold"),
        ({"position": "start"}, "position 'start' is not in these activations"),
    ],
)
def test_wrong_options_are_one_clear_line(options, message):
    with pytest.raises(lc.InputError, match=message):
        probe(planted(), jobs=1, **options)


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_values_that_are_not_finite_are_counted_where_they_are(kind):
    acts = planted().copy(deep=True)
    acts.resid[[3, 8, 9], 0, 2, 5] = np.array([np.nan, np.inf, np.nan])
    with pytest.raises(lc.InputError, match="resid 2 has NaN or infinite values in 3 of 120 rows"):
        probe(acts, kind=kind, permutations=1, jobs=1)


def test_results_show_themselves(caplog):
    sweep = probe(planted(), jobs=1)
    assert "best accuracy" in repr(sweep)
    assert "<table" in sweep._repr_html_()
    assert sweep.plot("selectivity").to_dict()
    assert not caplog.records
    bare = probe(planted(), permutations=0, control=None, jobs=1)
    assert bare.frame["p"].isna().all()
    assert bare.plot().to_dict()
    assert "<table" in bare._repr_html_()
    for call, message in (
        (lambda: bare.plot("selectivity"), "metric 'selectivity' is not known"),
        (lambda: bare.best("head"), "no site of kind 'head'"),
        (lambda: bare.direction("9", "resid 1"), "'9' is not a task"),
        (lambda: bare.direction("1", "resid 9"), "site 'resid 9' was not probed"),
    ):
        with pytest.raises(lc.InputError, match=message):
            call()
