"""Identity pre-training: what the arms train on, how steps are read, and claims that can fail."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import adjusted_rand_score

import lensclust as lc
from lensclust.models.native import native_config
from lensclust.parallel import one_thread
from lensclust.training.data import required_sizes
from studies.identity_pretraining import SEARCHED, IdentityPretraining, parts
from studies.identity_pretraining.arms import plan
from studies.identity_pretraining.claims import (
    OF_TASK,
    TOTAL,
    Runs,
    claims,
    conditions,
    notes,
    summary,
)
from studies.identity_pretraining.figures import condition_map, pictures
from studies.identity_pretraining.options import ARMS, COMPARED
from studies.identity_pretraining.phases import (
    NAMING,
    TASK,
    naming_prompts,
    own_names,
    regrouped_names,
    reported,
    shuffled_names,
    train_in_phases,
    with_share,
)
from studies.scales import AGREED
from studies.synthetic_task import SPLITS, UNSEEN

PROMPTS = lc.tasks.sif(
    n_tasks=4, n_inputs=5, mappings_per_task=4, strings_per_regex=8, held_out_regexes=1
)
TINY: dict[str, Any] = {
    **IdentityPretraining.presets["smoke"],
    "n_layers": 1,
    "n_tasks": 3,
    "naming_steps": 4,
    "task_steps": 8,
    "evaluate_every": 4,
    "search_tasks": (3,),
    "search_shares": (0.5,),
    "permutations": 2,
}

# -- phase 1 ------------------------------------------------------------------------------


@pytest.mark.parametrize("after", ["input", "instruction"])
def test_every_task_has_one_name_and_no_other_token_is_a_name(after):
    named = naming_prompts(PROMPTS, PROMPTS.rows["task"].to_numpy(), after=after)
    assert named.answers is not None
    names = pd.Series([name for (name,) in named.answers])
    pairs = pd.DataFrame({"task": PROMPTS.rows["task"], "name": names}).drop_duplicates()
    assert pairs["task"].is_unique
    assert pairs["name"].is_unique
    assert not set(names) & set(PROMPTS.with_answers()[0].ravel().tolist())
    assert required_sizes(named)["d_vocab"] == required_sizes(PROMPTS)["d_vocab"] + 4


def test_a_name_after_the_instruction_cannot_depend_on_the_input():
    named = naming_prompts(PROMPTS, PROMPTS.rows["task"].to_numpy(), after="instruction")
    seen = [tuple(row[:n].tolist()) for row, n in zip(named.tokens, named.lengths, strict=True)]
    assert len(set(seen)) == PROMPTS.rows["instruction"].nunique()
    separator = PROMPTS.tokens[0, PROMPTS.lengths[0] - 2]
    assert {row[-1] for row in seen} == {int(separator)}


@settings(max_examples=20, deadline=None, database=None)
@given(st.integers(0, 2**32 - 1))
def test_wrong_names_are_as_many_and_say_nothing(seed):
    rows = PROMPTS.rows
    shuffled = shuffled_names(rows, np.random.default_rng(seed))
    for split, index in rows.groupby("split").indices.items():
        assert sorted(shuffled[index]) == sorted(rows["task"].to_numpy()[index]), split
    train = (rows["split"] == "train").to_numpy()
    assert abs(adjusted_rand_score(rows["task"][train], shuffled[train])) < 0.05

    regrouped = pd.Series(regrouped_names(rows, np.random.default_rng(seed)))
    assert (regrouped.groupby(rows["template"]).nunique() == 1).all()
    owned = rows[train].assign(name=regrouped[train]).groupby("name")["template"].nunique()
    assert owned.to_dict() == rows[train].groupby("task")["template"].nunique().to_dict()


@pytest.fixture(scope="module")
def half_trained():
    config = native_config("sif-small", n_layers=1, d_model=32, **required_sizes(PROMPTS))
    with one_thread():
        run = lc.train(
            config,
            PROMPTS,
            steps=120,
            loss_on="answer",
            n_checkpoints=2,
            lr=1e-2,
            progress=False,
        )
    return run.model()


def test_own_names_come_from_states_alone(half_trained):
    def names(prompts: lc.Prompts) -> np.ndarray:
        return own_names(half_trained, prompts, k=4, layer=1, seed=0)

    found = names(PROMPTS)
    assert set(found) <= set(range(4))
    assert pd.Series(found).groupby(PROMPTS.rows["instruction"]).nunique().max() == 1
    # Neither the tasks, nor their answers, nor their expressions are read.
    rng = np.random.default_rng(0)
    labels = {name: rng.permutation(PROMPTS.rows[name]) for name in ("task", "output", "template")}
    blind = replace(PROMPTS, rows=PROMPTS.rows.assign(**labels), answers=None)
    np.testing.assert_array_equal(names(blind), found)
    # Clusters have no order, and prompts none either.
    order = rng.permutation(len(PROMPTS))
    assert adjusted_rand_score(names(PROMPTS.take(order)), found[order]) == pytest.approx(1)
    # What a half-trained model holds is more than what shuffled names hold.
    assert adjusted_rand_score(PROMPTS.rows["task"], found) > 0.1


# -- phase 2 ------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None, database=None)
@given(st.floats(0.001, 1), st.floats(0.001, 1), st.integers(0, 99))
def test_shares_are_nested_and_keep_every_mapping(one, other, seed):
    small, large = (
        with_share(PROMPTS, share, np.random.default_rng(seed)) for share in sorted((one, other))
    )
    assert set(small.texts or ()) <= set(large.texts or ())
    everything = PROMPTS.where(split="train").rows
    kept = small.where(split="train").rows.groupby(["task", "input"]).size()
    wanted = everything.groupby(["task", "input"]).size() * min(one, other)
    assert (kept - np.maximum(1, wanted)).abs().max() <= 0.5 + 1e-9
    assert len(small) - kept.sum() == len(PROMPTS) - len(everything)


def test_arms_differ_in_their_first_phase_alone():
    study = IdentityPretraining(**TINY)
    plans = plan(study, PROMPTS, 0.5, 0)
    assert tuple(plans) == ARMS
    steps = {arm: sum(phase.steps for phase in phases) for arm, phases in plans.items()}
    assert set(steps.values()) == {study.naming_steps + study.task_steps}
    asked = {}
    for arm in ("identity", "regrouped", "shuffled"):
        first, second = plans[arm]
        assert (first.kind, second.kind) == (NAMING, TASK)
        assert second is plans["identity"][1]
        asked[arm] = first.content(None)
        assert asked[arm].tokens.equal(PROMPTS.tokens)
    assert len({tuple(prompts.answers or ()) for prompts in asked.values()}) == 3
    assert plans["auxiliary"][0].auxiliary is not None
    assert sum(p.steps for p in plans["own clusters"] if p.kind == TASK) == study.task_steps


def test_phases_go_on_where_the_last_ended_and_are_trained_once():
    study = IdentityPretraining(**TINY)
    plans, done = plan(study, PROMPTS, 1.0, 0), {}
    sizes = required_sizes(PROMPTS)
    config = native_config("sif-small", n_layers=1, n_ctx=sizes["n_ctx"], d_vocab=99)
    options: dict[str, Any] = {"warmup": 2, "report": reported, "done": done, "seed": 1}
    options |= {"batch_size": 8, "n_checkpoints": 2, "evaluate_every": 4}
    with one_thread():
        frame, stages = train_in_phases(config, plans["identity"], **options)
        before = dict(done)
        again, _ = train_in_phases(config, plans["identity"], **options)
    assert done == before
    pd.testing.assert_frame_equal(frame, again)
    assert [(s.kind, s.step, s.task_step) for s in stages] == [
        (NAMING, 0, 0),
        (NAMING, 4, 0),
        (TASK, 12, 8),
    ]
    first, second = done.values()
    assert lc.fingerprint(second.checkpoints[0].model()) == lc.fingerprint(first.model())
    task = frame[frame["kind"] == TASK]
    assert (task["step"] - task["task_step"] == 4).all()


# -- reading the curves -------------------------------------------------------------------

LAYERS = (0, 1, 2)
# What phase 1 takes and what phase 2 takes.
P1, P2 = 40, 80
Rule = Callable[..., float]


def start_of(arm: str) -> int:
    """Steps before an arm first trains the task."""
    return 0 if arm in ("scratch", "auxiliary", "own clusters") else P1


def world(accuracy: Rule, ari: Rule = lambda arm, layer, step: 0.3 * layer, seeds: int = 3):
    """Scores as the study collects them, from a rule for accuracy and one for clusters."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    cells = [("arms", 3, 10, 1.0, ARMS)]
    cells += [("examples", 3, 10, share, COMPARED) for share in (0.05, 0.25)]
    cells += [("search", 2, n, share, SEARCHED) for n in (6, 20) for share in (0.05, 1.0)]
    for purpose, n_layers, n_tasks, share, arms in cells:
        for seed in range(1 if purpose == "search" else seeds):
            for arm in arms:
                at = {"purpose": purpose, "n_layers": n_layers, "n_tasks": n_tasks}
                at |= {"share": share, "seed": seed, "arm": arm}
                for step in range(start_of(arm), P1 + P2 + 1, 10):
                    trained = step - start_of(arm)
                    for split in SPLITS:
                        value = accuracy(arm=arm, trained=trained, split=split, share=share)
                        value = float(np.clip(value + 0.002 * rng.normal(), 0, 1))
                        known = {"metric": "accuracy", "kind": TASK, "split": split}
                        where = {"step": step, "task_step": trained, "null_mean": 0.1}
                        rows.append({**at, **known, **where, "value": value})
                if purpose != "arms":
                    continue
                for step in (0, P1, P1 + 10, P1 + P2):
                    for layer in LAYERS:
                        naming = step <= P1 and start_of(arm) > 0
                        known = {"metric": AGREED, "kind": NAMING if naming else TASK}
                        value = ari(arm=arm, layer=layer, step=step) + 0.002 * rng.normal()
                        known |= {"null_mean": 0.0, "null_std": 0.01, "split": UNSEEN}
                        where = {"layer": layer, "step": step, "task_step": max(0, step - P1)}
                        rows.append({**at, **known, **where, "value": value})
                if arm == "own clusters":
                    rows.append({**at, "metric": "ari of names", "kind": TASK, "value": 0.5})
    return pd.DataFrame(rows)


def learning(rate: dict[str, float], ceiling: dict[str, float] | None = None) -> Rule:
    """Accuracy that rises with the steps of the task, an arm at its own rate."""

    def accuracy(arm: str, trained: int, split: str, share: float) -> float:
        reach = 0.1 if split == "new_regex" else (ceiling or {}).get(arm, 0.95)
        return reach * min(1.0, rate.get(arm, 1.0) * trained / P2) * share**0.1

    return accuracy


def verdicts(scores: pd.DataFrame) -> dict[str, str]:
    return {claim.id: claim.verdict for claim in claims(scores, summary(scores), interval=10)}


def test_where_names_help_the_claims_hold():
    fast: dict[str, float] = dict.fromkeys(
        ("identity", "instruction", "auxiliary", "own clusters"), 8.0
    )
    low: dict[str, float] = dict.fromkeys(("scratch", "shuffled", "regrouped"), 0.8)

    def clusters(arm: str, layer: int, step: int) -> float:
        return 0.4 * layer if step and arm == "identity" else 0.05 * layer

    found = verdicts(world(learning(fast, low), clusters))
    for threshold in ("0.5", "0.9"):
        assert found[f"sooner-{threshold}-than-shuffled"] == "supported"
        assert found[f"sooner-{threshold}-in-phase-2"] == "supported"
    for claim in ("sooner-0.9", "higher", "higher-in-phase-2", "after-instruction", "auxiliary"):
        assert found[claim] == "supported", claim
    for claim in ("own-clusters", "true-names", "pairs", "auxiliary-pairs", "unknown-expressions"):
        assert found[claim] == "supported", claim
    for claim in ("named-clusters", "clusters-last", "clusters-at-the-end", "few-examples"):
        assert found[claim] == "supported", claim
    # All arms reach 0.5 with the fewest examples: a difference of 0 is no support.
    assert found["fewer-examples"] == "negligible"
    for claim in ("higher-throughout", "higher-throughout-than-shuffled", "auxiliary-throughout"):
        assert found[claim] == "supported", claim


def test_where_names_do_nothing_the_cost_of_phase_1_shows():
    found = verdicts(world(learning({})))
    assert found["sooner-0.5"] == "contradicted"
    # As many steps of the task, as fast: no saving, and that is said.
    assert found["sooner-0.5-in-phase-2"] == found["sooner-0.5-than-shuffled"] == "negligible"
    assert found["higher-throughout-phase-2"] == "negligible"
    assert found["higher-throughout"] == "contradicted"
    assert found["true-names"] == "negligible"
    assert found["named-clusters"] != "supported"


def test_where_names_hurt_the_claims_fail():
    slow = {"identity": 0.3, "instruction": 0.3, "own clusters": 0.3, "auxiliary": 0.3}
    spoilt = world(
        learning(slow), lambda arm, layer, step: 0.3 * layer if step == P1 else 0.01 * layer
    )
    found = verdicts(spoilt)
    for claim in ("sooner-0.5", "sooner-0.5-than-shuffled", "higher", "higher-in-phase-2", "pairs"):
        assert found[claim] == "contradicted", claim
    for claim in ("auxiliary", "auxiliary-pairs", "own-clusters", "few-examples"):
        assert found[claim] == "contradicted", claim
    assert found["clusters-last"] == "contradicted"


def test_where_nobody_gets_there_nothing_is_decided():
    scores = world(learning({}, dict.fromkeys(ARMS, 0.6)))
    seen = Runs(scores, summary(scores))
    assert np.isnan(seen.saved(0.9, "identity", "scratch", TOTAL)).all()
    assert seen.reached(0.9, "scratch", TOTAL) == 0
    assert {seen.value("steps to 0.9", "scratch", b).max() for b in (TOTAL, OF_TASK)} == {
        float(P1 + P2),
        float(P2),
    }
    assert verdicts(scores)["sooner-0.9"] == "inconclusive"
    assert verdicts(scores)["sooner-0.5"] == "contradicted"


@settings(max_examples=30, deadline=None, database=None)
@given(st.lists(st.floats(0, 1), min_size=13, max_size=13), st.sampled_from([0.5, 0.9, 0.97]))
def test_steps_are_the_first_measured_at_the_threshold(curve, threshold):
    steps = range(0, P1 + P2 + 1, 10)
    at = {"purpose": "arms", "n_layers": 1, "n_tasks": 2, "share": 1.0, "seed": 0}
    at |= {"metric": "accuracy", "kind": TASK, "split": UNSEEN}
    rows = [
        {**at, "arm": "scratch", "step": step, "task_step": step, "value": value}
        for step, value in zip(steps, curve, strict=True)
    ]
    rows += [{**at, "arm": "identity", "step": P1 + P2, "task_step": P2, "value": 0.0}]
    table = summary(pd.DataFrame(rows)).query("arm == 'scratch'")
    for budget, cap in ((TOTAL, P1 + P2), (OF_TASK, P2)):
        row = table.query(
            "budget == @budget and metric == @metric",
            local_dict={"budget": budget, "metric": f"steps to {threshold:g}"},
        ).iloc[0]
        there = [step for step, value in zip(steps, curve, strict=True) if value >= threshold]
        there = [step for step in there if step <= cap]
        assert bool(row["reached"]) == bool(there)
        assert row["value"] == (there[0] if there else cap)


def test_examples_needed_are_read_between_the_shares():
    def by_share(arm: str, trained: int, split: str, share: float) -> float:
        return {0.05: 0.3, 0.25: 0.7, 1.0: 0.9}[share] if arm == "identity" else 0.2

    scores = world(by_share)
    seen = Runs(scores, summary(scores))
    # Half-way between 0.05 and 0.25 in logarithms; never: all of them.
    np.testing.assert_allclose(seen.examples_to(0.5, "identity"), np.sqrt(0.05 * 0.25), rtol=0.02)
    assert (seen.examples_to(0.5, "scratch") == 1.0).all()


def test_figures_draw_and_notes_name_what_fails():
    scores = world(learning({"identity": 0.3}))
    table = summary(scores)
    assert all(chart.to_dict() for chart in pictures(scores, table).values())
    decided = claims(scores, table, interval=10)
    told = " ".join(notes(decided, table))
    assert "sooner-0.9" in told
    assert "in 0 of 4 conditions" in told


def test_the_map_of_conditions_has_zero_in_the_middle():
    cells = conditions(summary(world(learning({"identity": 0.3}))))
    labels: dict[str, str] = {"title": "t", "caption": "c", "value_title": "v"}
    chart = condition_map(
        cells[cells["share"] == 1], x="n_tasks", y="n_layers", facet="budget", **labels
    )
    low, high = chart.to_dict()["spec"]["layer"][0]["encoding"]["color"]["scale"]["domain"]
    assert low == -high
    with pytest.raises(ValueError, match="several rows"):
        condition_map(cells, x="n_tasks", y="n_layers", facet="budget", **labels)


# -- a run --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_lost_a_part_ends_with_the_same_claims(tmp_path):
    study = IdentityPretraining(**TINY)
    options: dict[str, Any] = {"seeds": 1, "jobs": 1, "progress": False}
    found = study.execute(tmp_path / "run", **options)
    written = (tmp_path / "run" / "claims.json").read_bytes()
    assert set(found.scores["arm"]) == set(ARMS)
    naming = found.scores.query("kind == 'naming' and metric == 'accuracy'")
    assert set(naming["arm"]) == set(ARMS) - {"scratch", "auxiliary"}
    start = found.scores.query("step == 0 and arm == 'scratch' and split == 'train'")
    assert (start["value"].dropna() < 0.5).all()
    # Killed before the page was written, with one part half done.
    (tmp_path / "run" / "claims.json").unlink()
    lost = parts(study, (0,))[0]
    shutil.rmtree(tmp_path / "run" / "parts" / f"part-{lost}" / "frames")
    study.execute(tmp_path / "run", resume=True, **options)
    assert (tmp_path / "run" / "claims.json").read_bytes() == written


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"n_layers": 0}, "n_layers=0: expected at least 1"),
        ({"naming_steps": 0}, "naming_steps=0"),
        ({"regexes_per_task": 1}, "regexes_per_task=1: expected at least 2"),
        ({"evaluate_every": 300}, "evaluate_every=300: expected at most half"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"weight": -1.0}, r"weight=-1\.0"),
        ({"layer": 4}, r"layer=4: expected 1\.\.n_layers=3"),
        ({"shares": (0.1, 1.0)}, "expected shares above 0 and below 1"),
        ({"shares": ()}, "shares"),
        ({"search_shares": (0.0,)}, "search_shares"),
        ({"search_tasks": (1,)}, "search_tasks"),
        ({"search_layers": ()}, "search_layers"),
        ({"search_layers": (2, 2)}, "expected each value once"),
        ({"search_tasks": (400,), "n_inputs": 5}, "sif"),
    ],
)
def test_fields_out_of_range_are_one_line(field, said):
    with pytest.raises(lc.InputError, match=said) as refused:
        IdentityPretraining(**field).check()
    assert "\n" not in str(refused.value)


def test_presets_are_usable():
    assert set(IdentityPretraining.presets) == {"smoke", "default", "paper"}
    IdentityPretraining(**IdentityPretraining.presets["smoke"]).check()
