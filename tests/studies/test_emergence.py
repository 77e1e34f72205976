"""The emergence study's claims can fail: planted worlds in which they do."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import lensclust as lc
from lensclust.report.views.heads import HeadView
from lensclust.tasks.synthetic.sif import vocabulary
from studies.emergence import Emergence
from studies.emergence.claims import claims, pictures
from studies.emergence.synthetic import measure
from studies.scales import AGREED
from studies.scores import plane, rank_correlations, where
from studies.synthetic_task import SPLITS, UNSEEN, clustered_prompts, input_only_accuracy

STEPS, LAYERS, SEEDS = (0, 50, 400, 800), range(4), range(4)


def world(ari: Callable[[str, int, int], float], accuracy: Callable[[str, int], float]):
    """Scores as the study collects them, from a rule for ARI and one for accuracy."""
    rng = np.random.default_rng(0)
    rows = []
    for seed in SEEDS:
        for step in STEPS:
            for split in SPLITS:
                shared = {"seed": seed, "step": step, "split": split, "null_std": 0.02}
                known = {"site": "model", "kind": "model", "metric": "accuracy", "null_mean": 0.2}
                rows.append({**shared, **known, "value": accuracy(split, step)})
                places = [("resid", layer, None) for layer in LAYERS]
                places += [("head", layer, head) for layer in (0, 1) for head in (0, 1)]
                for kind, layer, head in places:
                    cluster = {"kind": kind, "layer": layer, "head": head}
                    cluster |= {"site": f"{kind} {layer}.{head}", "by": "task", "null_mean": 0.0}
                    value = min(1.0, ari(split, step, layer) + 0.001 * rng.normal())
                    rows += [
                        {**shared, **cluster, "value": value, "given": given, "metric": metric}
                        for metric in ("ari", AGREED)
                        for given in ("input", "none")
                        if given == "input" or (kind, split) == ("resid", UNSEEN)
                    ]
    return pd.DataFrame(rows)


def learns(split: str, step: int, layer: int) -> float:
    reach = 0.05 if split == "new_regex" else 0.97
    return reach * layer / 3 * min(1, step / 400)


def verdicts(scores: pd.DataFrame) -> dict[str, str]:
    return {claim.id: claim.verdict for claim in claims(scores)}


def test_a_model_that_learns_supports_the_claims():
    found = verdicts(
        world(learns, lambda split, step: 0.2 if split == "new_regex" else min(1, 0.2 + step / 400))
    )
    for claim in ("rises", "saturates", "clusters", "deeper", "embedding-flat", "nearly-all"):
        assert found[claim] == "supported", claim
    for claim in ("strings", "strings-all", "expressions"):
        assert found[f"unseen-{claim}"] == "supported", claim
    assert found["unclustered-expressions"] == "supported"


def test_a_steady_rise_neither_saturates_nor_contradicts_it():
    found = verdicts(world(lambda s, step, layer: layer / 3 * step / 800, lambda s, step: 0.2))
    assert found["saturates"] == "negligible"


def test_states_that_know_wordings_alone_support_no_claim_on_tasks():
    scores = world(learns, lambda split, step: 0.2)
    scores.loc[scores["metric"] == AGREED, "value"] = 0.0
    found = verdicts(scores)
    for claim in ("rises", "clusters", "heads"):
        assert found[claim] == "negligible", claim
    assert "supported" not in {found["deeper"], found["nearly-all"]}


@pytest.mark.parametrize(
    ("ari", "refuted"),
    [
        (lambda split, step, layer: -0.1, {"clusters", "unclustered-expressions"}),
        (lambda split, step, layer: 0.9 - step / 1000, {"rises", "embedding-flat"}),
        (lambda split, step, layer: (3 - layer) / 3 * min(1, step / 400), {"deeper"}),
        (lambda split, step, layer: layer / 3 * (step / 800) ** 2, {"saturates"}),
        (lambda split, step, layer: layer / 3 * min(1, step / 400), {"unclustered-expressions"}),
    ],
)
def test_worlds_in_which_claims_fail(ari, refuted):
    found = verdicts(world(ari, lambda split, step: 0.2))
    assert found["unseen-strings"] == "negligible"
    assert found["unseen-strings-all"] == "contradicted"
    for claim in refuted:
        assert found[claim] == "contradicted", claim


def test_a_model_that_answers_what_it_cannot_know_contradicts_the_control():
    found = verdicts(world(learns, lambda split, step: 0.99))
    assert found["unseen-expressions"] == "contradicted"


def test_every_figure_draws():
    scores = world(learns, lambda split, step: 0.5)
    states = plane(np.random.default_rng(0).normal(size=(9, 5)), layer=1, task=["a"] * 9, seed=0)
    states = states.assign(instruction="s", template="1.0", input="x")
    assert all(chart.to_dict() for chart in pictures(scores, states).values())


def test_chance_is_the_best_answer_without_the_instruction():
    rows = pd.DataFrame(
        {"split": ["a"] * 5, "input": list("xxxyy"), "output": ["1", "1", "2", "1", "2"]}
    )
    assert input_only_accuracy(rows)["a"] == pytest.approx(3 / 5)


def test_only_inputs_under_several_tasks_are_clustered():
    prompts = lc.tasks.sif(n_tasks=4, n_inputs=5, mappings_per_task=3)
    kept = clustered_prompts(prompts, 4).rows
    assert kept.groupby(["split", "input"])["task"].nunique().min() > 1
    assert kept.groupby(["split", "task", "input"]).size().max() <= 4


def test_frames():
    frame = pd.DataFrame({"s": [0, 0, 0, 1, 1, 1], "a": [1, 2, 3] * 2, "b": [1, 2, 9, 5, 5, 5]})
    assert rank_correlations(frame, "a", "b", by="s").tolist() == [pytest.approx(1), 0]
    assert where(frame, s=1, a=[1, 2]).index.tolist() == [3, 4]
    points = np.random.default_rng(1).normal(size=(20, 6))
    from sklearn.decomposition import PCA

    expected = PCA(2).fit_transform(points)
    np.testing.assert_allclose(np.abs(plane(points)[["x", "y"]]), np.abs(expected), atol=1e-8)


def test_fields_reach_the_config_only_by_name():
    assert Emergence.name() == "emergence"
    assert set(Emergence.presets) == {"smoke", "default", "paper"}
    for preset in Emergence.presets.values():
        Emergence(**preset)


@pytest.mark.slow
def test_the_heads_that_open_are_those_of_the_last_checkpoint(tmp_path):
    smoke = {**Emergence.presets["smoke"]}
    smoke.update(steps=4, n_checkpoints=2, permutations=2)
    study = Emergence(**smoke)
    found = measure(study, 0, tmp_path)
    view = HeadView.from_json(json.loads(found["heads"]["view"].iloc[0]), where="here")
    assert next(iter(view.scores)) == f"{AGREED} at step 4"
    assert f"{AGREED} at step 0" in view.scores
    agreed = where(found["scores"], kind="head", metric=AGREED, by="task", split=UNSEEN)
    row: Any
    for step in (0, 4):
        for row in where(agreed, step=step).itertuples():
            value = view.scores[f"{AGREED} at step {step}"][int(row.layer), int(row.head)]
            assert value == pytest.approx(row.value, abs=1e-4)
    model = lc.load(sorted((tmp_path / "checkpoints").glob("*.safetensors"))[-1])
    assert len(set(view.labels["input"])) == 1
    for sample in view.samples:
        ids = [vocabulary(n_inputs=5).index(token) for token in sample.tokens]
        _, cache = model.run_with_cache(torch.tensor([ids]))
        for (block, head), weights in zip(view.opened, sample.weights, strict=True):
            pattern = cache[f"blocks.{block}.attn.hook_pattern"][0, head].detach().numpy()
            wanted = pattern[np.tril_indices(len(ids))]
            assert np.abs(weights / 255 - wanted).max() <= 0.5 / 255 + 1e-5
