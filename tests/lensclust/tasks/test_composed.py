"""Composed tasks are what their names say, and share nothing they should not."""

import re
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from lensclust.errors import InputError
from lensclust.tasks.synthetic.composed import composed

quick = settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, object]:
    n_moves, n_maps = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    pair = st.tuples(st.integers(0, n_moves - 1), st.integers(0, n_maps - 1))
    return {
        "n_moves": n_moves,
        "n_maps": n_maps,
        "pairs": draw(st.lists(pair, max_size=3)),
        "width": draw(st.integers(4, 5)),
        "n_symbols": draw(st.integers(7, 9)),
        "regexes_per_task": draw(st.integers(1, 2)),
        "strings_per_regex": draw(st.integers(1, 8)),
        "test_strings": draw(st.integers(1, 4)),
        "inputs_per_string": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 10_000)),
    }


def functions(rows: pd.DataFrame, task: str, width: int) -> list[tuple[list[str], list[str]]]:
    own = rows[rows["task"] == task]
    pairs = zip(own["input"], own["output"], strict=True)
    return [(given.split(), answer.split()) for given, answer in pairs]


@quick
@given(sizes())
def test_a_composite_is_its_map_after_its_move(knobs):
    """The parts are read off the prompts of the parts alone, then applied one after the other."""
    rows = composed(**knobs).rows
    composites = rows[rows["kind"] == "composite"].drop_duplicates("task")
    assert len(composites) == len(set(knobs["pairs"]))
    for composite in composites.itertuples():
        pairs = functions(rows, composite.move, knobs["width"])
        # Symbols of one input differ, so a single prompt says where each comes from.
        given, answer = pairs[0]
        move = [given.index(symbol) for symbol in answer]
        assert all([g[i] for i in move] == a for g, a in pairs)
        table = {
            x: y
            for g, a in functions(rows, composite.map, knobs["width"])
            for x, y in zip(g, a, strict=True)
        }
        for g, a in functions(rows, composite.task, knobs["width"]):
            for i, place in enumerate(move):
                assert table.get(g[place], a[i]) == a[i]


@quick
@given(sizes())
def test_strings_match_their_own_expression_and_no_other(knobs):
    rows = composed(**knobs).rows
    patterns = rows.drop_duplicates("template").set_index("template")["pattern"]
    for row in rows.drop_duplicates("instruction").itertuples():
        assert [t for t, p in patterns.items() if re.fullmatch(p, row.instruction)] == [
            row.template
        ]


@quick
@given(sizes())
def test_test_prompts_share_neither_string_nor_input_with_training(knobs):
    rows = composed(**knobs).rows
    assert not rows.duplicated(["instruction", "input"]).any()
    train, test = (rows[rows["split"] == split] for split in ("train", "test"))
    for column in ("instruction", "input"):
        assert not set(train[column]) & set(test[column])
    assert set(train["template"]) == set(test["template"])


@quick
@given(st.integers(0, 10_000))
def test_functions_of_a_kind_agree_on_less_than_half(seed):
    rows = composed(
        n_moves=7, n_maps=7, pairs=[], strings_per_regex=24, inputs_per_string=4, seed=seed
    ).rows
    for kind, size in (("move", 4), ("map", 10)):
        tables = []
        for task in rows.loc[rows["kind"] == kind, "task"].unique():
            pairs = functions(rows, task, 4)
            if kind == "move":
                given, answer = pairs[0]
                tables.append([given.index(symbol) for symbol in answer])
            else:
                table = {x: y for g, a in pairs for x, y in zip(g, a, strict=True)}
                tables.append([int(table[f"s{i}"][1:]) for i in range(size)])
            assert sorted(tables[-1]) == list(range(size))
        for a, b in combinations([list(range(size)), *tables], 2):
            assert 2 * sum(np.equal(a, b)) < size


def test_the_same_seed_gives_the_same_prompts_and_strings_leave_functions_alone():
    small: dict[str, Any] = {"strings_per_regex": 4, "test_strings": 2}
    one, two = composed(**small, seed=3), composed(**small, seed=3)
    assert one.digest() == two.digest() != composed(**small, seed=4).digest()
    other = composed(**small, regexes_per_task=1, seed=3)
    rows = one.rows.groupby(["task", "input"])["output"].first()
    common = other.rows.groupby(["task", "input"])["output"].first()
    shared = rows.index.intersection(common.index)
    assert (rows[shared] == common[shared]).all()


def test_ids_spans_and_answers_spell_the_prompt():
    prompts = composed(strings_per_regex=2, test_strings=1)
    spans = prompts.spans or {}
    inputs = [
        row[start:stop].tolist()
        for row, (start, stop) in zip(prompts.tokens, spans["input"].tolist(), strict=True)
    ]
    # Ids of symbols are their numbers behind the padding.
    answers = prompts.answers or ()
    for row, ids, answer in zip(prompts.rows.itertuples(), inputs, answers, strict=True):
        assert " ".join(f"s{i - 1}" for i in ids) == row.input
        assert " ".join(f"s{i - 1}" for i in answer) == row.output
    ends = spans["input"][:, 1]
    assert (ends == prompts.lengths).all()
    instruction = spans["instruction"]
    letters = (instruction[:, 1] - instruction[:, 0]).tolist()
    assert letters == prompts.rows["instruction"].str.len().tolist()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"width": 1}, "composed: width=1, expected at least 2"),
        ({"width": 4, "n_symbols": 3}, "composed: width=4, expected at most n_symbols=3"),
        ({"pairs": [(3, 0)]}, r"composed: pair \(3, 0\), expected a move below n_moves=3"),
        ({"n_moves": 0, "n_maps": 0, "pairs": []}, r"n_moves \+ n_maps=0, expected at least 1"),
        ({"n_moves": 30}, "composed: 30 moves of 4 symbols that agree on less than half"),
        ({"n_letters": 2}, "composed: only [0-9]+ of 16 regular expressions found"),
        ({"lengths": (6, 5)}, r"composed: lengths\[0\]=6, expected at most lengths\[1\]=5"),
    ],
)
def test_unusable_sizes_are_one_line(knobs, message):
    with pytest.raises(InputError, match=message) as caught:
        composed(**knobs)
    assert "\n" not in str(caught.value)
