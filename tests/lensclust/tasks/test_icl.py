"""Demonstrations and queries never meet, and the prompt says what its labels say."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from pandas.testing import assert_frame_equal
from transformers import PreTrainedTokenizerFast

import lensclust as lc
from lensclust import InputError
from tests.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def source(tokenizer: PreTrainedTokenizerFast) -> lc.Prompts:
    return lc.tasks.natural(tokenizer, tasks=["plural", "past", "length"], paraphrases=2)


def _task_set(sizes: list[int]) -> lc.Prompts:
    """Tasks over overlapping inputs, of the given numbers of inputs."""
    rows = pd.DataFrame(
        [
            {"task": f"t{task}", "input": f"x{x + task}", "output": f"y{task}.{x}"}
            for task, size in enumerate(sizes)
            for x in range(size)
        ]
    )
    return lc.Prompts.from_token_lists([[1]] * len(rows), rows)


sizes = st.lists(st.integers(7, 20), min_size=1, max_size=3)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=sizes,
    shots=st.integers(1, 6),
    draws=st.integers(1, 2),
    pool=st.floats(0.1, 0.9),
    seed=st.integers(0, 2**31),
)
def test_pools_are_disjoint_and_answers_are_the_sources(
    tokenizer: PreTrainedTokenizerFast,
    sizes: list[int],
    shots: int,
    draws: int,
    pool: float,
    seed: int,
) -> None:
    given_rows = _task_set(sizes)
    prompts = lc.tasks.icl(given_rows, tokenizer, shots=shots, draws=draws, pool=pool, seed=seed)
    truth = given_rows.rows.set_index(["task", "input"])["output"]
    rows = prompts.rows
    assert set(rows["task"]) == {f"t{i}" for i in range(len(sizes))}
    for task, of_task in rows.groupby("task"):
        shown = {x for demos in of_task["demonstrations"] for x in json.loads(demos)}
        assert not shown & set(of_task["input"])
        assert of_task.groupby("input").size().eq(draws).all()
        for index, row in of_task.iterrows():
            demos = json.loads(row["demonstrations"])
            assert len(set(demos)) == len(demos) == shots == row["shots"]
            lines = [f"{x} -> {truth[task, x]}" for x in demos] + [f"{row['input']} ->"]
            assert prompts.text(int(str(index))) == "\n".join(lines)
            assert row["output"] == truth[task, row["input"]]


def test_tasks_over_the_same_inputs_ask_and_show_the_same(
    source: lc.Prompts, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = lc.tasks.icl(source, tokenizer, shots=4, draws=2).rows
    table = rows.pivot(index=["input", "draw"], columns="task", values="demonstrations")
    assert table.nunique(axis=1).eq(1).all()
    assert table["past"].nunique() > len(table) / 2, "demonstrations are drawn anew"


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("instruction", [False, True])
def test_spans_and_answers(
    source: lc.Prompts, tokenizer: PreTrainedTokenizerFast, instruction: bool, chat: bool
) -> None:
    prompts = lc.tasks.icl(
        source, tokenizer, shots=2, queries=2, instruction=instruction, chat=chat
    )
    assert prompts.spans is not None
    assert prompts.answers is not None
    assert ("instruction" in prompts.spans) == instruction
    for index, row in enumerate(prompts.rows.itertuples()):
        text = {
            name: tokenizer.decode(prompts.tokens[index, slice(*span[index].tolist())])
            for name, span in prompts.spans.items()
        }
        assert text["input"] == row.input
        assert text["demonstrations"].count(" -> ") == 2
        assert str(text["demonstrations"]) in prompts.text(index)
        if instruction:
            assert text["instruction"] == row.wording
        answer = str(tokenizer.decode(list(prompts.answers[index])))
        assert answer == (row.output if chat else f" {row.output}")


def test_instructions_multiply_the_prompts_and_keep_their_labels(
    source: lc.Prompts, tokenizer: PreTrainedTokenizerFast
) -> None:
    without = lc.tasks.icl(source, tokenizer, queries=3)
    prompts = lc.tasks.icl(source, tokenizer, queries=3, instruction=True)
    assert len(without) == 3 * 3
    assert len(prompts) == 3 * 2 * 3
    assert set(prompts.rows["instruction"]) == set(source.rows["instruction"])
    assert set(prompts.rows["template"]) == {"imperative", "question"}
    assert prompts.rows.groupby("task")["input"].nunique().eq(3).all()


def test_same_seed_same_prompts_whatever_the_global_state_and_row_order(
    source: lc.Prompts, tokenizer: PreTrainedTokenizerFast
) -> None:
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = np.random.get_state(legacy=False)  # noqa: NPY002
    once = lc.tasks.icl(source, tokenizer, seed=3)
    assert repr(np.random.get_state(legacy=False)) == repr(before)  # noqa: NPY002
    np.random.seed(2)  # noqa: NPY002
    again = lc.tasks.icl(source, tokenizer, seed=3)
    assert_frame_equal(once.rows, again.rows)
    assert torch.equal(once.tokens, again.tokens)
    backwards = lc.tasks.icl(source.take(range(len(source))[::-1]), tokenizer, seed=3)
    assert sorted(backwards.texts or ()) == sorted(once.texts or ())
    other = lc.tasks.icl(source, tokenizer, seed=4)
    assert not once.rows["demonstrations"].equals(other.rows["demonstrations"])


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    outputs=st.lists(st.sampled_from("ABCD"), min_size=7, max_size=14),
    shots=st.integers(2, 6),
    seed=st.integers(0, 2**31),
)
def test_shuffled_outputs_are_dealt_anew_and_as_few_as_possible_keep_theirs(
    tokenizer: PreTrainedTokenizerFast, outputs: list[str], shots: int, seed: int
) -> None:
    rows = pd.DataFrame({"task": "t", "input": [f"x{i}" for i in range(len(outputs))]})
    source = lc.Prompts.from_token_lists([[1]] * len(rows), rows.assign(output=outputs))
    plain, shuffled = (
        lc.tasks.icl(source, tokenizer, shots=shots, seed=seed, shuffled=given)
        for given in (False, True)
    )
    assert_frame_equal(plain.rows.assign(shuffled=True), shuffled.rows)
    assert plain.answers == shuffled.answers
    for index in range(len(plain)):
        own, dealt = (
            [line.split(" -> ") for line in prompts.text(index).split("\n")[:-1]]
            for prompts in (plain, shuffled)
        )
        assert [x for x, _ in own] == [x for x, _ in dealt]
        before, after = ([y for _, y in lines] for lines in (own, dealt))
        assert sorted(before) == sorted(after)
        # What more than half of the places hold has nowhere else to go.
        most = max(before.count(y) for y in before)
        assert sum(map(str.__eq__, before, after)) == max(0, 2 * most - shots)


def test_shuffles_differ_from_query_to_query_and_follow_the_seed(
    source: lc.Prompts, tokenizer: PreTrainedTokenizerFast
) -> None:
    once, again, other = (
        lc.tasks.icl(source.where(task="past"), tokenizer, shuffled=True, seed=seed)
        for seed in (0, 0, 1)
    )
    assert once.texts == again.texts != other.texts
    plain = lc.tasks.icl(source.where(task="past"), tokenizer)
    places = set()
    for index in range(len(plain)):
        before, after = (
            [line.split(" -> ")[1] for line in prompts.text(index).split("\n")[:-1]]
            for prompts in (plain, once)
        )
        places.add(tuple(before.index(y) for y in after))
    assert len(places) > len(plain) / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": 1, "shuffled": True}, "shots=1 with shuffled=True, expected 2 or more"),
        ({"shots": 24}, "task 'plural' has 24 inputs, expected at least 25"),
        ({"shots": 0}, "shots=0"),
        ({"queries": 0}, "queries=0"),
        ({"draws": 0}, "draws=0"),
        ({"pool": 1.0}, "pool=1.0, expected a share"),
    ],
)
def test_sizes_out_of_range(
    source: lc.Prompts, tokenizer: PreTrainedTokenizerFast, options: dict, message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        lc.tasks.icl(source, tokenizer, **options)


def test_a_source_without_the_labels(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="lack \\['instruction', 'template', 'wording'\\]"):
        lc.tasks.icl(_task_set([8]), tokenizer, instruction=True)
    nothing = lc.Prompts.from_token_lists([[1]], pd.DataFrame({"task": ["a"]}))
    with pytest.raises(InputError, match="lack \\['input', 'output'\\]"):
        lc.tasks.icl(nothing, tokenizer)
