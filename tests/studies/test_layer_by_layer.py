"""The layer-by-layer study's claims can fail: planted worlds in which they do."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

import lensclust as lc
from studies.layer_by_layer import LayerByLayer
from studies.layer_by_layer.claims import GAIN, claims, pictures, transitions
from studies.layer_by_layer.options import CEILING, MULTI, OTHER, PAIRS, UNTRAINED
from studies.layer_by_layer.synthetic import compare, task_set

LAYERS, TASKS, SEEDS = range(13), range(3), range(4)
LEVELS = {MULTI: 0.7, CEILING: 0.9, OTHER: 0.4, UNTRAINED: 0.2}


def world(
    cka: Callable[[str, int], float], accuracy: float = 0.99, *, spread: float = 0.01
) -> pd.DataFrame:
    """Scores as the study collects them, from a rule for CKA."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for seed in SEEDS:
        for task in TASKS:
            shared = {"seed": seed, "task": task}
            rows += [
                {**shared, "pair": pair, "metric": "accuracy", "value": accuracy}
                for pair in ("specialist", *PAIRS)
            ]
            rows += [
                {**shared, "pair": pair, "layer": layer, "metric": metric}
                | {"null_mean": 0.0, "null_std": 0.02, "p": 0.01}
                | {"value": cka(pair, layer) + spread * rng.normal()}
                for pair in PAIRS
                for layer in LAYERS
                for metric in ("cka", "cka_debiased")
            ]
    return pd.DataFrame(rows)


def stepped(pair: str, layer: int) -> float:
    """Shared up to layer 4, less so after it, for all but the untrained model."""
    return LEVELS[pair] + 0.1 * (layer < 5) * (pair != UNTRAINED)


def verdicts(scores: pd.DataFrame) -> dict[str, str]:
    return {claim.id: claim.verdict for claim in claims(scores, transitions(scores))}


def test_a_world_as_the_paper_has_it_supports_the_claims():
    scores = world(stepped)
    assert set(verdicts(scores).values()) == {"supported"}
    places = transitions(scores)
    own = places[places["pair"] == GAIN]
    assert (own["first"] == 5).all()
    assert (own["last"] == 5).all()
    assert len(own) == len(SEEDS) + 1
    assert (places[places["pair"] == UNTRAINED]["value"] == 0).all()


@pytest.mark.parametrize(
    ("cka", "refuted"),
    [
        (lambda pair, layer: 0.2 + 0.1 * (pair == UNTRAINED), {"holds", "transition"}),
        (lambda pair, layer: 0.5 + 0.2 * (pair == OTHER), {"own-task"}),
        (lambda pair, layer: 0.5 + 0.2 * (pair == MULTI), {"not-all"}),
        (lambda pair, layer: stepped(pair, 12 - layer), {"lower-shared", "early"}),
        (lambda pair, layer: LEVELS[pair] - 0.02 * layer, {"transition"}),
    ],
)
def test_worlds_in_which_claims_fail(cka, refuted):
    found = verdicts(world(cka, 0.5))
    assert found["learned"] == "contradicted"
    for claim in refuted:
        assert found[claim] == "contradicted", claim


def test_a_break_that_the_untrained_model_has_too_is_no_transition():
    def broken(pair: str, layer: int) -> float:
        return LEVELS[pair] + 0.1 * (layer < 5)

    scores = world(broken)
    places = transitions(scores).groupby("pair")["value"].max()
    assert places[MULTI] == places[UNTRAINED] == 1
    assert verdicts(scores)["transition"] == "contradicted"


def test_without_a_transition_its_place_is_left_open():
    scores = world(lambda pair, layer: LEVELS[pair])
    found = {claim.id: claim for claim in claims(scores, transitions(scores))}
    assert found["early"].verdict == "inconclusive"
    assert found["early"].n_seeds == 0
    assert found["early"].control["share of seeds with one"] == 0


def test_every_figure_draws():
    scores = world(stepped)
    assert all(chart.to_dict() for chart in pictures(scores, transitions(scores)).values())


def test_a_model_is_most_like_itself_and_scores_are_those_of_two_models():
    prompts = lc.tasks.sif(n_tasks=2, n_inputs=4, mappings_per_task=3).where(split="new_string")
    one, other = (lc.load("native:sif-small", seed=seed) for seed in (0, 1))
    found = compare(one, {"same": one, "other": other}, prompts)
    plain = found[found["metric"] == "cka"]
    assert np.allclose(plain[plain["pair"] == "same"]["value"], 1, atol=1e-5)
    assert (plain[plain["pair"] == "other"]["value"] < 0.999).all()
    assert set(found[found["metric"] == "accuracy"]["pair"]) == {"specialist", "same", "other"}


def test_specialists_know_one_task_of_the_vocabulary_of_all():
    from lensclust.training.data import required_sizes

    prompts = task_set(LayerByLayer(n_tasks=3), 0)
    whole = required_sizes(prompts)
    for task in range(3):
        assert required_sizes(prompts.where(task=task)) == whole


TINY: dict[str, Any] = {
    "n_layers": 6, "n_tasks": 2, "specialists": 2, "n_inputs": 4, "mappings_per_task": 3,
    "regexes_per_task": 2, "rows_per_mapping": 4, "steps": 4, "specialist_steps": 2,
}  # fmt: skip


def test_a_tiny_run_leaves_claims_and_a_page_and_resumes_to_the_same(tmp_path):
    out, study = tmp_path / "run", LayerByLayer(**TINY)
    options: dict[str, Any] = {"seeds": 1, "jobs": 1, "progress": False}
    study.execute(out, **options)
    found = json.loads((out / "claims.json").read_text())
    assert {claim["verdict"] for claim in found} == {"inconclusive"}
    assert "at second hand" in (out / "report.html").read_text()
    before = (out / "claims.json").read_bytes()
    # What was done is not done again, and what was not is.
    (out / "parts" / "seed-0" / "frames").rename(tmp_path / "frames")
    study.execute(out, resume=True, **options)
    assert (out / "claims.json").read_bytes() == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layers": 5}, "n_layers=5: expected at least 6"),
        ({"specialists": 1}, "specialists=1: expected at least 2"),
        ({"specialists": 7}, "specialists=7: expected at most n_tasks=6"),
        ({"mappings_per_task": 1}, "mappings_per_task=1"),
    ],
)
def test_what_would_leave_a_claim_open_is_refused(tmp_path, fields, message):
    out = tmp_path / "run"
    with pytest.raises(lc.InputError, match=message):
        LayerByLayer(**fields).execute(out, progress=False)
    assert not out.exists()


def test_fields_reach_the_config_only_by_name():
    assert LayerByLayer.name() == "layer_by_layer"
    assert set(LayerByLayer.presets) == {"smoke", "default", "paper"}
    for preset in LayerByLayer.presets.values():
        LayerByLayer(**preset).check()
