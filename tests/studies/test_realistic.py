"""The realistic study, end to end on a tiny model and a tiny folder; its selection is unbiased."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

import lensclust as lc
from lensclust.views import HeadView
from studies.realistic import Realistic
from studies.realistic_findings import best_by_group, claims, notes
from tests.tiny import hf_model, tiny_tokenizer


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A model directory and a folder of three tasks with four instructions each."""
    root = tmp_path_factory.mktemp("realistic")
    tokenizer = tiny_tokenizer(root / "model")
    tokenizer.save_pretrained(root / "model")
    hf_model("llama").save_pretrained(root / "model")
    for task in range(3):
        annotations = [f"w{task} w{10 + task} w{20 + task} w{50 + i}" for i in range(4)]
        examples = {str(i): {"input": f"w{30 + 6 * task + i}", "output": "w9"} for i in range(6)}
        for part, content in {
            "annotations": {"annotations": annotations},
            "execute": {"metadata": {"num_examples": 6}, "examples": examples},
        }.items():
            (root / "data" / part).mkdir(parents=True, exist_ok=True)
            (root / "data" / part / f"task{task}.json").write_text(json.dumps(content))
    return root


def test_a_folder_and_a_model_directory_give_a_run(sources, tmp_path):
    study = Realistic(
        model=str(sources / "model"), data=sources / "data", inputs=4, control_inputs=2,
        permutations=5,
    )  # fmt: skip
    findings = study.execute(tmp_path / "run", jobs=1, progress=False)
    assert {claim.id for claim in findings.claims} >= {"above-wording", "above-random-weights"}
    # The task's own word stands in every instruction: the page must say that the words suffice.
    assert any("bag of tokens baseline is high" in note for note in findings.notes)
    assert (tmp_path / "run" / "report.html").exists()
    kept = ["claims.json", "views/2_heads.json"]
    before = [(tmp_path / "run" / name).read_bytes() for name in kept]
    study.execute(tmp_path / "run", resume=True, jobs=1, progress=False)
    assert [(tmp_path / "run" / name).read_bytes() for name in kept] == before
    check_heads(study, tmp_path / "run", findings.scores)


def check_heads(study, run, scores):
    """What opens is the model's: scores, and attention on prompts of one fold."""
    view = HeadView.from_json(json.loads((run / "views" / "2_heads.json").read_text()), where="run")
    ari = scores[(scores["metric"] == "ari") & (scores["kind"] == "head")]
    ari = ari[(ari["by"] == "task") & (ari["source"] == "model")].set_index(["layer", "head"])
    assert len(view.opened) == view.scores["ari"].size == len(ari)
    for place, row in ari.iterrows():
        assert view.scores["ari"][place] == pytest.approx(row["value"], abs=1e-4)
        assert view.scores["ari, permuted labels"][place] == pytest.approx(
            row["null_mean"], abs=1e-4
        )
    model = lc.load(study.model)
    assert {sample.name.partition(":")[0] for sample in view.samples} == set(view.labels["task"])
    for sample in view.samples:
        text = sample.name.partition(": ")[2]
        _, cache = model.run_with_cache(model.to_tokens(text))
        for (block, head), weights in zip(view.opened, sample.weights, strict=True):
            pattern = cache[f"blocks.{block}.attn.hook_pattern"][0, head].detach().numpy()
            wanted = pattern[np.tril_indices(len(sample.tokens))]
            assert np.abs(weights / 255 - wanted).max() <= 0.5 / 255 + 1e-5


def test_folds_hold_every_instruction_once_and_mix_inputs(sources):
    study = Realistic(model=str(sources / "model"), data=sources / "data", inputs=4)
    rows = study.prompts(lc.load(str(sources / "model")).tokenizer).rows
    assert (rows.groupby(["fold", "instruction"]).size() == 1).all()
    assert (rows.groupby(["fold", "task"])["input"].nunique() == 4).all()


def groups_of_noise(n_sites: int = 40, n_groups: int = 24) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for source in ("model", "bag of tokens", "random weights"):
        for layer in range(n_sites if source == "model" else 1):
            for group in range(n_groups):
                rows += [
                    {"source": source, "seed": 0, "kind": "resid", "site": f"resid {layer}",
                     "layer": layer, "by": "task", "metric": metric, "group": f"{group:02d}",
                     "value": rng.normal()}
                    for metric in ("ari", "1nn_accuracy")
                ]  # fmt: skip
    return pd.DataFrame(rows)


def test_the_best_of_many_noisy_sites_is_not_better_than_one():
    noise = groups_of_noise()
    naive = noise.query("source == 'model' and metric == 'ari'").groupby("site")["value"].mean()
    honest = best_by_group(noise, "ari")["model"]
    assert naive.max() > 0.3
    assert abs(honest.mean()) < 3 * honest.std() / np.sqrt(len(honest))


def test_a_control_that_read_few_inputs_is_still_cross_fitted():
    noise = groups_of_noise(n_sites=3)
    few = noise["group"].isin(["00", "02"]) | (noise["source"] != "random weights")
    found = best_by_group(noise[few], "ari")["random weights"]
    assert found.notna().sum() == 2


def test_noise_supports_no_claim():
    groups = groups_of_noise()
    scores = groups.groupby(["source", "seed", "kind", "site", "layer", "by", "metric"])["value"]
    frame = scores.mean().reset_index().assign(given="none", null_mean=0.0)
    found = claims(frame, groups, "input")
    assert not [claim.id for claim in found if claim.verdict == "supported"]
    assert notes(frame, groups, "input")


def test_a_high_baseline_is_said_aloud():
    groups = groups_of_noise().assign(value=lambda f: f["value"] * 0 + 0.5)
    groups.loc[groups["source"] == "random weights", "value"] = 0.0
    scores = groups.groupby(["source", "seed", "kind", "site", "layer", "by", "metric"])["value"]
    said = notes(scores.mean().reset_index().assign(given="none"), groups, "fold")
    assert [note for note in said if "baseline is high" in note] == [
        "The bag of tokens baseline is high: 0.50 against 0.50 for the model. Prompts of one task "
        "share words here, so these clusters alone prove little."
    ]
