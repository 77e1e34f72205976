"""Head views: planes against scikit-learn's, patterns against the cache, planted clusters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings, strategies as st
from sklearn.decomposition import PCA

import lensclust as lc
import probes
from lensclust.activations.dataset import site_values
from lensclust.models.sites import Site
from probes.attention.samples import sample_attention
from probes.heads.view import head_view

PROMPTS = lc.tasks.sif().where(split="new_string")
MODEL = lc.load("native:sif-small")
ACTS = lc.extract(MODEL, PROMPTS.take(range(0, len(PROMPTS), 7)), "head", progress=False)
MISSING: Any = pd.NA


def scores(acts: xr.Dataset = ACTS, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    heads = list(np.ndindex(acts.sizes["block"], acts.sizes["head"]))
    rows = [(name, *place, rng.random()) for name in ("ari", "ami") for place in heads]
    return pd.DataFrame(rows, columns=["metric", "block", "head", "value"])


def test_planes_are_principal_components_of_what_a_head_adds() -> None:
    view = head_view(ACTS, scores())
    for (block, head), points, share in zip(view.opened, view.points, view.explained, strict=True):
        states = site_values(ACTS, Site("head", block, head)).astype(np.float64)
        pca = PCA(2, svd_solver="full").fit(states)
        wanted = pca.transform(states)
        signs = np.sign((wanted * points).sum(0))
        np.testing.assert_allclose(points, wanted * signs, atol=1e-6)
        assert share == pytest.approx(pca.explained_variance_ratio_.sum())


def test_every_head_opens_where_there_is_room_the_best_first() -> None:
    table = scores()
    view = head_view(ACTS, table)
    assert len(view.opened) == 24
    ari = [view.scores["ari"][place] for place in view.opened]
    assert ari == sorted(ari, reverse=True)
    assert view.caption == ""


def test_the_best_heads_open_where_there_is_not_and_it_is_said() -> None:
    attention = sample_attention(MODEL, PROMPTS.take([0, 9]))
    view = head_view(ACTS, scores(), attention=attention, caption="Tiny.", most_bytes=6_000)
    assert 1 < len(view.opened) < 24
    assert view.caption == f"Tiny. The {len(view.opened)} heads of 24 with the highest ari open."
    assert sum(s.weights.size for s in view.samples) + 2 * view.points.size < 6_000 * 3 / 4
    assert view.opened == head_view(ACTS, scores()).opened[: len(view.opened)]
    few = head_view(ACTS, scores(), most_prompts=5)
    assert few.points.shape[1] == len(few.texts) == 5
    assert "5 of" in few.caption


def test_patterns_are_the_models_to_a_255th() -> None:
    prompts = PROMPTS.take([3, 50])
    view = head_view(ACTS, scores(), attention=sample_attention(MODEL, prompts))
    for row, sample in enumerate(view.samples):
        n = len(sample.tokens)
        _, cache = MODEL.run_with_cache(prompts.tokens[row : row + 1, :n])
        for (block, head), weights in zip(view.opened, sample.weights, strict=True):
            wanted = cache[f"blocks.{block}.attn.hook_pattern"][0, head].detach().numpy()
            assert np.abs(weights / 255 - wanted[np.tril_indices(n)]).max() <= 0.5 / 255 + 1e-6


@settings(max_examples=15, deadline=None, database=None)
@given(st.integers(0, 2**32 - 1))
def test_planted_clusters_stay_apart_whatever_the_basis(seed: int) -> None:
    """The frame keeps distances: an orthogonal map of it moves no point against another."""
    rng = np.random.default_rng(seed)
    d = ACTS.sizes["d_head"]
    task = np.arange(30) % 3
    centres = 10 * np.linalg.qr(rng.normal(size=(d, 3)))[0].T
    z = centres[task] + 0.1 * rng.normal(size=(30, d))
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
    planted = xr.Dataset(
        {
            "z": (("prompt", "position", "block", "head", "d_head"), z[:, None, None, None]),
            "head_frame": (("block", "head", "d_head", "rank"), turn[None, None]),
        },
        {"position": ["answer"], "block": [0], "head": [0], "task": ("prompt", task)},
    )
    table = pd.DataFrame({"metric": ["ari"], "block": 0, "head": 0, "value": 1.0})
    view = head_view(planted, table)
    plain = head_view(
        planted.assign(head_frame=(planted.head_frame.dims, np.eye(d)[None, None])), table
    )
    apart = np.linalg.norm(view.points[0][:, None] - view.points[0][None], axis=-1)
    same = task[:, None] == task[None]
    assert apart[same].max() < apart[~same].min() / 4
    also = np.linalg.norm(plain.points[0][:, None] - plain.points[0][None], axis=-1)
    np.testing.assert_allclose(apart, also, atol=1e-3)
    assert view.explained[0] > 0.95


def test_scores_of_several_seeds_are_averaged_and_missing_ones_stay_missing() -> None:
    both = pd.concat([scores(seed=s).assign(seed=s) for s in (0, 1)])
    without = both[~((both["block"] == 2) & (both["head"] == 1))]
    view = head_view(ACTS, without)
    grid = view.scores["ami"]
    assert np.isnan(grid[2, 1])
    assert np.isnan(grid).sum() == 1
    one = both[(both["metric"] == "ami") & (both["block"] == 4) & (both["head"] == 0)]
    assert grid[4, 0] == pytest.approx(one["value"].mean())
    assert view.opened[-1] == (2, 1)


def test_a_clustering_is_shown_as_it_is() -> None:
    clusters = probes.cluster(ACTS, given=None, metrics=["ari", "ami"], permutations=2, jobs=1)
    view = head_view(ACTS, clusters.frame, labels=["task", "input"], text="instruction")
    assert list(view.labels) == ["task", "input"]
    assert view.texts == tuple(map(str, ACTS["instruction"].values))
    best = clusters.best("head")
    assert view.opened[0] == (best.layer, best.head)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"score": "measure"}, "no column 'measure'"),
        ({"labels": ["colour"]}, "label 'colour' is not in these activations"),
        ({"text": "colour"}, "label 'colour' is not in these activations"),
        ({"scores": pd.concat([scores(), scores()])}, "several rows that share"),
        ({"scores": scores().assign(head=MISSING)}, "scores of no head"),
        (
            {"scores": scores().assign(block=lambda rows: rows["block"] + 9)},
            "no head has activations, a score",
        ),
        ({"sample_names": ["one", "two"]}, "2 names for 1 sample prompts"),
        ({"labels": []}, "no label to colour by"),
    ],
)
def test_what_cannot_be_shown_is_one_line(options: dict[str, Any], said: str) -> None:
    table = options.pop("scores", scores())
    attention = sample_attention(MODEL, PROMPTS.take([0]))
    with pytest.raises(lc.InputError, match=said):
        head_view(ACTS, table, attention=attention, **options)


def test_a_prompt_too_long_for_a_picture_is_refused() -> None:
    attention = sample_attention(MODEL, PROMPTS.take([0]))
    long = type(attention)(
        attention.heads, (("a",) * 200,), (np.zeros((24, 200, 200), np.float32),)
    )
    with pytest.raises(lc.InputError, match="sample prompt 0 has 200 tokens, expected at most 128"):
        head_view(ACTS, scores(), attention=long)
