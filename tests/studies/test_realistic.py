"""The realistic study, end to end on a tiny model and a tiny folder; its selection is unbiased."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import lensclust as lc
from lensclust.report.views.heads import HeadView
from probes.clustering.agreement import counted_agreement
from studies.realistic import Realistic
from studies.realistic.claims import (
    HELD_OUT,
    HELD_OUT_WORDS,
    MODEL,
    RANDOM,
    WORDS,
    Evidence,
    claims,
    notes,
)
from studies.realistic.pretrained import prompts_of
from studies.realistic.units import Source, agreed_at, redrawn
from studies.scales import AGREED
from studies.scores import where
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
    rows = prompts_of(study, lc.load(str(sources / "model")).tokenizer).rows
    assert (rows.groupby(["fold", "instruction"]).size() == 1).all()
    assert (rows.groupby(["fold", "task"])["input"].nunique() == 4).all()


TASKS, WORDINGS = 4, 5
GIVEN = 12


def source(
    name: str, *, n_sites: int = 6, n_groups: int = GIVEN, knows: str | None = None, seed: int = 0
) -> Source:
    """Partitions of prompts at random, or by the column that the states are to know."""
    rng = np.random.default_rng([seed, len(name)])
    cells = [
        (f"{group:02d}", task, wording)
        for group in range(n_groups)
        for task in range(TASKS)
        for wording in range(WORDINGS)
    ]
    group, task, wording = (np.array(column) for column in zip(*cells, strict=True))
    labels = {"task": task, "template": wording, "instruction": task * WORDINGS + wording}
    clusters = rng.integers(0, TASKS, size=(n_sites, len(cells)))
    if knows is not None:
        # At the last site, but for some prompts.
        known = rng.permutation(labels[knows].max() + 1)[labels[knows]] % TASKS
        clusters[-1] = np.where(rng.random(len(cells)) < 0.8, known, clusters[-1])
    rows = []
    for site in range(n_sites):
        for one in np.unique(group):
            part = group == one
            for by in ("task", "template"):
                codes = (clusters[site][part], labels[by][part], labels["instruction"][part])
                agreed = counted_agreement(*codes, np.ones((1, int(part.sum()))))[0]
                rows += [
                    {"kind": "resid", "site": f"resid {site}", "layer": site, "by": by,
                     "metric": metric, "group": one, "value": agreed}
                    for metric in (AGREED, "1nn_accuracy")
                ]  # fmt: skip
    assignments = xr.DataArray(
        clusters,
        dims=("site", "prompt"),
        coords={"site": [f"resid {site}" for site in range(n_sites)]}
        | {key: ("prompt", values) for key, values in (labels | {"input": group}).items()},
    )
    return Source(name, 0, pd.DataFrame(rows), assignments, "input")


def run_of(*sources: Source) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores and neighbours as the study collects them."""
    groups = pd.concat([each.groups.assign(source=each.name, seed=each.seed) for each in sources])
    keys = ["source", "seed", "kind", "site", "layer", "by", "metric"]
    scores = groups.groupby(keys)["value"].mean().reset_index().assign(null_mean=0.0)
    scores = scores.assign(given="input")
    together = scores[scores["metric"] == AGREED].assign(given="none", metric="ari")
    rng = np.random.default_rng(0)
    near = pd.concat(
        [
            pd.DataFrame(
                {
                    "source": each.name,
                    "group": each.clusters["input"].values,
                    "instruction": each.clusters["instruction"].values,
                    "prompt": [str(i) for i in range(each.clusters.sizes["prompt"])],
                    "value": rng.integers(0, 2, each.clusters.sizes["prompt"]).astype(float),
                }
            )
            for each in sources
        ]
    )
    scores.loc[scores["metric"] == "1nn_accuracy", "null_mean"] = 0.5
    return pd.concat([scores, together]), near


def verdicts(*sources: Source) -> dict[str, str]:
    scores, near = run_of(*sources)
    return {claim.id: claim.verdict for claim in claims(scores, Evidence(sources, "input"), near)}


def of_all(**options: str) -> list[Source]:
    names = (MODEL, WORDS, RANDOM, HELD_OUT, HELD_OUT_WORDS)
    return [source(name, knows=options.get(name.replace(" ", "_"))) for name in names]


ON_TASKS = {
    "clusters", "above-wording", "above-random-weights", "held-out-wordings",
    "held-out-above-wording", "not-template",
}  # fmt: skip


def test_clusters_by_task_are_found_and_stay_below_the_models_own_score():
    found = verdicts(*of_all(**{"model": "task", "model,_held-out_wordings": "task"}))
    assert {claim for claim in ON_TASKS if found[claim] == "supported"} == ON_TASKS
    scores, near = run_of(*(parts := of_all(model="task")))
    decided = {claim.id: claim for claim in claims(scores, Evidence(parts, "input"), near)}
    own = decided["clusters"].estimate
    for claim in decided.values():
        if "above" in claim.id and claim.id != "neighbours-above-words":
            assert claim.estimate <= own + 1e-9


@pytest.mark.parametrize("knows", [None, "instruction", "template"])
def test_states_that_know_no_task_support_no_claim_on_tasks(knows):
    named = {"model": knows, "model,_held-out_wordings": knows}
    parts = of_all(**{name: value for name, value in named.items() if value})
    found = verdicts(*parts)
    assert not [claim for claim in ON_TASKS if found[claim] == "supported"]
    assert notes(run_of(*parts)[0], Evidence(parts, "input"))


def test_words_that_tell_the_task_leave_nothing_beyond_them():
    found = verdicts(*of_all(model="task", bag_of_tokens="task"))
    assert found["clusters"] == "supported"
    assert found["above-wording"] != "supported"


def test_the_best_of_many_noisy_sites_is_not_better_than_one():
    noise = source(MODEL, n_sites=60, n_groups=24)
    naive = where(noise.groups, by="task", metric=AGREED).groupby("site")["value"].mean().max()
    honest = agreed_at([noise]).mean()
    assert naive > 0.02
    assert honest.low < 0 < honest.high


def test_a_control_that_read_few_inputs_is_compared_on_those():
    parts = [source(MODEL, knows="task"), source(WORDS), source(RANDOM, n_groups=2)]
    found = agreed_at(parts[:1]).above(agreed_at(parts[2:]))
    assert found.n == 2


@pytest.mark.parametrize("misread", [0.02, 0.2, 0.6])
def test_intervals_over_inputs_and_wordings_hold_the_truth(misread):
    """Wordings are misread at every input, inputs in every wording, and prompts by themselves."""
    rng = np.random.default_rng(0)
    inputs = [f"{group:02d}" for group in range(8)]
    cells = [(i, t, w) for i in inputs for t in range(TASKS) for w in range(WORDINGS)]
    group, task, wording = (np.array(column) for column in zip(*cells, strict=True))
    labels = {"input": group, "task": task, "instruction": task * WORDINGS + wording}
    found = []
    for _ in range(80):
        by_wording = rng.random(TASKS * WORDINGS) < misread
        by_input = rng.random(len(inputs)) < misread / 4
        wrong = by_wording[labels["instruction"]] | by_input[group.astype(int)]
        wrong |= rng.random(len(cells)) < misread / 2
        clusters = np.where(wrong, rng.integers(0, TASKS, len(cells)), task)
        assignments = xr.DataArray(
            clusters[None],
            dims=("site", "prompt"),
            coords={"site": ["resid 0"]} | {k: ("prompt", v) for k, v in labels.items()},
        )
        parts = Source(MODEL, 0, pd.DataFrame(), assignments, "input")
        found.append(redrawn(parts, dict.fromkeys(inputs, "resid 0")).mean())
    truth = float(np.mean([each.value for each in found]))
    assert np.mean([each.low <= truth <= each.high for each in found]) >= 0.9
    assert all(-1 <= each.low < each.high <= 1 for each in found)


def test_a_high_baseline_is_said_aloud():
    parts = of_all(model="task", bag_of_tokens="task")
    said = notes(run_of(*parts)[0], Evidence(parts, "input"))
    (high,) = [note for note in said if "baseline is high" in note]
    assert high.startswith("The bag of tokens baseline is high")
