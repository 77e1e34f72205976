"""CKA against its definition with centring matrices, its null against every shuffling."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings, strategies as st
from scipy.stats import binom, ortho_group

import lensclust as lc
from probes import bag_of_tokens
from probes.similarity import gram_matrices
from probes.similarity.kernel_alignment import cka
from tests.tiny import hf_model


def states(*layers: np.ndarray) -> xr.Dataset:
    """Matrices (row, d) as the layers of a residual stream."""
    stacked = np.stack(layers, axis=1)[:, None].astype(np.float32)
    return xr.Dataset(
        {"resid": (("prompt", "position", "layer", "d_model"), stacked)},
        {
            "layer": range(len(layers)),
            "position": ["answer"],
            "task": ("prompt", np.arange(len(stacked)).astype(str)),
        },
    )


def biased_hsic(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    centring = np.eye(len(k)) - 1 / len(k)
    return float(np.trace(k @ centring @ l @ centring))


def unbiased_hsic(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """Song et al. (2012), equation 5."""
    n, ones = len(k), np.ones(len(k))
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    means = (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2))
    return float((np.trace(k @ l) + means - 2 / (n - 2) * ones @ k @ l @ ones) / (n * (n - 3)))


def defined(x: np.ndarray, y: np.ndarray, *, debiased: bool) -> float:
    hsic = unbiased_hsic if debiased else biased_hsic
    k, l = x @ x.T, y @ y.T  # noqa: E741
    return hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))


def gaussian(seed: int, *shape: int) -> np.ndarray:
    """Numbers that single precision holds exactly."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32).astype(np.float64)


# Few wide sites are cheaper through Gram matrices, many prompts through features.
SHAPES = [(9, 30), (60, 4), (5, 2), (4, 40)]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(SHAPES), st.booleans())
def test_values_equal_the_definition(seed, shape, debiased):
    x, y, z = gaussian(seed, 3, *shape)
    layers = [x, x + y, z**3]
    layers = [layer.astype(np.float32).astype(np.float64) for layer in layers]
    expected = [[defined(a, b, debiased=debiased) for b in layers] for a in layers]
    alone = cka(states(*layers), debiased=debiased).matrix
    np.testing.assert_allclose(alone, expected, atol=1e-9)
    two = cka(states(*layers[:2]), states(*layers), debiased=debiased).matrix
    np.testing.assert_allclose(two, np.array(expected)[:2], atol=1e-9)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("shape", [(7, 3), (6, 12), (4, 2)])
def test_the_null_has_the_moments_of_every_shuffling(shape, debiased):
    x, y = gaussian(1, *shape) ** 3, gaussian(2, *shape)
    x = x.astype(np.float32).astype(np.float64)
    orders = itertools.permutations(range(shape[0]))
    every = [defined(x, y[list(order)], debiased=debiased) for order in orders]
    row = cka(states(x), states(y), debiased=debiased).frame.iloc[0]
    assert row["null_mean"] == pytest.approx(np.mean(every), abs=1e-9)
    assert row["null_std"] == pytest.approx(np.std(every), abs=1e-9)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("width", [2, 80])
def test_p_is_that_of_sampled_shufflings(width, debiased):
    x, y = gaussian(0, 40, width), gaussian(1, 40, width)
    for shared in (0.0, 0.15, 0.3):
        mixed = (shared * x + y).astype(np.float32).astype(np.float64)
        row = cka(states(x), states(mixed), debiased=debiased).frame.iloc[0]
        rng = np.random.default_rng(0)
        null = [defined(x, mixed[rng.permutation(40)], debiased=debiased) for _ in range(2000)]
        sampled = np.mean(np.array(null) >= row["value"])
        # Three standard errors of the sample, and as much as the fitted curve may be off.
        assert abs(row["p"] - sampled) < 3 * np.sqrt(sampled * (1 - sampled) / 2000) + 0.03


def test_noise_is_rarely_called_alike_and_shared_states_always():
    layers = [gaussian(seed, 50, 6) for seed in range(16)]
    frame = cka(states(*layers), debiased=True).frame
    unrelated = frame[frame["layer_a"] < frame["layer_b"]]
    # 120 pairs that hang together a little: 5 % of them, and not 15 %.
    assert (unrelated["p"] < 0.05).mean() < 0.15
    assert (unrelated["p"] < 0.5).mean() == pytest.approx(0.5, abs=0.2)
    near = cka(states(layers[0]), states(layers[0] + layers[1])).frame
    assert near["p"].item() < 1e-4


def test_few_prompts_inflate_the_plain_value_and_not_the_debiased_one():
    pairs = [(gaussian(2 * s, 20, 200), gaussian(2 * s + 1, 20, 200)) for s in range(10)]
    plain, debiased = (
        [cka(states(x), states(y), debiased=d).matrix.item() for x, y in pairs]
        for d in (False, True)
    )
    assert min(plain) > 0.8
    assert abs(np.mean(debiased)) < 3 * np.sqrt(2 / (20 * 17) / 10)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 100), st.booleans())
def test_rotation_scale_offset_and_common_order_do_not_matter(seed, scale, debiased):
    x, y = gaussian(seed, 2, 24, 6)
    turned = scale * (x @ ortho_group.rvs(6, random_state=seed)) + 3
    order = np.random.default_rng(seed).permutation(24)
    one = cka(states(x, y), debiased=debiased)
    other = cka(states(turned[order], y[order]), debiased=debiased)
    for column in ("value", "null_mean", "null_std"):
        np.testing.assert_allclose(one.frame[column], other.frame[column], atol=1e-5)
    same = cka(states(x), states(turned), debiased=debiased)
    assert same.matrix.item() == pytest.approx(1, abs=1e-5)
    assert cka(states(x[order]), states(x), debiased=debiased).matrix.item() < 0.9


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_how_much_is_kept_at_once_does_not_matter(shape, monkeypatch):
    a, b = states(*gaussian(0, 5, *shape)), states(*gaussian(1, 3, *shape))
    whole = [cka(a).matrix, cka(a, b).matrix]
    monkeypatch.setattr(gram_matrices, "KEPT_BYTES", 8 * shape[0] * shape[1] * 2)
    for one, other in zip(whole, [cka(a).matrix, cka(a, b).matrix], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_states_that_do_not_vary_have_no_value(recwarn):
    x = gaussian(0, 12, 5)
    constant = np.full((12, 5), 0.1)
    for debiased in (False, True):
        found = cka(states(constant, x), debiased=debiased)
        assert np.isnan(found.matrix.values).tolist() == [[True, True], [True, False]]
        null = found.frame[["null_mean", "null_std", "p"]].isna()
        assert null.all(axis=1).tolist() == [True, True, True, False]
        assert not null.iloc[3].any()
        assert found.plot().to_dict()
    with pytest.raises(lc.InputError, match="no pair of sites has a value"):
        cka(states(constant)).plot()
    assert not [str(w.message) for w in recwarn.list]


def token_lists() -> lc.Prompts:
    ids = [[1, 4 + i % 7, 20 + i % 5, 40 + i % 3] for i in range(40)]
    return lc.Prompts.from_token_lists(ids, pd.DataFrame({"task": [str(i % 5) for i in range(40)]}))


def test_models_are_compared_over_the_same_prompts(tmp_path):
    prompts = token_lists()
    one, other = lc.load(hf_model("gpt2")), lc.load(hf_model("llama"))
    kept = lc.extract(one, prompts, ["resid", "head"], store=tmp_path / "a", progress=False)
    acts = lc.extract(other, prompts, ["resid", "head"], progress=False)
    across = cka(kept, acts)
    assert across.matrix.shape == (16, 16)
    assert float(across.matrix.max()) < 1 - 1e-3
    site = {"layer": 2, "position": "answer"}
    x, y = kept.resid.sel(site).values, acts.resid.sel(site).values
    value = across.matrix.sel(site_a="resid 2", site_b="resid 2").item()
    assert value == pytest.approx(defined(*map(np.float64, (x, y)), debiased=False), abs=1e-5)
    # A head counts by what it writes to the residual stream.
    head = lc.head_residual(kept, one).sel(block=1, head=2, position="answer").values
    value = across.matrix.sel(site_a="head 1.2", site_b="resid 2").item()
    assert value == pytest.approx(defined(*map(np.float64, (head, y)), debiased=False), abs=1e-4)
    assert cka(kept, bag_of_tokens(prompts), kinds="resid").matrix.shape == (4, 1)


def test_other_prompts_are_refused():
    acts = states(*gaussian(0, 2, 10, 3))
    with pytest.raises(lc.InputError, match="10 prompts given against 8"):
        cka(acts, acts.isel(prompt=slice(8)))
    with pytest.raises(
        lc.InputError, match="prompt 0 has task='0' on one side and '9' on the other"
    ):
        cka(acts, acts.isel(prompt=slice(None, None, -1)))
    bare = acts.drop_vars("task")
    with pytest.raises(lc.InputError, match="no label in common"):
        cka(bare.assign_attrs(prompts="a"), bare.assign_attrs(prompts="b"))
    assert cka(bare.assign_attrs(prompts="a"), bare.assign_attrs(prompts="a")).n == 10


def test_what_cannot_be_compared_is_one_clear_line():
    acts = states(*gaussian(0, 2, 10, 3))
    with pytest.raises(lc.InputError, match="3 prompts given, expected at least 4"):
        cka(acts.isel(prompt=slice(3)))
    with pytest.raises(lc.InputError, match="site 'head' is not in these activations"):
        cka(acts, kinds="head")
    with pytest.raises(lc.InputError, match="position 'start'"):
        cka(acts, position="start")
    acts.resid[4, 0, 1, 0] = np.nan
    with pytest.raises(lc.InputError, match="site 'resid 1': 1 of 10 rows hold NaN"):
        cka(acts)


def test_results_show_themselves():
    found = cka(states(*gaussian(0, 3, 10, 3)), debiased=True)
    assert repr(found).startswith("CKA(3 x 3 sites, 10 prompts, debiased; mean ")
    assert "Debiased linear CKA" in found.plot().to_dict()["usermeta"]["title"]
    assert found._repr_html_().startswith("<p>CKA(3 x 3")


@pytest.mark.parametrize("tied", ["sizes", "inputs"])
def test_what_tasks_are_made_of_is_no_likeness_of_two_models(tied):
    """Effects of wordings and inputs, drawn anew for each side; tasks differ in rows alone."""
    rows = [
        {"task": task, "template": f"{task}.{wording}", "input": x}
        for task in range(4)
        for wording in range(4)
        for x in (range(8 if task > 1 else 2) if tied == "sizes" else (task, (task + 1) % 4))
    ]
    labels = pd.DataFrame(rows).astype(str)
    rng = np.random.default_rng(0)

    def model() -> xr.Dataset:
        x = 0.3 * rng.normal(size=(len(labels), 6))
        for name in ("template", "input"):
            codes = pd.factorize(labels[name])[0]
            x += rng.normal(size=(codes.max() + 1, 6))[codes]
        return states(x).assign_coords({name: ("prompt", labels[name]) for name in labels})

    p = [cka(model(), model(), permutations=39, seed=n).frame["p"].item() for n in range(60)]
    # With a valid p more than this comes up once in 10,000 times.
    assert np.sum(np.array(p) <= 0.05) <= binom.ppf(1 - 1e-4, 60, 0.05)
