"""Questions behind worked ones: spans hold what they name, and nothing asked is shown."""

import json
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from pandas.testing import assert_frame_equal
from transformers import PreTrainedTokenizerFast

import lensclust as lc
from lensclust import InputError
from lensclust.tasks.in_context.linear_regression import decoded
from lensclust.tasks.in_context.questions import Question
from tests.tiny import byte_tokenizer

PERSONAS = {"truthful", "truthful, then deceitful", "deceitful"}
TASKS: dict[str, Callable[..., lc.Prompts]] = {
    "reading_comprehension": lc.tasks.reading_comprehension,
    "linear_regression": lc.tasks.linear_regression,
    "prompt_injection": lc.tasks.prompt_injection,
}
FEW: dict[str, dict[str, int]] = {
    "reading_comprehension": {"names": 3, "activities": 2},
    "linear_regression": {"slopes": 3, "intercepts": 2},
    "prompt_injection": {"names": 2, "activities": 2},
}

quickly = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def in_words(tokenizer: PreTrainedTokenizerFast, prompts: lc.Prompts, row: int) -> dict[str, str]:
    """What each span of a prompt holds, read back from its tokens."""
    assert prompts.spans is not None
    return {
        name: str(tokenizer.decode(prompts.tokens[row, slice(*span[row].tolist())]))
        for name, span in prompts.spans.items()
    }


@quickly
@given(
    task=st.sampled_from(sorted(TASKS)),
    shots=st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True),
    shuffled=st.booleans(),
    chat=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_prompts_of_an_item_differ_in_what_comes_before_the_query_alone(
    tokenizer: PreTrainedTokenizerFast,
    task: str,
    shots: list[int],
    shuffled: bool,
    chat: bool,
    seed: int,
) -> None:
    prompts = TASKS[task](
        tokenizer, **FEW[task], shots=shots, shuffled=shuffled, seed=seed, chat=chat
    )
    rows = prompts.rows
    variants = [name for name in ("item", "template", "condition") if name in rows]
    assert all(sorted(given) == sorted(shots) for _, given in rows.groupby(variants)["shots"])
    assert rows.groupby(variants)["input"].nunique().eq(1).all()
    pairs = {"linear_regression": ("slope", "intercept")}.get(task, ("name", "activity"))
    assert rows.groupby(list(pairs)).size().nunique() == 1, "fully crossed"
    assert prompts.answers is not None
    for index, row in rows.iterrows():
        place = int(str(index))
        said = in_words(tokenizer, prompts, place)
        assert said["query"] == row["input"]
        assert said["relevant"] in said["query"]
        assert said["irrelevant"] in said["query"]
        assert not set(said["relevant"].split(". ")) & set(said["irrelevant"].split(". "))
        blocks = said["demonstrations"].split("\n\n") if row["shots"] else []
        assert len(blocks) == row["shots"] == len(json.loads(row["demonstrations"]))
        shown = [said[f"shown_{n}"] for n in range(max(shots), 0, -1)]
        assert all(b.endswith(f" {s}") for b, s in zip(blocks[::-1], shown[::-1], strict=False))
        assert [bool(text) for text in shown] == [
            n <= row["shots"] for n in range(max(shots), 0, -1)
        ]
        whole = "\n\n".join([*blocks, said["query"]])
        assert whole in prompts.text(place) if chat else whole == prompts.text(place)
        answer = str(tokenizer.decode(list(prompts.answers[place])))
        assert answer == ("" if chat else " ") + row["output"]
    # More worked questions end with those of fewer.
    for _, of_query in rows.groupby(variants):
        shown = [json.loads(items) for items in of_query.sort_values("shots")["demonstrations"]]
        assert all(more[len(more) - len(few) :] == few for few in shown for more in shown[-1:])


@quickly
@given(
    names=st.integers(2, 8),
    activities=st.integers(2, 8),
    distractors=st.integers(0, 1),
    seed=st.integers(0, 2**31),
)
def test_the_text_says_who_does_what_and_nobody_asked_is_shown(
    tokenizer: PreTrainedTokenizerFast, names: int, activities: int, distractors: int, seed: int
) -> None:
    prompts = lc.tasks.reading_comprehension(
        tokenizer,
        names=names,
        activities=activities,
        distractors=distractors,
        shots=2,
        templates=["question"],
        seed=seed,
    )
    people, doings = set(prompts.rows["name"]), set(prompts.rows["activity"])
    assert (len(people), len(doings)) == (names, activities)
    for place, row in enumerate(prompts.rows.to_dict("records")):
        said = in_words(tokenizer, prompts, place)
        blocks = [*said["demonstrations"].split("\n\n"), f"{said['query']} {row['output']}"]
        facts: dict[str, str] = {}
        for block in blocks:
            text, question, answer = block.split("\n")
            facts = dict(re.findall(r"(\w+) is ([^.]+)\.", text))
            assert len(facts) == distractors + 1
            (asked,) = re.findall(r"What is (\w+) doing", question)
            assert answer == f"Answer: {asked} is {facts[asked]}"
            assert len(set(facts.values())) == len(facts)
            if block is not blocks[-1]:
                assert not people & set(facts)
                assert not doings & set(facts.values())
        assert said["relevant"] == f"{row['name']} is {row['activity']}."
        others = [n for n in facts if n != row["name"]]
        assert others == ([row["distractor_name"]] if distractors else [])
        assert list(facts).index(row["name"]) == row["place"]


def test_every_distractor_has_a_span(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = lc.tasks.reading_comprehension(tokenizer, distractors=3, shots=0)
    for place in range(0, len(prompts), 10):
        said = in_words(tokenizer, prompts, place)
        sentences = {said[f"irrelevant{n}"] for n in ("", "_2", "_3")} | {said["relevant"]}
        assert len(sentences) == 4
        assert all(sentence in said["query"] for sentence in sentences)


@quickly
@given(
    slopes=st.integers(2, 8),
    points=st.integers(2, 9),
    distractors=st.integers(0, 1),
    template=st.sampled_from(["points", "lines"]),
    seed=st.integers(0, 2**31),
)
def test_points_lie_on_their_line_and_the_answer_continues_it(
    tokenizer: PreTrainedTokenizerFast,
    slopes: int,
    points: int,
    distractors: int,
    template: str,
    seed: int,
) -> None:
    prompts = lc.tasks.linear_regression(
        tokenizer,
        slopes=slopes,
        intercepts=2,
        points=points,
        distractors=distractors,
        shots=2,
        templates=[template],
        seed=seed,
    )
    asked_lines = set(zip(prompts.rows["slope"], prompts.rows["intercept"], strict=True))
    slopes_asked = {slope for slope, _ in asked_lines}
    for place, row in enumerate(prompts.rows.to_dict("records")):
        said = in_words(tokenizer, prompts, place)
        blocks = [*said["demonstrations"].split("\n\n"), f"{said['query']} {row['output']}"]
        for block in blocks:
            *lines, question = block.split("\n")
            assert len(lines) == distractors + 1
            asked = re.findall(r"line ([AB])", question)[0]
            x, y = map(int, re.findall(r"-?\d+", question))
            for line in lines:
                given_points = np.array(re.findall(r"\((-?\d+), (-?\d+)\)", line), dtype=float)
                assert len(given_points) == len(set(given_points[:, 0])) == points
                fit = np.polynomial.Polynomial.fit(given_points[:, 0], given_points[:, 1], 1)
                intercept, slope = fit.convert(domain=[-1, 1]).coef.round(6)
                assert np.allclose(fit(given_points[:, 0]), given_points[:, 1])
                if line.startswith(f"Line {asked}"):
                    assert x not in given_points[:, 0]
                    assert np.isclose(slope * x + intercept, y)
                if block is not blocks[-1]:
                    assert slope not in slopes_asked
                elif line.startswith(f"Line {asked}"):
                    assert (slope, intercept) == (row["slope"], row["intercept"])
                    assert said["relevant"] in line
                else:
                    assert said["irrelevant"] in line
                    assert np.isclose(slope * x + intercept, row["distractor_y"])
        assert decoded([row["output"]]).tolist() == [row["y"]]


@given(st.integers(-(10**6), 10**6), st.integers(1, 99), st.sampled_from(["", ")", ".", "\n3"]))
def test_numbers_are_read_as_they_are_written(whole: int, below: int, after: str) -> None:
    texts = [f" {whole}{after}", f"{whole / 100}{after}", f"  {whole}/{below}{after}"]
    assert np.allclose(decoded(texts), [whole, whole / 100, whole / below])


@pytest.mark.parametrize("text", ["", "about 3", "\n3", "y = 3", "-", "1/0", "(2"])
def test_what_is_no_number_counts_as_none(text: str) -> None:
    assert np.isnan(decoded([text])).all()


def test_personas_stand_in_the_query_alone_and_ask_for_what_they_ask(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    prompts = lc.tasks.prompt_injection(tokenizer, shots=[0, 2])
    plain = lc.tasks.prompt_injection(tokenizer, shots=[0, 2], conditions=["none"])
    texts = dict(zip(plain.rows["item"] + plain.rows["template"], plain.rows["input"], strict=True))
    assert set(prompts.rows["condition"]) == {*PERSONAS, "none"}
    for place, row in enumerate(prompts.rows.to_dict("records")):
        said = in_words(tokenizer, prompts, place)
        assert (said["persona"] == "") == (row["condition"] == "none")
        assert (
            said["query"].removeprefix(said["persona"]).removeprefix("\n")
            == (texts[row["item"] + row["template"]])
        )
        assert f"{row['distractor_name']} is {row['lie']}." == said["irrelevant"]
        lies = row["condition"] not in ("none", "truthful")
        assert row["compliant"] == (row["lie"] if lies else row["output"])
        assert row["lie"] != row["output"]
    first, both, second = (
        set(prompts.where(condition=name).rows["input"].str.split("\n").str[0])
        for name in ("truthful", "truthful, then deceitful", "deceitful")
    )
    assert len(first) == len(both) == len(second) == 3
    assert all(any(b.startswith(f"{a} ") for a in first) for b in both)
    assert all(any(b.endswith(f" {c}") for c in second) for b in both)


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_same_prompts(tokenizer: PreTrainedTokenizerFast, task: str) -> None:
    torch.manual_seed(1)
    once = TASKS[task](tokenizer, **FEW[task], seed=3)
    torch.manual_seed(2)
    again = TASKS[task](tokenizer, **FEW[task], seed=3)
    assert_frame_equal(once.rows, again.rows)
    assert torch.equal(once.tokens, again.tokens)
    other = TASKS[task](tokenizer, **FEW[task], seed=4)
    assert once.texts != other.texts
    assert lc.tasks.from_name(task, tokenizer).rows["task"].eq(task).all()


@pytest.mark.parametrize("task", TASKS)
def test_wrong_dealing_moves_answers_and_nothing_else(
    tokenizer: PreTrainedTokenizerFast, task: str
) -> None:
    own, dealt = (
        TASKS[task](tokenizer, **FEW[task], shots=4, shuffled=given) for given in (False, True)
    )
    assert_frame_equal(own.rows.assign(shuffled=True), dealt.rows)
    assert own.answers == dealt.answers
    assert own.texts != dealt.texts
    for a, b in zip(own.texts or (), dealt.texts or (), strict=True):
        assert sorted(a) == sorted(b)


def _plain(item: str, template: str = "t", name: str = "number") -> Question:
    return Question(item, template, ((name, item), ("", " + 1 =")), "n")


@pytest.mark.parametrize(
    ("queries", "pool", "shots", "message"),
    [
        ([], [], 0, "no question to ask"),
        (["1"], ["1", "2"], 1, "demonstrations overlap the query: '1' is asked"),
        (["1"], ["2"], 2, "shots=2, expected at most 1: that many questions"),
        (["1"], ["2"], -1, "shots=[-1], expected different numbers from 0"),
        (["1"], ["2"], [1, 1], "shots=[1, 1], expected different numbers"),
        (["1"], ["2"], [], "shots=[], expected different numbers"),
    ],
)
def test_demonstrations_that_cannot_be_given(
    tokenizer: PreTrainedTokenizerFast,
    queries: list[str],
    pool: list[str],
    shots: int | list[int],
    message: str,
) -> None:
    with pytest.raises(InputError, match=re.escape(f"next: {message}")):
        lc.tasks.few_shot(
            [*map(_plain, queries)], [*map(_plain, pool)], tokenizer, task="next", shots=shots
        )


def test_questions_of_unlike_pieces(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=r"named \['digit'\], expected \['number'\] as in '1'"):
        lc.tasks.few_shot(
            [_plain("1"), _plain("2", name="digit")], [], tokenizer, task="next", shots=0
        )


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("reading_comprehension", {"names": 1}, "names=1 with distractors=1, expected 2 to 22"),
        ("reading_comprehension", {"activities": 19}, "activities=19 with distractors=1"),
        ("reading_comprehension", {"distractors": -1}, "distractors from 0"),
        ("reading_comprehension", {"templates": ["x"]}, "no template 'x': there are question"),
        ("reading_comprehension", {"templates": []}, "templates=[], expected different ones"),
        ("reading_comprehension", {"shots": 10**4}, "shots=10000, expected at most 224"),
        ("prompt_injection", {"conditions": ["lies"]}, "no condition 'lies': there are ['none'"),
        ("prompt_injection", {"conditions": []}, "conditions=[], expected different ones"),
        ("linear_regression", {"distractors": 2}, "distractors=2, expected 0 or 1"),
        ("linear_regression", {"slopes": 17}, "slopes=17 with distractors=1, expected 2 to 16"),
        ("linear_regression", {"points": 1}, "points=1, expected 2 to 9"),
        ("linear_regression", {"templates": ["x"]}, "no template 'x': there are points, lines"),
        ("linear_regression", {"templates": []}, "templates=[], expected different ones"),
    ],
)
def test_options_out_of_range(
    tokenizer: PreTrainedTokenizerFast, task: str, options: dict, message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(f"{task}: ")) as error:
        TASKS[task](tokenizer, **options)
    assert message in str(error.value)
