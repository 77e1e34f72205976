"""Words in a row: what the first task answers, as `natural` has it, then the second done to it."""

from typing import Any

import pytest

from lensclust.errors import InputError
from lensclust.tasks.words.composed_words import composed_words
from lensclust.tasks.words.natural import natural, task_names
from tests.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()


@pytest.mark.parametrize("first", task_names())
def test_the_second_step_is_done_to_the_answer_of_the_first(first):
    names = [f"{last} after {first}" for last in ("upper_case", "first_letter", "length")]
    rows = composed_words(TOKENIZER, tasks=names).rows
    between = natural(TOKENIZER, tasks=[first], paraphrases=["imperative"]).rows
    between = between.set_index("input")["output"]
    by_task = rows.groupby("task").first()
    assert sorted(by_task.index) == sorted(names)
    row: Any
    for row in rows.itertuples():
        word = between[row.input]
        wanted = {
            "upper_case": word.swapcase() if word.islower() else word.upper(),
            "first_letter": next(iter(word)),
            "length": str(len([c for c in word if c.isalpha()])),
        }[row.task.split()[0]]
        assert row.output == wanted


def test_basics_and_composites_have_sentences_of_their_own():
    words = composed_words(TOKENIZER, tasks=["upper_case after plural", "length after plural"])
    basics = natural(TOKENIZER)
    assert not set(words.rows["wording"]) & set(basics.rows["wording"])
    assert words.rows.groupby("wording")["task"].nunique().max() == 1
    assert words.position("input_end").max() < words.position("answer").max()


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["plural"], "no task 'plural': expected upper_case, first_letter, length, after one of"),
        (["plural after upper_case"], "no task 'plural after upper_case'"),
        ([], "no task given"),
    ],
)
def test_unknown_tasks_are_one_line(tasks, message):
    with pytest.raises(InputError, match=message) as caught:
        composed_words(TOKENIZER, tasks=tasks)
    assert "\n" not in str(caught.value)
