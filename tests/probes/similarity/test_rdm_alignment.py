"""RSA against rsatoolbox and scipy, planted structure found, noise at its stated rate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings, strategies as st
from rsatoolbox.data.dataset import Dataset
from rsatoolbox.inference.noise_ceiling import boot_noise_ceiling
from rsatoolbox.rdm.calc import calc_rdm
from rsatoolbox.rdm.compare import compare as compare_rdms
from rsatoolbox.rdm.rdms import RDMs
from scipy import stats
from scipy.spatial.distance import pdist, squareform
from scipy.stats import ortho_group
from sklearn.linear_model import LinearRegression

import lensclust as lc
from probes import combined, hypothesis, rsa, with_nuisances
from probes.design.units import exchangeable
from probes.similarity import mantel as matrix_tests
from probes.similarity.dissimilarity import crossnobis, standardised
from probes.similarity.mantel import MatrixTest, relabellings, tau_a

NAMES, ACTIVITIES, D = 6, 6, 24
RSATOOLBOX = {"spearman": "spearman", "tau-a": "tau-a", "pearson": "corr"}
PEARSON: Any = stats.pearsonr
SPEARMAN: Any = stats.spearmanr
SCIPY = {
    "spearman": lambda x, y: SPEARMAN(x, y).statistic,
    "pearson": lambda x, y: PEARSON(x, y).statistic,
}


def planted(
    *,
    name: float = 0.0,
    activity: float = 0.0,
    length: float = 0.0,
    seed: int = 0,
    repeats: int = 1,
) -> xr.Dataset:
    """States summed from a code of the name, of the activity and of the length, and noise.

    Lengths go with the name, so that what follows the length looks like the name too.
    """
    rng = np.random.default_rng(seed)
    who, what, again = (a.ravel() for a in np.mgrid[:NAMES, :ACTIVITIES, :repeats])
    tokens = 5 + 2 * who + rng.integers(0, 3, NAMES)[who] + rng.integers(0, 3, len(who))
    states = rng.normal(size=(len(who), D))
    states += name * rng.normal(size=(NAMES, D))[who]
    states += activity * rng.normal(size=(ACTIVITIES, D))[what]
    states += length * np.outer(tokens, rng.normal(size=D)) / 4
    labels = {
        "name": np.array([f"n{i}" for i in who], dtype=object),
        "activity": np.array([f"a{i}" for i in what], dtype=object),
        "item": np.array([f"{i}/{j}" for i, j in zip(who, what, strict=True)], dtype=object),
        "template": np.array([f"t{i}" for i in again], dtype=object),
        "length": tokens,
        "slope": what.astype(np.float64),
    }
    return xr.Dataset(
        {"resid": (("prompt", "position", "layer", "d_model"), states[:, None, None])},
        {"layer": [0], "position": ["answer"]}
        | {key: ("prompt", values) for key, values in labels.items()},
    )


def values_of(found, **choice) -> pd.Series:
    rows = found.frame
    for column, value in choice.items():
        rows = rows[rows[column] == value]
    return rows.set_index("hypothesis")["value"]


@pytest.mark.parametrize("distance", ["cosine", "correlation", "euclidean"])
@pytest.mark.parametrize("scale", [False, True])
def test_scores_equal_rsatoolbox_and_scipy_by_hand(distance, scale):
    acts = planted(name=1.0)
    hypotheses = {
        "name": hypothesis(acts, "name"),
        "slope": hypothesis(acts, "slope", graded=True),
        "both": combined([hypothesis(acts, "name"), hypothesis(acts, "activity")]),
    }
    found = rsa(acts, hypotheses, distance=distance, standardise=scale, nuisance=(), permutations=9)
    x: Any = acts.resid.values[:, 0, 0]
    x = stats.zscore(x) if scale else x
    if distance == "cosine":
        rdm = pdist(x, "cosine")
    else:
        calculated: Any = calc_rdm(Dataset(x), method=distance)
        rdm = calculated.dissimilarities[0]
        rdm = np.sqrt(rdm * D) if distance == "euclidean" else rdm
    for compare, method in RSATOOLBOX.items():
        values = values_of(found, compare=compare)
        for name, matrix in hypotheses.items():
            entries = squareform(matrix, checks=False)
            one, other = (RDMs(v[None]) for v in (rdm, entries))
            expected = compare_rdms(one, other, method=method).item()
            assert values[name] == pytest.approx(expected, abs=1e-6)
            if compare in SCIPY:
                assert values[name] == pytest.approx(SCIPY[compare](rdm, entries), abs=1e-6)


@pytest.mark.parametrize("compare", ["spearman", "pearson"])
def test_partial_scores_and_their_null_equal_regression_by_hand(compare):
    acts = planted(name=0.5, length=0.5)
    found = rsa(acts, ["name"], nuisance=["length"], compare=compare, permutations=19)
    row = found.frame.query("controlled").iloc[0]
    transform = stats.rankdata if compare == "spearman" else np.asarray
    rdm, name, length = (
        transform(entries)
        for entries in (
            pdist(acts.resid.values[:, 0, 0], "cosine"),
            squareform(hypothesis(acts, "name"), checks=False),
            squareform(hypothesis(acts, "length", graded=True), checks=False),
        )
    )

    def left(entries):
        z = length[:, None].astype(float)
        return entries - LinearRegression().fit(z, entries).predict(z)

    residual = squareform(left(name), checks=False)
    orders = exchangeable(acts.name.values, acts, by="name").orders(19, seed=0)
    expected = [
        PEARSON(left(rdm), left(squareform(residual[np.ix_(o, o)], checks=False))).statistic
        for o in orders
    ]
    assert row["value"] == pytest.approx(expected[0], abs=1e-6)
    assert row["null_mean"] == pytest.approx(np.mean(expected[1:]), abs=1e-6)
    assert row["p"] == pytest.approx((1 + (np.array(expected[1:]) >= expected[0]).sum()) / 20)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=25))
def test_tau_a_counts_pairs(pairs):
    x, y = np.array(pairs, dtype=float).T
    signs = np.sign(x[:, None] - x) * np.sign(y[:, None] - y)
    expected = signs[np.triu_indices(len(x), 1)].mean()
    found = tau_a(x, y)
    if np.ptp(x) and np.ptp(y):
        assert found == pytest.approx(expected)
    else:
        assert np.isnan(found)


@pytest.mark.parametrize("controlled", [False, True])
def test_the_null_of_tau_a_over_fewer_pairs_agrees_with_that_over_all(controlled, monkeypatch):
    acts = planted(activity=0.3)
    slope = {"slope": hypothesis(acts, "slope", graded=True)}
    options = {"nuisance": ["length"] if controlled else (), "compare": "tau-a"}
    few = rsa(acts, slope, permutations=200, **options).frame.iloc[-1]
    monkeypatch.setattr(matrix_tests, "COMPARISONS", 10**6)
    every = rsa(acts, slope, permutations=200, **options).frame.iloc[-1]
    assert few["value"] == every["value"]
    assert few["null_mean"] == pytest.approx(every["null_mean"], abs=0.003)
    assert few["null_std"] == pytest.approx(every["null_std"], rel=0.15)
    # Over all pairs, the statistic that p compares is the value itself.
    test = MatrixTest.of(slope["slope"], [], "tau-a", name="slope")
    entries = test.transformed(pdist(acts.resid.values[:, 0, 0], "cosine")[None])
    scores = test.scores(entries, relabellings(36, 5, block=None, seed=0), seed=0)
    np.testing.assert_allclose(scores.value, scores.statistic, atol=1e-6)


def test_planted_components_are_found_and_the_wrong_ones_are_not_once_length_is_taken_out():
    for seed in range(8):
        found = rsa(
            planted(name=0.0, activity=1.0, length=1.0, seed=seed),
            ["name", "activity"],
            nuisance=["length"],
            compare="spearman",
            distance="euclidean",
            permutations=199,
        )
        p = found.frame.set_index(["hypothesis", "controlled"])["p"]
        # Length goes with the name: only what is left beside it may count.
        assert p["name", False] < 0.01
        assert p["name", True] > 0.01
        assert p["activity", True] < 0.01


def test_noise_is_called_structure_as_often_as_stated():
    """Nothing but noise: with and without the length taken out, p is uniform."""
    options = {"compare": "spearman", "permutations": 99, "nuisance": ["length"]}
    frames = [rsa(planted(seed=seed), ["name"], **options).frame for seed in range(200)]
    for controlled in (False, True):
        p = np.array([f["p"][f["controlled"] == controlled].item() for f in frames])
        for level in (0.05, 0.2, 0.5):
            # Binomial bounds that a correct test leaves once in 1,000 runs on each side.
            low, high = stats.binom.ppf([0.001, 0.999], len(p), level)
            assert low <= (p <= level).sum() <= high


def test_what_the_length_does_is_not_called_the_name():
    """States follow the length, which goes with the name, and nothing else."""
    options = {"compare": "spearman", "permutations": 99, "nuisance": ["length"]}
    options |= {"distance": "euclidean"}
    found = [rsa(planted(length=1.0, seed=s), ["name"], **options).frame for s in range(50)]
    p = np.array([frame.set_index("controlled")["p"] for frame in found])
    assert (p[:, 0] <= 0.05).all()
    assert (p[:, 1] <= 0.05).sum() <= stats.binom.ppf(0.999, len(p), 0.05)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 999))
def test_rotation_order_and_names_do_not_matter(seed):
    acts = planted(name=0.5, seed=seed)
    order = np.random.default_rng(seed).permutation(acts.sizes["prompt"])
    turned = acts.assign(resid=acts.resid @ _rotation(seed)).rename(e="d_model").isel(prompt=order)
    turned = turned.assign_coords(name=turned.name.str.replace("n", "other "))
    one, other = (
        rsa(each, ["name"], nuisance=["length"], permutations=2).frame["value"]
        for each in (acts, turned)
    )
    np.testing.assert_allclose(one, other, atol=1e-5)


def _rotation(seed):
    return xr.DataArray(ortho_group.rvs(D, random_state=seed), dims=("d_model", "e"))


def test_repeats_give_the_mean_of_their_scores_their_ceiling_and_crossnobis():
    acts = planted(name=1.0, repeats=3)
    found = rsa(
        acts,
        ["name"],
        distance=["euclidean", "crossnobis"],
        compare=["spearman", "pearson"],
        nuisance=["template"],
        items="item",
        repeats="template",
        permutations=99,
    )
    assert found.notes[0] == "nuisance 'template' is the same for all pairs: left out"
    assert "single rows trade labels" in found.notes[1]
    assert (found.frame["n"] == NAMES * ACTIVITIES).all()
    rows = found.frame.set_index(["distance", "compare"])
    parts = [acts.isel(prompt=acts.template.values == f"t{i}") for i in range(3)]
    ordered = [part.isel(prompt=np.argsort(part.item.values)) for part in parts]
    rdms = np.stack([pdist(part.resid.values[:, 0, 0]) for part in ordered])
    name = squareform(hypothesis(ordered[0], "name"), checks=False)
    for compare, score in SCIPY.items():
        row = rows.loc[("euclidean", compare)]
        assert row["value"] == pytest.approx(np.mean([score(r, name) for r in rdms]), abs=1e-6)
        low, high = boot_noise_ceiling(RDMs(rdms), method=RSATOOLBOX[compare])
        assert (row["ceiling_low"], row["ceiling_high"]) == pytest.approx((low, high), abs=1e-6)
        assert low <= high
    assert (rows.loc["crossnobis", "p"] < 0.02).all()
    assert rows.loc["crossnobis", "ceiling_low"].isna().all()


def test_crossnobis_hardly_sees_noise_and_what_it_sees_is_alike_for_all_pairs():
    rng = np.random.default_rng(0)
    # Many items: nearly 0, where the distances between means are not.
    many = rng.normal(size=(3, 60, 4))
    assert abs(crossnobis(many).mean()) < 0.1 * pdist(many.mean(0), "sqeuclidean").mean() / 4
    # Few items: off 0, by the same amount for every pair.
    few = np.stack([crossnobis(rng.normal(size=(3, 6, 4))) for _ in range(300)])
    off = few.mean(0) - few.mean()
    assert (np.abs(off) < 4 * stats.sem(few)).all()
    x = rng.normal(size=(3, 6, 4))
    # Repeats that agree in a feature leave it out; in all, there is no distance.
    wide = np.concatenate([x, np.broadcast_to(rng.normal(size=(6, 1)), (3, 6, 1))], axis=2)
    np.testing.assert_allclose(crossnobis(wide), crossnobis(x))
    assert (crossnobis(np.repeat(x[:1], 3, axis=0)) == 0).all()


def test_states_that_do_not_vary_have_no_score_and_labels_can_hold_prompts_apart():
    acts = planted(name=1.0)
    still = acts.assign(resid=xr.full_like(acts.resid, 0.1))
    frame = rsa(still, ["name"], nuisance=["length"], permutations=9).frame
    assert frame[["value", "p", "p_corrected"]].isna().all().all()
    # Within a name there is nothing to exchange: every relabelling is the hypothesis again.
    frame = rsa(acts, ["name"], nuisance=(), within="name", permutations=9).frame
    assert (frame["p"] == 1).all()


def test_nuisances_are_read_off_the_prompts():
    ids = [[1, 5, 9], [1, 6], [1, 5]]
    prompts = lc.Prompts.from_token_lists(ids, pd.DataFrame({"n": range(3)}))
    acts = with_nuisances(planted().isel(prompt=range(3)).drop_vars("length"), prompts)
    assert acts.length.values.tolist() == [3, 2, 2]
    assert acts.first_token.values.tolist() == ["5", "6", "5"]


def test_the_best_site_of_a_permuted_sweep_corrects_p():
    acts = planted(name=0.4)
    states = np.random.default_rng(1).normal(size=(36, 1, 8, D))
    states[:, :, 0] = acts.resid.values[:, :, 0]
    wide = acts.drop_vars(["resid", "layer"]).assign_coords(layer=range(8))
    wide["resid"] = (acts.resid.dims, states)
    found = rsa(wide, ["name"], nuisance=(), compare="spearman", permutations=99)
    frame = found.frame.set_index("layer")
    assert (frame["p_corrected"] >= frame["p"]).all()
    assert "name" in repr(found)
    assert found.plot().to_dict()["title"]
    with pytest.raises(lc.InputError, match="compare='tau-a', expected one of"):
        found.plot(compare="tau-a")


def test_features_are_standardised_and_constant_ones_are_0():
    x = np.random.default_rng(0).normal(size=(9, 3))
    x[:, 1] = 0.1
    expected: Any = stats.zscore(x[:, [0, 2]])
    np.testing.assert_allclose(standardised(x)[:, [0, 2]], expected)
    assert (standardised(x)[:, 1] == 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: rsa(a, {"h": np.eye(3)}), r"'h' has shape \(3, 3\), expected \(36, 36\)"),
        (lambda a: rsa(a, {"h": 1 - np.eye(36)}), "hypothesis 'h' is 1 for all pairs"),
        (lambda a: rsa(a, {"h": np.tri(36)}), "hypothesis 'h' is not symmetric"),
        (lambda a: rsa(a, {"h": np.full((36, 36), np.nan)}), "hypothesis 'h' holds NaN"),
        (lambda a: rsa(a, {}), "no hypothesis given"),
        (lambda a: rsa(a, ["mood"]), "label 'mood' is not among those"),
        (lambda a: rsa(a, ["name"]), "'first_token' is not among .*with_nuisances"),
        (lambda a: rsa(a, ["template"], nuisance=()), "label 'template' is 't0' for all 36"),
        (lambda a: rsa(a, ["name"], nuisance=["name"]), "'name' is a linear function of the"),
        (lambda a: rsa(a, ["name"], nuisance="no such"), "'no such' is not among"),
        (lambda a: rsa(a, ["name"], distance="cos"), "distance=.'cos'., expected some of"),
        (lambda a: rsa(a, ["name"], compare=[]), r"compare=\[\]"),
        (lambda a: rsa(a, ["name"], distance="crossnobis"), "needs items and repeats"),
        (lambda a: rsa(a, ["name"], items="item"), "expected both or neither"),
        (lambda a: rsa(a, ["name"], items="item", repeats="template"), "one value, expected at"),
        (lambda a: rsa(a, ["name"], items="name", repeats="length"), "each item once in each"),
        (lambda a: rsa(a, ["name"], permutations=1), "permutations=1, expected at least 2"),
        (lambda a: rsa(a, ["name"], standardise="yes"), "standardise='yes'"),
        (lambda a: rsa(a, ["name"], nuisance=(), within="item"), "no two prompts can change"),
        (lambda a: hypothesis(a, "name", graded=True), "holds values such as 'n0'"),
        (lambda a: combined([np.eye(2), np.eye(3)]), "expected matrices of one size"),
        (lambda a: combined([]), "expected matrices of one size"),
    ],
)
def test_wrong_options_are_one_clear_line(call, message):
    with pytest.raises(lc.InputError, match=message):
        call(planted())


def test_a_state_without_direction_has_no_angle():
    acts = planted()
    acts.resid[3] = 0
    with pytest.raises(lc.InputError, match="resid 0: a row has no cosine distance"):
        rsa(acts, ["name"], nuisance=())
    assert rsa(acts, ["name"], nuisance=(), distance="euclidean").frame["value"].notna().all()
