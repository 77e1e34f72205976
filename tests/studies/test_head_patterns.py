"""The study of head patterns: its claims can fail, and it runs end to end at tiny size."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from hypothesis import given, settings, strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import lensclust as lc
from lensclust.tasks.synthetic.composed import composed
from studies.head_patterns import HeadPatterns
from studies.head_patterns.claims import claims
from studies.head_patterns.figures import pictures
from studies.head_patterns.mixes import Mixes, alike_to
from studies.head_patterns.scores import composition, concentration, derived, separation, speed
from studies.head_patterns.synthetic import prompts_of, tasks_of
from studies.head_patterns.tuning import Task, split_tests, spread_counts
from tests.tiny import byte_tokenizer

SEEDS, RUNS, SAMPLES = range(5), range(2), (0, 10, 100)
TASKS = {
    "a": ("basic", ""), "b": ("basic", ""), "b after a": ("complex", "a & b"),
    "c": ("basic", ""), "d": ("basic", ""), "d after c": ("complex", "c & d"),
    "e": ("control", ""), "f": ("control", ""),
}  # fmt: skip
BLOCKS, HEADS = 5, 6

# A world in which every claim holds: what is measured, by where and when.
GOOD: dict[str, Callable[..., float]] = {
    "same task": lambda stage: 0.9,
    "other tasks": lambda stage: {"before": 0.8, "after": 0.4}[stage],
    "gini": lambda stage: {"before": 0.5, "after": 0.3}[stage],
    "r2_out": lambda method, form: {"parts": 0.8, "parts of other tasks": 0.3}.get(method, 0.2),
    "way": lambda method: {"pattern": 0.8, "loss": 0.4}.get(method, 0.7),
    "fitted mix": lambda: 0.7,
    "even mix": lambda: 0.6,
    "random mix": lambda: 0.5,
    "parts alone": lambda: 0.75,
    "its own examples": lambda: 0.3,
    "most similar": lambda: 0.65,
    "drawn at random": lambda: 0.5,
    "least similar": lambda: 0.4,
    "growth": lambda head: head / HEADS,
    "ari": lambda head: head / HEADS,
}
ARMS = [*GOOD][5:13]


def world(**changes: Callable[..., float]) -> pd.DataFrame:
    """Scores as the study collects them, with a little noise."""
    rule = GOOD | {name.replace("_", " "): value for name, value in changes.items()}
    rule |= {"r2_out": changes.get("r2_out", GOOD["r2_out"])}
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []

    def add(value: float, **labels: Any) -> None:
        rows.append({**labels, "value": value + 0.004 * rng.uniform(-1, 1)})

    for part, seeds in (("synthetic", SEEDS), ("pretrained", range(1))):
        for seed in seeds:
            for task, (kind, parts) in TASKS.items():
                own = {"part": part, "seed": seed, "task": task, "kind": kind, "parts": parts}
                for run in RUNS:
                    add(1.0, **own, run=run, metric="activation", block=0, head=0, samples=0)
                for stage in ("before", "after"):
                    for method in ("same task", "other tasks"):
                        value = rule[method](stage)
                        add(value, **own, metric="similarity", method=method, stage=stage)
                    for other in TASKS:
                        if other != task:
                            pair = {"method": "pair", "other": other, "stage": stage}
                            add(rule["other tasks"](stage), **own, metric="similarity", **pair)
                    add(0.5, **own, metric="similarity", method="dealt", stage=stage)
                    add(1.0, **own, metric="identified", method="model", stage=stage)
                    add(0.5, **own, metric="learned", method="model", stage=stage)
                    for metric in ("gini", "cv", "kurtosis"):
                        value = rule["gini"](stage)
                        add(value, **own, metric=metric, method="model", stage=stage)
                    add(0.01, **own, metric="gini", method="noise", stage="before")
                for method in ("pattern", "correlation", "loss"):
                    add(rule["way"](method), **own, metric="way", method=method)
                    for seen in SAMPLES:
                        add(seen / 100, **own, metric="way so far", method=method, samples=seen)
                if kind != "complex":
                    continue
                for form in ("raw", "shares"):
                    for run in RUNS:
                        here = {**own, "form": form, "run": run}
                        for method in (
                            "parts", "parts of other tasks", "controls", "shared", "random",
                            "permuted",
                        ):  # fmt: skip
                            value = rule["r2_out"](method, form)
                            add(value, **here, metric="r2_out", method=method)
                            add(0.9, **here, metric="r2", method=method)
                            add(0.01, **here, metric="r2_out p", method=method)
                if part == "pretrained":
                    continue
                for method in ARMS:
                    add(rule[method](), **own, metric="accuracy", method=method)
                    add(1.0, **own, metric="loss", method=method)
                    add(1000.0, **own, metric="tokens", method=method)
                for basic in ("a", "b", "c", "d", "e", "f"):
                    add(1 / 6, **own, metric="coefficient", method=basic)
            if part == "synthetic":
                for block in range(BLOCKS):
                    for head in range(HEADS):
                        here = {"part": part, "seed": seed, "block": block, "head": head}
                        add(rule["growth"](head), **here, metric="growth")
                        # What a layer has in common must not count.
                        add(rule["ari"](head) - 3 * block, **here, metric="ari")
    return pd.DataFrame(rows)


def verdicts(scores: pd.DataFrame) -> dict[str, str]:
    return {claim.id: claim.verdict for claim in claims(scores)}


def test_a_world_in_which_every_claim_holds():
    found = verdicts(world())
    assert len(found) == 21
    assert set(found.values()) == {"supported"}, found


def both(*names: str) -> set[str]:
    return {f"{name}{part}" for name in names for part in ("", "-pretrained")}


def only(name: str, form: str | None = None) -> Callable[..., float]:
    """R² as good by one null as by the parts."""
    return lambda method, made: (
        0.3 if method == "parts" else 0.9 if method == name and form in (None, made) else 0.1
    )


@pytest.mark.parametrize(
    ("refuted", "changes"),
    [
        (both("task-over-seed"), {"same_task": lambda s: 0.3}),
        (both("tuning-separates"), {"other_tasks": lambda stage: 0.4 + 0.2 * (stage == "after")}),
        (both("less-concentrated"), {"gini": lambda stage: 0.5 + 0.1 * (stage == "after")}),
        *(
            (both("composition", "composition-of-shares"), {"r2_out": only(null)})
            for null in ("parts of other tasks", "controls", "shared", "random", "permuted")
        ),
        (both("composition"), {"r2_out": only("shared", "raw")}),
        (both("composition-of-shares"), {"r2_out": only("shared", "shares")}),
        (both("half-way"), {"way": lambda method: {"pattern": 0.3, "loss": 0.2}.get(method, 0.3)}),
        (
            both("half-way", "few-samples"),
            {"way": lambda method: {"pattern": 0.05, "loss": 0.0}.get(method, 0.3)},
        ),
        (both("pattern-before-loss"), {"way": lambda method: 0.7 + 0.2 * (method == "loss")}),
        ({"fitted-over-even"}, {"even_mix": lambda: 0.8}),
        ({"fitted-over-random"}, {"random_mix": lambda: 0.8}),
        ({"fitted-over-none"}, {"its_own_examples": lambda: 0.8}),
        ({"similar-examples"}, {"drawn_at_random": lambda: 0.8}),
        ({"growing-heads-cluster"}, {"growth": lambda head: -head / HEADS}),
    ],
)
def test_worlds_in_which_a_claim_fails(refuted, changes):
    found = verdicts(world(**changes))
    assert {name for name, verdict in found.items() if verdict == "contradicted"} == refuted


def test_one_seed_decides_nothing_but_what_varies_over_tasks():
    scores = world()
    found = verdicts(scores[scores["seed"] == 0])
    own = {name: verdict for name, verdict in found.items() if not name.endswith("-pretrained")}
    assert set(own.values()) == {"inconclusive"}
    assert set(found.values()) == {"inconclusive", "supported"}


def test_without_a_pretrained_model_its_claims_are_left_out():
    scores = world()
    own = scores[scores["part"] == "synthetic"]
    assert len(claims(own)) == 13
    assert len(pictures(own)) == len(pictures(scores)) == 7


# -- from patterns to scores ---------------------------------------------------------------------


def patterns(values: np.ndarray, names: Sequence[str] = "abcdef") -> xr.DataArray:
    """Activations ``(task, run, step, block, head)``."""
    dims = ("task", "run", "step", "block", "head")
    coords = {dim: np.arange(n) for dim, n in zip(dims, values.shape, strict=True)}
    return xr.DataArray(values, dims=dims, coords={**coords, "task": [*names][: len(values)]})


def means(rows: Any, **labels: Any) -> float:
    frame = pd.DataFrame(rows)
    for name, value in labels.items():
        frame = frame[frame[name] == value]
    return float(frame["value"].mean())


def test_planted_tasks_separate_after_tuning_and_noise_does_not():
    rng = np.random.default_rng(0)
    values = rng.random((6, 3, 2, 8, 8))
    values[:, :, 1] += 2 * rng.random((6, 1, 8, 8))
    rows = list(separation(patterns(values), 50))
    for stage, gap in (("before", 0.0), ("after", 0.75)):
        same, other, dealt = (
            means(rows, metric="similarity", method=m, stage=stage)
            for m in ("same task", "other tasks", "dealt")
        )
        assert abs(same - other - gap) < 0.1
        assert abs(dealt - (same + 5 * other) / 6) < 0.05
    assert means(rows, metric="identified", stage="after") == 1
    assert means(rows, metric="identified", stage="before") < 0.5


@settings(max_examples=10, deadline=None, database=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100))
def test_separation_sees_no_scale_and_no_order_of_tasks(seed, scale):
    rng = np.random.default_rng(seed)
    values = rng.random((4, 2, 2, 3, 4))
    scaled = values * scale
    rows = [r for r in separation(patterns(values), 1) if r["method"] != "dealt"]
    again = [r for r in separation(patterns(scaled), 1) if r["method"] != "dealt"]
    np.testing.assert_allclose([r["value"] for r in rows], [r["value"] for r in again])
    order = rng.permutation(4)
    turned = patterns(values[order], "".join("abcd"[i] for i in order))
    moved = [r for r in separation(turned, 1) if r["method"] != "dealt"]
    key = ["task", "metric", "method", "stage", "other"]
    one, two = (
        pd.DataFrame(r).fillna("").set_index(key)["value"].sort_index() for r in (rows, moved)
    )
    pd.testing.assert_series_equal(one, two)


def test_equal_heads_are_less_concentrated_than_one_head():
    values = np.zeros((1, 2, 2, 3, 4))
    values[:, :, 0, 0, 0] = 1
    values[:, :, 1] = 1 + 1e-3 * np.random.default_rng(0).random((3, 4))
    rows = list(concentration(patterns(values)))
    assert means(rows, metric="gini", stage="before", method="model") == pytest.approx(11 / 12)
    assert means(rows, metric="gini", stage="after") < 0.01
    assert means(rows, metric="gini", method="noise") == 0


def test_the_way_of_a_pattern_and_of_the_loss():
    """The pattern goes straight and is there at half of the steps; the loss falls at the end."""
    samples = [0, 10, 50, 100]
    start, end = np.random.default_rng(0).random((2, 3, 4))
    done = np.array([0.0, 0.6, 1.0, 1.0])
    series = start + done[:, None, None] * (end - start)
    found = patterns(np.tile(series, (2, 2, 1, 1, 1))).assign_coords(step=[0, 1, 5, 10])
    rows = pd.DataFrame(
        [
            {"task": task, "run": run, "step": step, "samples": seen, "metric": "loss", "value": v}
            for task in "ab"
            for run in range(2)
            for step, seen, v in zip([0, 1, 5, 10], samples, [3.0, 2.8, 2.5, 1.0], strict=True)
        ]
    )
    way = list(speed(found, rows))
    assert means(way, metric="way", method="pattern") == pytest.approx(0.6)
    assert means(way, metric="way", method="loss") == pytest.approx(0.1)
    assert means(way, metric="way so far", method="pattern", samples=50.0) == pytest.approx(1)


def composed_world(mixed: bool) -> tuple[xr.DataArray, pd.DataFrame]:
    """Patterns whose complex tasks' changes are, or are not, those of their parts."""
    rng = np.random.default_rng(3)
    change = {name: rng.random((6, 8)) for name in TASKS}
    if mixed:
        for name, (_, parts) in TASKS.items():
            if parts:
                one, two = parts.split(" & ")
                noise = 0.05 * rng.random((6, 8))
                change[name] = 0.7 * change[one] + 0.4 * change[two] + noise
    before = 1 + rng.random((6, 8))
    values = np.stack([np.stack([before, before + change[name]])[None] for name in TASKS])
    found = patterns(values, [*TASKS])
    tasks = pd.DataFrame.from_dict(TASKS, orient="index", columns=["kind", "parts"])
    return found, tasks


@pytest.mark.parametrize("mixed", [True, False])
def test_a_planted_composition_is_found_and_none_in_noise(mixed):
    rows = list(composition(*composed_world(mixed), 99))
    own = means(rows, metric="r2_out", method="parts", form="raw")
    others = [
        means(rows, metric="r2_out", method=method, form="raw")
        for method in ("parts of other tasks", "controls", "shared", "random", "permuted")
    ]
    if mixed:
        assert own > 0.9 > max(others) + 0.2
        assert means(rows, metric="r2_out p", method="permuted") == 0.01
    else:
        assert own < 0.1


# -- tasks, mixes and choices --------------------------------------------------------------------


def test_new_tasks_are_not_trained_on_before_and_controls_are_parts_of_none():
    study = HeadPatterns(complex_tasks=2)
    tasks = tasks_of(study, prompts_of(study, 0))
    kinds = {task.name: task.kind for task in tasks}
    parts = {part for task in tasks for part in task.parts}
    assert {name for name, kind in kinds.items() if kind == "basic"} == parts
    assert sum(kind == "complex" for kind in kinds.values()) == 2
    assert sum(kind == "control" for kind in kinds.values()) == 2
    for task in tasks:
        strings = [set(test.rows["instruction"]) for test in task.tests]
        assert not strings[0] & set(task.train.rows["instruction"])
        pairs = [set(zip(t.rows["instruction"], t.rows["input"], strict=True)) for t in task.tests]
        assert not pairs[0] & pairs[1]


@settings(max_examples=30, deadline=None, database=None)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=7), st.integers(1, 500))
def test_counts_follow_the_shares(shares, n):
    counts = spread_counts(shares, n)
    assert sum(counts) == n
    wanted = np.array(shares) / sum(shares) * n
    assert np.abs(np.array(counts) - wanted).max() < 1


def test_a_mix_holds_what_its_shares_say():
    prompts = composed(n_moves=2, n_maps=1, pairs=[], strings_per_regex=4, test_strings=4)
    names = ("move 0", "move 1", "map 0")
    tasks = [Task(n, "basic", (), prompts.where(task=n, split="train"), ()) for n in names]
    mixes = Mixes(tasks, 120, np.random.default_rng(0))
    found = mixes.of([0.5, 0.0, 1.5])
    assert found.rows["task"].value_counts().to_dict() == {"map 0": 90, "move 0": 30}
    # A task that is asked for more than it has comes again, evenly.
    times = found.rows[found.rows["task"] == "map 0"].groupby(["instruction", "input"]).size()
    assert times.max() - times.min() <= 1


def test_likeness_is_the_correlation_with_the_target():
    rng = np.random.default_rng(0)
    values, target = rng.random((7, 3, 4)), rng.random((3, 4))
    wanted = [np.corrcoef(row.ravel(), target.ravel())[0, 1] for row in values]
    np.testing.assert_allclose(alike_to(values, target), wanted)


def test_runs_are_dealt_prompts_of_every_template():
    rows = pd.DataFrame({"template": ["a"] * 10 + ["b"] * 10, "input": range(20)})
    prompts = lc.Prompts.from_token_lists([[1]] * 20, rows)
    dealt = split_tests(prompts, 2, 4)
    assert [len(part) for part in dealt] == [4, 4]
    assert not set(dealt[0].rows["input"]) & set(dealt[1].rows["input"])
    assert all(set(part.rows["template"]) == {"a", "b"} for part in dealt)


# -- end to end ----------------------------------------------------------------------------------

TINY: dict[str, Any] = {
    "steps": 6, "n_layers": 3, "n_heads": 4, "complex_tasks": 1, "tuning_steps": 4,
    "n_checkpoints": 3, "mixed": 64, "scarce": 8, "batch_size": 16, "permutations": 3,
    "known_moves": 1, "known_maps": 1,
}  # fmt: skip


@pytest.mark.slow
def test_a_tiny_run_leaves_claims_and_a_page_and_resumes_to_the_same(tmp_path):
    out = tmp_path / "run"
    study = HeadPatterns(**TINY, pretrained="none")
    options: dict[str, Any] = {"seeds": 1, "jobs": 1, "progress": False}
    study.execute(out, **options)
    found = json.loads((out / "claims.json").read_text())
    assert len(found) == 13
    assert {claim["verdict"] for claim in found} == {"inconclusive"}
    scores = pd.read_parquet(out / "scores.parquet")
    activations = scores[scores["metric"] == "activation"]
    # Five tasks, two runs, three checkpoints, 3 x 4 heads.
    assert len(activations) == 5 * 2 * 3 * 3 * 4
    assert (activations["value"] >= 0).all()
    shares = scores[scores["metric"] == "coefficient"]["value"]
    assert shares.sum() == pytest.approx(1)
    assert (shares >= 0).all()
    assert "No pretrained model was run" in (out / "report.html").read_text()
    before = (out / "claims.json").read_bytes()
    study.execute(out, resume=True, **options)
    assert (out / "claims.json").read_bytes() == before


def byte_model(folder: Path) -> str:
    """A tiny random Llama that reads bytes."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=24, intermediate_size=48,
                num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=3,
                max_position_embeddings=256,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_the_pretrained_part_end_to_end(tmp_path):
    study = HeadPatterns(
        **TINY, pretrained=byte_model(tmp_path / "model"), texts="none", pretrained_steps=3,
        pretrained_batch=4, measured=4,
    )  # fmt: skip
    out = tmp_path / "run"
    findings = study.execute(out, seeds=1, jobs=1, progress=False)
    assert len(findings.claims) == 21
    own = findings.scores[findings.scores["part"] == "pretrained"]
    kinds = own.drop_duplicates("task").groupby("kind")["task"].nunique()
    assert kinds.to_dict() == {"basic": 4, "complex": 2, "control": 1}
    assert len(own[(own["metric"] == "r2_out") & (own["method"] == "parts")]) == 2 * 2 * 2
    assert len(findings.provenance["weights"]) == 2
    assert (out / "report.html").exists()


def test_derived_scores_are_by_part_and_seed():
    found, tasks = composed_world(mixed=True)
    frame = found.rename("value").to_dataframe().reset_index()
    frame = frame.assign(metric="activation", samples=frame["step"] * 10)
    losses = frame.drop_duplicates(["task", "run", "step"])
    losses = losses.assign(metric="loss", value=2.0 - losses["step"])
    losses = losses.drop(columns=["block", "head"])
    right = losses.assign(metric="accuracy", value=losses["step"] / 2)
    rows = pd.concat([frame, losses, right]).join(tasks, on="task")
    both_seeds = pd.concat([rows.assign(part="synthetic", seed=seed) for seed in (0, 1)])
    # One run says nothing of runs.
    two = pd.concat([both_seeds, both_seeds.assign(run=1)])
    scores = derived(two, permutations=9)
    assert set(scores["seed"]) == {0, 1}
    one, other = (
        scores[scores["seed"] == seed].drop(columns="seed").reset_index(drop=True)
        for seed in (0, 1)
    )
    pd.testing.assert_frame_equal(one, other)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"runs": 1}, "runs=1: expected at least 2"),
        ({"pretrained_runs": 1}, "pretrained_runs=1: expected at least 2"),
        ({"complex_tasks": 0}, "complex_tasks=0: expected at least 1"),
        ({"controls": 0}, "controls=0: expected at least 1"),
        ({"n_checkpoints": 2}, "n_checkpoints=2: expected at least 3"),
        ({"scarce": 1}, "scarce=1: expected at least 2"),
        ({"permutations": 1}, "permutations=1: expected at least 2"),
        ({"texts": "sst3"}, "texts='sst3': expected one of "),
        ({"width": 1}, "composed: width=1, expected at least 2"),
        ({"known_moves": 9}, "composed: 12 moves of 3 symbols that agree on less than half"),
        ({"model": "sif-huge"}, "no preset 'sif-huge'"),
        ({"n_heads": 0}, "n_heads=0: expected at least 1"),
    ],
)
def test_unusable_fields_are_one_line_and_nothing_is_written(tmp_path, fields, message):
    out = tmp_path / "run"
    with pytest.raises(lc.InputError, match=message) as caught:
        HeadPatterns(**fields).execute(out, progress=False)
    assert "\n" not in str(caught.value)
    assert not out.exists()
