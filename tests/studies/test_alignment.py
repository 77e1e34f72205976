"""The alignment study: its measures and claims can fail, and it runs end to end at tiny size."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lensclust as lc
from lensclust.cli.command import main
from lensclust.figures.trade_offs import trade_off, unbeaten
from lensclust.training.temporary import finetuned
from probes.design.pairs import first_answers
from studies.alignment import Alignment, scores as alignment_scores
from studies.alignment.claims import LOSS, WANTED, Part, claims, generated_texts, table
from studies.alignment.figures import pictures
from studies.alignment.methods import (
    HEADS,
    MERIT,
    NOTHING,
    PLAIN,
    PULL,
    RANDOM_MATCHED,
    SHIFT,
    SUCCESS,
    TRAININGS,
    TRANSPORT,
    Asked,
    draw_examples,
)
from studies.alignment.pretrained import SEEN, UNSEEN, measure_pretrained
from studies.alignment.scores import read_now, try_training
from studies.alignment.synthetic import align

NUMBERS = (1, 4, 16, 64)
TASKS = ("plural", "past", "upper_case")
METHODS = (
    NOTHING, "shift", "transport", "transport, near", SHIFT, TRANSPORT,
    RANDOM_MATCHED + SHIFT, RANDOM_MATCHED + TRANSPORT, *TRAININGS,
)  # fmt: skip

Rule = Callable[[str, int], float]


def good_success(method: str, n: int) -> float:
    """A world in which every claim holds: moves and pulls need few examples, training many."""
    if method == NOTHING or method.startswith("random"):
        return 0.0
    share = np.log(n) / np.log(64)
    speed = {PLAIN: 0.9, HEADS: 0.9, PULL: 1.9}
    return float(min(1.0, speed.get(method, 3.0) * share + 0.05))


def good_damage(method: str, n: int) -> float:
    if "members" in method or "near" in method or method == NOTHING:
        return 0.0
    return {PLAIN: 0.3, PULL: 0.2, HEADS: 0.1}.get(method, 0.4)


def world(success: Rule = good_success, damage: Rule = good_damage) -> pd.DataFrame:
    """Scores as the study collects them, with a little noise."""
    rng = np.random.default_rng(0)
    pairs = [("synthetic", seed, str(a), "9") for seed in range(3) for a in range(2)]
    pairs += [("pretrained", -1, a, b) for a in TASKS for b in TASKS if a != b]
    rows = []
    for part, seed, source, target in pairs:
        for method in METHODS:
            for n in NUMBERS:
                label: dict[str, Any] = {"part": part, "seed": seed, "source": source}
                label |= {"target": target, "method": method, "examples": n}
                noise = 0.004 * rng.uniform(0, 1)
                rates = {WANTED: max(0.0, success(method, n) - noise), LOSS: damage(method, n)}
                rates[LOSS] = min(1.0, rates[LOSS] + noise)
                rates |= {"KL": 2 * damage(method, n), "parameters": 64, "seconds": 0.1}
                rows += [
                    {**label, "chosen_by": by, "metric": name, "value": v}
                    for name, v in rates.items()
                    for by in ((MERIT, SUCCESS) if method in TRAININGS else (MERIT,))
                ]
    return pd.DataFrame(rows)


NO = "contradicted"


def verdicts(scores: pd.DataFrame) -> dict[str, str]:
    return {claim.id: claim.verdict for claim in claims(scores)}


def test_a_world_in_which_every_claim_holds():
    assert set(verdicts(world()).values()) == {"supported"}


@pytest.mark.parametrize(
    ("success", "damage", "refuted"),
    [
        (
            lambda m, n: 0.5,
            good_damage,
            {
                "moved": "negligible",
                "moved-nearly-all": NO,
                "pretrained-moved": NO,
                "pretrained-random": NO,
            },
        ),
        (
            # The cluster term needs as many examples as training without it.
            lambda m, n: good_success(PLAIN if m == PULL else m, n),
            good_damage,
            {"pull-examples": "negligible", "pull-half-the-examples": NO},
        ),
        (
            lambda m, n: 1.0 if m in (PLAIN, PULL) else 0.6,
            good_damage,
            {
                "moved": "negligible",
                "moved-nearly-all": NO,
                "fewer-than-training": NO,
                "pretrained-against-training": NO,
            },
        ),
        (
            good_success,
            lambda m, n: 0.3,
            dict.fromkeys(("moved-damage", "gate-of-examples", "pretrained-damage"), NO),
        ),
        (good_success, lambda m, n: 0.0, {"needs-a-gate": "negligible"}),
        (
            good_success,
            lambda m, n: good_damage(m, n) + (0.4 if m in (PULL, HEADS) else 0),
            dict.fromkeys(("pull-damage", "heads-damage"), NO),
        ),
    ],
)
def test_worlds_in_which_claims_fail(success, damage, refuted):
    found = verdicts(world(success, damage))
    for claim, verdict in refuted.items():
        assert found[claim] == verdict, claim


def test_examples_needed_lie_between_the_numbers_that_were_tried():
    # 0.9 is reached half way from 0.8 at 16 to 1.0 at 64: at 32.
    rise = {1: 0.0, 4: 0.4, 16: 0.8, 64: 1.0}
    rows = [
        {"part": "synthetic", "seed": 0, "source": source, "target": "b", "method": PLAIN}
        | {"chosen_by": MERIT}
        | {"examples": n, "metric": WANTED, "value": value}
        for source, curve in (("a", rise), ("c", dict.fromkeys(rise, 0.1)), ("d", {1: 0.95}))
        for n, value in (dict.fromkeys(rise, 0.95) | curve).items()
    ]
    needed = Part(pd.DataFrame(rows), "synthetic").needed(PLAIN)
    np.testing.assert_allclose(needed.to_numpy(), [32, 256, 1])


def test_the_table_holds_means_and_intervals_over_pairs():
    scores = world()
    found = table(scores).set_index(["part", "method", "examples", "chosen_by", "metric"])
    for part, n in (("synthetic", 3), ("pretrained", 3)):
        row = found.loc[(f"table, {part}", PULL, 16, MERIT, WANTED)]
        values = scores.query("part == @part and method == @PULL and examples == 16")
        values = values[values["chosen_by"] == MERIT]
        values = values[values["metric"] == WANTED]
        by_seed = values.groupby("seed")["value"].mean()
        values = values["value"]
        assert row["n"] == n
        assert row["value"] == pytest.approx(values.mean())
        from scipy import stats

        if part == "synthetic":  # far from the ends of the range, t on the logit is nearly t
            interval = stats.ttest_1samp(by_seed, 0).confidence_interval()
            assert (row["ci_low"], row["ci_high"]) == pytest.approx(tuple(interval), abs=0.02)


def test_every_figure_draws():
    drawn = pictures(world())
    assert set(drawn) == {
        f"{part}_{name}"
        for part in ("synthetic", "pretrained")
        for name in ("examples", "trade_off")
    }
    assert all(chart.to_dict() for chart in drawn.values())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(points):
    cost, gain = (pd.Series([float(p[i]) for p in points]) for i in (0, 1))
    expected = [
        not any(
            c <= a and g >= b and (c, g) != (a, b) for c, g in zip(cost, gain, strict=True)
        )
        for a, b in zip(cost, gain, strict=True)
    ]  # fmt: skip
    assert unbeaten(cost, gain).tolist() == expected


def test_a_trade_off_of_nothing_is_refused():
    frame = pd.DataFrame({"method": ["a"], "x": [np.nan], "y": [1.0]})
    with pytest.raises(ValueError, match="no row"):
        trade_off(frame, cost="x", gain="y", title="", caption="")
    with pytest.raises(ValueError, match="no column 'z'"):
        trade_off(frame, cost="z", gain="y", title="", caption="")


# -- examples and measures --------------------------------------------------------------------


def prompts_of(table: dict[str, dict[str, int]], copies: int = 2, **labels: Any) -> lc.Prompts:
    """Prompts of one token for each task and input, with the answers of a table."""
    rows = [(t, x, y) for t, answers in table.items() for x, y in answers.items()] * copies
    frame = pd.DataFrame([{"task": t, "input": x, **labels} for t, x, _ in rows])
    ids = [[3 + i % 4] for i in range(len(rows))]
    return lc.Prompts.from_token_lists(ids, frame, answers=[[y] for _, _, y in rows])


ABC = {"a": {"x": 10, "y": 11, "z": 12}, "b": {"x": 20, "y": 21, "z": 12}, "c": {"q": 30}}


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), copies=st.integers(1, 5), n=st.integers(1, 12))
def test_examples_go_round_the_inputs_that_two_tasks_answer_differently(seed, copies, n):
    found = draw_examples(prompts_of(ABC, copies), "a", "b", n, [seed])
    assert len(found.asked) == len(found.shown) == min(n, 2 * copies)
    assert set(found.asked.rows["task"]) == {"a"}
    assert set(found.shown.rows["task"]) == {"b"}
    given = found.asked.rows["input"].tolist()
    assert given == found.shown.rows["input"].tolist()
    assert abs(given.count("x") - given.count("y")) <= 1  # z is answered alike by both
    assert first_answers(found.asked).tolist() == [ABC["b"][x] for x in given]
    rows = np.concatenate(found.rows)
    assert len(set(rows.tolist())) == len(rows)
    fewer = found.first(1)
    assert len(fewer.asked) == 1
    assert fewer.rows[0][0] == found.rows[0][0]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("a", "a"), "task 'a' given twice"),
        (("a", "m"), "no example of task 'm'"),
        (("a", "c"), "'a' and 'c' share no input"),
    ],
)
def test_examples_that_cannot_be_had_are_one_clear_line(pair: tuple[str, str], message: str):
    with pytest.raises(lc.InputError, match=message) as caught:
        draw_examples(prompts_of(ABC), *pair, 4, [0])
    assert "\n" not in str(caught.value)
    with pytest.raises(lc.InputError, match="9 examples of 'a' as 'b' requested, but there are 4"):
        draw_examples(prompts_of(ABC), "a", "b", 4, [0]).first(9)


def test_rates_count_wanted_answers_and_damage():
    asked = prompts_of(ABC, copies=1, group="unseen", template="t")
    vocabulary = 40
    own = torch.nn.functional.one_hot(torch.tensor(first_answers(asked)), vocabulary)
    base = (8.0 * own).log_softmax(-1)
    scored = Asked(asked, base)
    before = scored.rates(scored.unmoved, "a", "b", set())
    assert (before[WANTED], before[LOSS], before["KL"]) == (0, 0, 0)
    # Every prompt answered 20: right for x, and wrong for all but one prompt of other tasks.
    logits = torch.zeros(len(asked), vocabulary)
    logits[:, 20] = 8
    read = scored.readout(logits, torch.arange(len(asked)))
    after = scored.rates(read, "a", "b", {"x"})
    assert after[WANTED] == 1 / 2
    assert after["wanted, unseen, new input"] == 0
    assert np.isnan(after["wanted, seen"])
    assert after[LOSS] == pytest.approx(1 - 1 / 4)
    others = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=base),
        torch.distributions.Categorical(logits=logits),
    )[3:]
    assert after["KL"] == pytest.approx(float(others.mean()), rel=1e-5)
    # What the model cannot do anyway is no question of alignment.
    forgotten = torch.tensor(
        [(t, x) == ("b", "x") for t, x in asked.rows[["task", "input"]].itertuples(index=False)]
    )
    base = torch.where(forgotten[:, None], base.roll(1, -1), base)
    able = Asked(asked, base, able="template")
    assert able.rates(read, "a", "b", set())[WANTED] == 0  # only y counts, and 20 is wrong for y


# -- end to end -------------------------------------------------------------------------------

SIZES = {
    "n_tasks": 3, "n_inputs": 4, "mappings_per_task": 4, "regexes_per_task": 2,
    "rows_per_mapping": 4, "steps": 60, "pairs": 1, "examples": (1, 4), "strengths": (1.0,),
    "finetuning_steps": 3, "rates": (1e-3,),
}  # fmt: skip


def test_the_command_runs_resumes_and_writes_the_table(tmp_path):
    out = tmp_path / "run"
    command = ["run", "alignment", "--preset", "smoke", "--seeds", "1", "--jobs", "1", "--quiet"]
    for name, value in SIZES.items():
        values = value if isinstance(value, tuple) else (value,)
        command += [f"--{name.replace('_', '-')}", *map(str, values)]
    assert main([*command, "--out", str(out)]) == 0
    found = json.loads((out / "claims.json").read_text())
    assert {"moved", "moved-damage", "pull-examples"} <= {claim["id"] for claim in found}
    assert {claim["verdict"] for claim in found} == {"inconclusive"}  # one pair, no interval
    scores = pd.read_parquet(out / "scores.parquet")
    rows = scores[scores["part"] == "table, synthetic"]
    assert set(rows["method"]) >= {
        NOTHING,
        SHIFT,
        TRANSPORT,
        RANDOM_MATCHED + TRANSPORT,
        *TRAININGS,
    }
    assert set(rows["examples"]) == {1, 4}
    assert "No pretrained model was run" in (out / "report.html").read_text()
    before = (out / "claims.json").read_bytes()
    assert main([*command, "--out", str(out), "--resume"]) == 0
    assert (out / "claims.json").read_bytes() == before


@pytest.fixture(scope="module")
def learnt() -> tuple[Any, lc.Prompts]:
    sizes = {k: SIZES[k] for k in ("n_tasks", "n_inputs", "mappings_per_task", "regexes_per_task")}
    prompts = lc.tasks.sif(**sizes, rows_per_mapping=4, held_out_regexes=0)
    run = lc.train("sif-small", prompts, steps=120, progress=False, n_checkpoints=2)
    return run.model(), prompts


def test_a_learnt_model_is_moved_as_wanted_and_left_as_it_was(learnt):
    model, prompts = learnt
    before = lc.fingerprint(model)
    rows = pd.DataFrame(align(Alignment(**SIZES), model, prompts, seed=0))
    assert lc.fingerprint(model) == before
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    found = rows.query("examples == 4 and chosen_by == @MERIT").set_index(["method", "metric"])[
        "value"
    ]
    assert found[TRANSPORT, WANTED] > 0.9
    assert found[TRANSPORT, LOSS] < 0.05
    assert found["transport", LOSS] > found[TRANSPORT, LOSS] + 0.1
    assert found[RANDOM_MATCHED + TRANSPORT, WANTED] < 0.3
    assert found[NOTHING, WANTED] < 0.1
    assert found[HEADS, "parameters"] < found[PLAIN, "parameters"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_whatever_stops_a_measurement_the_model_is_left_as_it_was(learnt, error, monkeypatch):
    model, prompts = learnt
    pool = prompts.where(split="train")
    some = draw_examples(pool, "0", "1", 4, [0])
    group = prompts.rows.assign(group="unseen")
    asked = lc.Prompts(prompts.tokens, prompts.lengths, group, prompts.answers).where(
        split="new_string"
    )
    logits = model(asked.tokens).detach()[torch.arange(len(asked)), asked.lengths - 1]
    scored = Asked(asked, logits.log_softmax(-1))
    before = lc.fingerprint(model)

    def read(part: Asked) -> torch.Tensor:
        assert lc.fingerprint(model) != before
        read_now(model, part)
        raise error

    with pytest.raises(error):
        try_training(
            PLAIN, some, 1e-3, partial(finetuned, model, some.asked, steps=2), read,
            [scored, scored], task_states=0,
        )  # fmt: skip
    assert lc.fingerprint(model) == before

    def stop(*given: Any) -> float:
        raise error

    monkeypatch.setattr(alignment_scores, "merit", stop)
    with pytest.raises(error):
        align(Alignment(**SIZES), model, prompts, seed=0)
    assert lc.fingerprint(model) == before
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--n-tasks=2", "n_tasks=2: expected at least 3"),
        ("--pairs=0", "pairs=0: expected at least 1"),
        ("--pairs=99", "pairs=99"),
        ("--examples 4 1", "examples=(4, 1): expected rising numbers from 1"),
        ("--examples 0", "examples=(0,): expected rising numbers from 1"),
        ("--strengths nan", "strengths=(nan,): expected positive numbers"),
        ("--rates=-1", "rates=(-1.0,): expected positive numbers"),
        ("--pull-weight=inf", "pull_weight=inf: expected a finite number"),
        ("--pull-depth=1.5", "pull_depth=(1.5,): expected shares"),
        ("--depths 0", "depths=(0.0,): expected shares"),
        ("--head-share=0", "head_share=(0.0,): expected shares"),
        ("--shots=0", "shots=0: expected at least 1"),
        ("--model=native", "no preset 'native'"),
        ("--mappings-per-task=99", "mappings_per_task"),
        ("--tasks mood plural past", "tasks: no 'mood': there are"),
        ("--tasks plural plural past", "expected three or more, all different"),
    ],
)
def test_unusable_fields_are_one_line_and_nothing_is_written(tmp_path, capsys, option, message):
    out = tmp_path / "run"
    assert main(["run", "alignment", *option.split(), "--out", str(out), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not out.exists()


# -- the pretrained part ----------------------------------------------------------------------


def word_model(folder: Any, *, taught: bool) -> str:
    """A tiny Llama and a tokenizer of whole words; taught, it has learnt these prompts."""
    from importlib.resources import files

    data = json.loads(files("lensclust.tasks.words").joinpath("natural.json").read_text("utf-8"))
    words = set(data["answers"]) | {"->"}
    words |= {data["answers"][word][task] for word in data["answers"] for task in TASKS}
    words |= {
        w for task in TASKS for text in data["instructions"][task].values() for w in text.split()
    }
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
                num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                max_position_embeddings=64, bos_token_id=1, eos_token_id=1, pad_token_id=1,
            )
        )  # fmt: skip
        if taught:
            teach(model, PreTrainedTokenizerFast.from_pretrained(folder))
    model.save_pretrained(folder)
    return str(folder)


def teach(model: Any, tokenizer: Any) -> None:
    source = lc.tasks.natural(tokenizer, tasks=TASKS, paraphrases=(*SEEN, *UNSEEN))
    prompts = lc.tasks.icl(source, tokenizer, shots=2, pool=0.25, instruction=True)
    wanted = torch.tensor(first_answers(prompts))
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rows = torch.arange(len(prompts))
    for _ in range(60):
        logits = model(prompts.tokens).logits[rows, prompts.lengths - 1]
        loss = torch.nn.functional.cross_entropy(logits, wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        found = model(prompts.tokens).logits[rows, prompts.lengths - 1].argmax(-1)
    assert (found == wanted).float().mean() > 0.9


def few_shot(model: str) -> Alignment:
    return Alignment(
        pretrained=model, tasks=TASKS, shots=2, pretrained_examples=(2, 4), strengths=(1.0,),
        depths=(0.5, 1.0), trained_blocks=2, pretrained_steps=2, pretrained_rates=(1e-3, 3e-3),
    )  # fmt: skip


@pytest.mark.slow
def test_the_pretrained_part_scores_every_method_on_every_pair(tmp_path):
    found = measure_pretrained(few_shot(word_model(tmp_path, taught=True)))
    scores = found["scores"]
    rates = scores[scores["metric"] == WANTED]
    assert rates["value"].between(0, 1).all()
    assert len(rates[rates["examples"] == 4].groupby(["source", "target"])) == 6
    assert set(rates[rates["examples"] == 4]["method"]) >= {
        NOTHING,
        SHIFT,
        RANDOM_MATCHED + SHIFT,
        *TRAININGS,
    }
    assert (scores[scores["method"] == NOTHING].query("metric == @LOSS")["value"] == 0).all()
    assert set(rates["layer"].dropna()) <= {2, 4}
    # One learning rate for a method, chosen on a few pairs.
    assert (rates.dropna(subset="lr").groupby("method")["lr"].nunique() == 1).all()
    sentences = generated_texts(scores)
    assert 1 <= len(sentences) <= 5
    assert all("while steered" in sentence for sentence in sentences)
    both = pd.concat([world().query("part == 'synthetic'"), scores], ignore_index=True)
    assert {claim.id for claim in claims(both)} >= {"pretrained-moved", "pretrained-pull"}
    assert all(chart.to_dict() for chart in pictures(both).values())


def test_a_model_that_answers_nothing_is_refused_in_one_clear_line(tmp_path):
    with pytest.raises(lc.InputError, match="answers too few prompts") as caught:
        measure_pretrained(few_shot(word_model(tmp_path, taught=False)))
    assert "\n" not in str(caught.value)
