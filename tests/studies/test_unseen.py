"""The study of unseen instances: its claims can fail, and it runs end to end at tiny size."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lensclust as lc
from lensclust.cli.command import main
from probes.steering.interchanges import MEMBER
from studies.synthetic_task import SPLITS, UNSEEN
from studies.unseen import Unseen
from studies.unseen.claims import Pretrained, Synthetic, claims
from studies.unseen.figures import pictures
from studies.unseen.options import ANSWER, INSTRUCTION, MEANS
from studies.unseen.pretrained import measure_pretrained
from studies.unseen.synthetic import _spread

STEPS, LAYERS, SEEDS, N = (0, 50, 400, 800), range(5), range(4), 40
TASKS = ("plural", "past", "upper_case")

# A world in which every claim holds: what is measured, by where and when.
GOOD: dict[str, Callable[..., float]] = {
    "accuracy": lambda split, step: 0.1 + step / 1000,
    "ari": lambda split, step, layer: layer / 4 * step / 900,
    "membership": lambda split, step, layer: (
        0.1 if split == "new_pair" else 0.25 + 0.74 * step / 800
    ),
    "inside": lambda step: 0.9,
    "outside": lambda step: 0.4,
    "auc": lambda layer: 0.8,
    "transport": lambda layer: 0.985 - 0.1 * abs(layer - 3),
    "shift": lambda layer: 0.6 - 0.1 * abs(layer - 3),
    "random": lambda layer: 0.01,
    "early": lambda layer: 0.5 - 0.1 * abs(layer - 1),
    "left": lambda random: 0.9 if random else 0.3,
    "chance": lambda: 0.25,
    "pretrained": lambda layer: 0.9 - 0.2 * abs(layer - 4),
    "pretrained random": lambda layer: 0.01,
    "pretrained ari": lambda layer: layer / 4,
}


def world(**changes: Callable[..., float]) -> pd.DataFrame:
    """Scores as the study collects them, with a little noise."""
    rule = GOOD | {name.replace("_", " "): value for name, value in changes.items()}
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []

    def add(value: float, **labels: Any) -> None:
        rows.append({**labels, "value": value + 0.004 * rng.uniform(-1, 1)})

    for seed in SEEDS:
        own: dict[str, Any] = {"part": "synthetic", "seed": seed}
        for step in STEPS:
            for split in SPLITS:
                here = {**own, "step": step, "split": split, "n": N}
                chance = {"metric": "accuracy", "null_mean": rule["chance"]()}
                add(rule["accuracy"](split, step), **here, **chance)
                for layer in LAYERS:
                    place = {**here, "layer": layer}
                    member = rule["membership"](split, step, layer)
                    add(rule["ari"](split, step, layer), **place, metric="ari")
                    add(member, **place, metric="membership")
                    add(rule["inside"](step), **place, metric="accuracy, right cluster")
                    add(rule["outside"](step), **place, metric="accuracy, wrong cluster")
                    add(rule["auc"](layer), **place, metric="margin AUC")
                    outside = round(N * (1 - member))
                    rows.append({**place, "metric": "in wrong cluster", "value": outside})
        for fold in ("choose", "report"):
            for layer in LAYERS:
                at = {**own, "step": STEPS[-1], "split": UNSEEN, "fold": fold, "layer": layer}
                for position, best, methods in (
                    (ANSWER, "transport", ("transport", "shift")),
                    (INSTRUCTION, "early", ("shift",)),
                ):
                    name = "transport" if best == "transport" else "shift"
                    rates = {m: rule["early" if best == "early" else m](layer) for m in methods}
                    rates[f"random direction, norm of {name}"] = rule["random"](layer)
                    rates[f"{MEANS}, norm of {name}"] = 0.02
                    rates[MEMBER] = 0.97
                    for method, rate in rates.items():
                        add(rate, **at, position=position, method=method, metric="target")
                for name in ("erase", "erase given input"):
                    for suffix in ("", ", random subspace", ", reassigned labels"):
                        left = {**at, "method": name + suffix, "position": ANSWER}
                        add(rule["left"](bool(suffix)), **left, metric="accuracy left")
                        add(0.5, **left, metric="variance removed")
    theirs: dict[str, Any] = {"part": "pretrained", "seed": -1}
    for layer in LAYERS:
        for method, score in (("model", rule["pretrained ari"](layer)), ("words", 0.0)):
            for metric in ("ari", "1nn_accuracy"):
                add(
                    score,
                    **theirs,
                    layer=layer,
                    metric=metric,
                    method=method,
                    null_mean=0.0,
                    null_std=0.02,
                )
        for source in TASKS:
            for target in set(TASKS) - {source}:
                for fold in ("0", "1"):
                    pair = {**theirs, "source": source, "target": target, "fold": fold}
                    pair |= {"layer": layer, "n": 20, "metric": "target", "site": f"resid {layer}"}
                    for method, rate in {
                        "shift": rule["pretrained"](layer),
                        "random direction, norm of shift": rule["pretrained random"](layer),
                        f"{MEANS}, norm of shift": 0.02,
                        MEMBER: 0.8,
                    }.items():
                        add(rate, **pair, method=method)
    return pd.DataFrame(rows)


def verdicts(scores: pd.DataFrame) -> dict[str, str]:
    return {claim.id: claim.verdict for claim in claims(scores)}


def test_a_world_in_which_every_claim_holds():
    found = verdicts(world())
    assert len(found) == 17
    assert set(found.values()) == {"supported"}, found


@pytest.mark.parametrize(
    ("refuted", "changes"),
    [
        ({"tracks-accuracy"}, {"ari": lambda split, step, layer: 0.9 - step / 1000}),
        ({"nearest-centroid"}, {"membership": lambda split, step, layer: 0.6 - 0.4 * step / 800}),
        (
            {"membership-middle", "membership-last"},
            {"inside": lambda step: 0.4, "outside": lambda step: 0.8},
        ),
        ({"margin"}, {"auc": lambda layer: 0.4}),
        ({"new-pairs-elsewhere"}, {"membership": lambda split, step, layer: 0.95}),
        ({"transport"}, {"transport": lambda layer: 0.7}),
        (
            {"random-moves", "instruction-end"},
            {"random": lambda layer: 0.5, "early": lambda layer: 0.3},
        ),
        (
            {"input-conditional"},
            {"shift": lambda layer: 0.995, "transport": lambda layer: 0.96},
        ),
        (
            {
                *("erase", "erase-given-input"),
                *("erase-over-reassigned", "erase-given-input-over-reassigned"),
            },
            {"left": lambda random: 0.3 if random else 0.9},
        ),
        ({"pretrained-shift"}, {"pretrained": lambda layer: 0.3}),
        ({"pretrained-random"}, {"pretrained_random": lambda layer: 0.3}),
        ({"pretrained-layers"}, {"pretrained_ari": lambda layer: 1 - layer / 4}),
    ],
)
def test_worlds_in_which_a_claim_fails(refuted, changes):
    found = verdicts(world(**changes))
    assert {name for name, verdict in found.items() if verdict == "contradicted"} == refuted


def test_effects_within_the_margin_are_negligible():
    found = verdicts(world(early=lambda layer: 0.01, membership=lambda split, step, layer: 0.4))
    assert found["instruction-end"] == found["nearest-centroid"] == "negligible"


def test_accuracy_below_chance_counts_as_chance_on_both_sides():
    """What an erasure breaks below chance is no knowledge of the task, nor is it a control's."""
    both = world(left=lambda random: 0.2 if random else 0.02)
    found = {claim.id: claim for claim in claims(both)}
    assert found["erase"].estimate == pytest.approx(0, abs=0.005)
    one = world(left=lambda random: 0.45 if random else 0.02)
    found = {claim.id: claim for claim in claims(one)}
    assert found["erase"].estimate == pytest.approx(0.2, abs=0.01)
    assert found["erase"].control["input alone"] == pytest.approx(0.25)


def test_membership_and_accuracy_that_only_rise_together_prove_nothing():
    """Over training both rise; inside a checkpoint the cluster says nothing about the answer."""
    rises = {name: lambda step: 0.1 + step / 1000 for name in ("inside", "outside")}
    found = {claim.id: claim for claim in claims(world(**rises))}
    for name in ("membership-middle", "membership-last"):
        assert abs(found[name].estimate) < 0.01


def test_one_seed_decides_nothing_but_what_varies_over_pairs():
    scores = world()
    found = verdicts(scores[scores["seed"] <= 0])
    pretrained = {name for name in found if name.startswith("pretrained")}
    assert {found[name] for name in pretrained} == {"supported"}
    assert {found[name] for name in set(found) - pretrained} == {"inconclusive"}


def test_erasures_are_fitted_on_all_expressions_in_turn():
    prompts = lc.tasks.sif(
        n_tasks=4, n_inputs=5, mappings_per_task=4, regexes_per_task=3, rows_per_mapping=4, seed=0
    ).where(split="train")
    chosen = _spread(prompts, 6).rows
    sizes = chosen.groupby(["task", "input", "template"]).size()
    assert (sizes.groupby(["task", "input"]).sum() == 6).all()
    there = prompts.rows.groupby(["task", "input"])["template"].nunique()
    np.testing.assert_array_equal(chosen.groupby(["task", "input"])["template"].nunique(), there)
    spans = sizes.groupby(["task", "input"]).agg(lambda each: each.max() - each.min())
    assert spans.max() <= 1
    assert there.max() > 1


def test_without_a_pretrained_model_its_claims_are_left_out():
    scores = world()
    own = scores[scores["part"] == "synthetic"]
    assert len(claims(own)) == 14
    assert not [name for name in pictures(own) if name.startswith("pretrained")]


def test_a_model_that_is_always_inside_its_clusters_leaves_claims_open():
    always = world(membership=lambda split, step, layer: 0.99)
    always.loc[always["metric"] == "accuracy, wrong cluster", "value"] = np.nan
    always.loc[always["metric"] == "margin AUC", "value"] = np.nan
    found = {claim.id: claim for claim in claims(always)}
    for name in ("membership-middle", "membership-last", "margin"):
        assert found[name].verdict == "inconclusive"
        assert found[name].to_json()["estimate"] is None


@pytest.mark.parametrize("n_layers", [60])
def test_the_best_of_many_noisy_layers_is_not_better_than_one(n_layers):
    rng = np.random.default_rng(0)
    keys = [
        {"layer": layer, "fold": fold, "metric": "target", "seed": seed}
        for layer in range(n_layers) for fold in ("choose", "report") for seed in range(60)
    ]  # fmt: skip
    own = pd.DataFrame(keys).assign(
        part="synthetic", step=1, position=ANSWER, method="shift", value=rng.normal(size=len(keys))
    )
    best = own[own["fold"] == "report"].groupby("seed")["value"].max()
    honest = Synthetic(own).moved("shift")
    assert best.mean() > 1.5
    assert abs(honest.mean()) < 4 / np.sqrt(60)
    pairs = [(a, b) for a in "abcdefgh" for b in "abcdefgh" if a != b]
    keys = [
        {"layer": layer, "fold": fold, "source": a, "target": b}
        for layer in range(n_layers) for fold in "01" for a, b in pairs
    ]  # fmt: skip
    theirs = pd.DataFrame(keys).assign(
        part="pretrained", metric="target", method="shift", n=5, value=rng.normal(size=len(keys))
    )
    assert abs(Pretrained(theirs).at_best("shift").mean()) < 4 / np.sqrt(2 * len(pairs))


def test_every_figure_draws():
    assert all(chart.to_dict() for chart in pictures(world()).values())


TINY: dict[str, Any] = {
    "n_tasks": 3, "n_inputs": 4, "mappings_per_task": 3, "regexes_per_task": 2,
    "held_out_regexes": 1, "rows_per_mapping": 4, "steps": 6, "n_checkpoints": 4,
    "permutations": 1, "pretrained": "none",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("parts", ["synthetic alone", "both"])
def test_a_tiny_run_leaves_claims_and_a_page_and_resumes_to_the_same(tmp_path, parts):
    out, fields = tmp_path / "run", dict(TINY)
    if parts == "both":
        fields |= {"pretrained": word_model(tmp_path / "model", taught=True), "layer_stride": 2}
        fields |= {"shots": 2, "draws": 2}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]
    options += ["--tasks", *TASKS] if parts == "both" else []
    command = ["run", "unseen", *options, "--seeds", "1", "--jobs", "1", "--quiet"]
    assert main([*command, "--out", str(out)]) == 0
    found = json.loads((out / "claims.json").read_text())
    ids = {claim["id"] for claim in found}
    assert {"transport", "erase", "nearest-centroid", "instruction-end"} <= ids
    assert ("pretrained-shift" in ids) == (parts == "both")
    ours = [claim for claim in found if not claim["id"].startswith("pretrained")]
    assert {claim["verdict"] for claim in ours} == {"inconclusive"}
    scores = pd.read_parquet(out / "scores.parquet")
    rates = scores[scores["metric"].isin(["target", "source", "other"])]
    rates = rates[rates["part"] == "synthetic"]
    total = rates.groupby(["position", "fold", "layer", "method"])["value"].sum()
    np.testing.assert_allclose(total, 1)
    assert set(rates["position"]) == {ANSWER, INSTRUCTION}
    page = (out / "report.html").read_text()
    assert ("No pretrained model was run" in page) == (parts == "synthetic alone")
    before = (out / "claims.json").read_bytes()
    assert main([*command, "--out", str(out), "--resume"]) == 0
    assert (out / "claims.json").read_bytes() == before


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--n-tasks=2", "n_tasks=2: expected at least 3"),
        ("--held-out-regexes=0", "held_out_regexes=0: expected at least 1"),
        ("--rows-per-mapping=1", "rows_per_mapping=1: expected at least 2"),
        ("--n-checkpoints=3", "n_checkpoints=3: expected at least 4"),
        ("--permutations=0", "permutations=0: expected at least 1"),
        ("--rounds=0", "rounds=0: expected at least 1"),
        ("--shots=0", "shots=0: expected at least 1"),
        ("--draws=1", "draws=1: expected at least 2"),
        ("--layer-stride=0", "layer_stride=0: expected at least 1"),
        ("--mappings-per-task=99", "mappings_per_task"),
        ("--tasks mood plural", "tasks: no 'mood': there are"),
        ("--tasks plural", "expected two or more, all different"),
        ("--tasks plural plural", "expected two or more, all different"),
    ],
)
def test_unusable_fields_are_one_line_and_nothing_is_written(tmp_path, capsys, option, message):
    out = tmp_path / "run"
    assert main(["run", "unseen", *option.split(), "--out", str(out), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not out.exists()


# -- the pretrained part ----------------------------------------------------------------------


def word_model(folder: Any, *, taught: bool) -> str:
    """A tiny Llama and a tokenizer of whole words; taught, it has learnt these few-shot prompts."""
    from importlib.resources import files

    data = json.loads(files("lensclust.tasks.words").joinpath("natural.json").read_text("utf-8"))
    words = set(data["answers"]) | {"->"}
    words |= {data["answers"][word][task] for word in data["answers"] for task in TASKS}
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<pad>", *sorted(words)])}
    tokens: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(vocabulary), hidden_size=48, intermediate_size=96,
                num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
                max_position_embeddings=32, bos_token_id=1, eos_token_id=1, pad_token_id=1,
            )
        )  # fmt: skip
        if taught:
            teach(model, PreTrainedTokenizerFast.from_pretrained(folder))
    model.save_pretrained(folder)
    return str(folder)


def teach(model: Any, tokenizer: Any) -> None:
    prompts = lc.tasks.icl(lc.tasks.natural(tokenizer, tasks=TASKS), tokenizer, shots=2, draws=2)
    assert prompts.answers is not None
    wanted = torch.tensor([answer[0] for answer in prompts.answers])
    last = prompts.lengths - 1
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rows = torch.arange(len(prompts))
    for _ in range(80):
        logits = model(prompts.tokens).logits[rows, last]
        loss = torch.nn.functional.cross_entropy(logits, wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        found = model(prompts.tokens).logits[rows, last].argmax(-1)
    assert (found == wanted).float().mean() > 0.9


def few_shot(model: str) -> Unseen:
    return Unseen(pretrained=model, tasks=TASKS, shots=2, draws=2, layer_stride=2)


def test_the_pretrained_part_moves_what_the_model_does(tmp_path):
    found = measure_pretrained(few_shot(word_model(tmp_path, taught=True)))
    scores = found["scores"]
    accuracy = scores[scores["metric"] == "accuracy"].set_index("source")["value"]
    assert set(accuracy.index) == set(TASKS)
    assert (accuracy > 0.5).all()
    moved = scores[scores["fold"].notna()]
    assert set(moved["layer"]) == {0, 2}
    pairs = moved.groupby(["fold", "layer", "method", "source", "target"])["value"]
    np.testing.assert_allclose(pairs.sum(), 1)
    # At the last layer another prompt of the target task and the same query, which is answered
    # right, is all that there is.
    member = moved.query(f"layer == 2 and method == {MEMBER!r} and metric == 'target'")
    assert (member["value"] == 1).all()
    assert found["weights"]["fingerprint"].notna().all()
    both = pd.concat([world().query("part == 'synthetic'"), scores], ignore_index=True)
    assert {c.id for c in claims(both)} >= {"pretrained-shift", "pretrained-layers"}
    assert all(chart.to_dict() for chart in pictures(both).values())


def test_a_model_that_answers_nothing_is_refused_in_one_clear_line(tmp_path):
    with pytest.raises(lc.InputError, match="few-shot") as caught:
        measure_pretrained(few_shot(word_model(tmp_path, taught=False)))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_pretrained_part_on_a_real_model():
    try:
        lc.load("smollm2-135m-instruct", progress=False)
    except lc.InputError as error:
        pytest.skip(f"the model cannot be downloaded: {error}")
    scores = measure_pretrained(Unseen(layer_stride=10))["scores"]
    own = pd.concat([world().query("part == 'synthetic'"), scores], ignore_index=True)
    found = {claim.id: claim for claim in claims(own)}
    assert found["pretrained-shift"].estimate > 5 * found["pretrained-random"].estimate
