"""Results are those of Python's own evaluation of the expression, written out independently."""

from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from lensclust.errors import InputError
from lensclust.tasks.words.arithmetic import arithmetic
from tests.tiny import byte_tokenizer

EXPRESSIONS = {
    "add": "{0} + {1}",
    "subtract": "{0} - {1}",
    "multiply": "{0} * {1}",
    "multiply after add": "({0} + {1}) * {2}",
    "add after multiply": "({0} * {1}) + {2}",
    "subtract after add": "({0} + {1}) - {2}",
    "add after add": "{0} + {1} + {2}",
}
TOKENIZER = byte_tokenizer()


@settings(max_examples=12, deadline=None, database=None)
@given(
    st.lists(st.sampled_from(sorted(EXPRESSIONS)), min_size=1, unique=True),
    st.integers(4, 30),
    st.integers(0, 10_000),
)
def test_results_are_right_and_inputs_shared(tasks, largest, seed):
    prompts = arithmetic(
        TOKENIZER, tasks=tasks, inputs=9, test_inputs=4, largest=largest, seed=seed
    )
    rows = prompts.rows
    row: Any
    for row in rows.itertuples():
        numbers = row.input.split(", ")
        assert all(1 <= int(number) <= largest for number in numbers)
        assert int(row.output) == eval(EXPRESSIONS[row.task].format(*numbers))
        assert (row.kind == "two steps") == ("after" in row.task)
    by_split = rows.groupby("split")["input"].unique()
    assert not set(by_split["train"]) & set(by_split["test"])
    for _, own in rows.groupby("task"):
        assert set(own["input"]) == set(rows["input"])
    answers = [TOKENIZER.decode(list(answer)) for answer in prompts.answers or ()]
    assert answers == rows["output"].tolist()


def test_sentences_differ_between_tasks_and_ends_do_not():
    rows = arithmetic(TOKENIZER, tasks=sorted(EXPRESSIONS), inputs=2, test_inputs=0).rows
    assert rows.groupby("wording")["instruction"].nunique().max() == 1
    assert set(rows["split"]) == {"train"}


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"tasks": ["divide"]}, "no task 'divide': expected add, subtract, multiply, or two"),
        ({"tasks": ["add after add after add"]}, "no task 'add after add after add'"),
        ({"tasks": []}, "tasks=0, expected at least 1"),
        ({"inputs": 0}, "inputs=0, expected at least 1"),
        ({"largest": 2}, "inputs=64 and test_inputs=16, expected 0 or more and at most 8"),
    ],
)
def test_unusable_knobs_are_one_line(knobs, message):
    with pytest.raises(InputError, match=message) as caught:
        arithmetic(TOKENIZER, **knobs)
    assert "\n" not in str(caught.value)
