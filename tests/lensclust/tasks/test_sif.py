import os
import random
import re
import subprocess
import sys
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from lensclust.errors import InputError
from lensclust.prompts.prompts import Prompts
from lensclust.tasks.synthetic.sif import SPLITS, sif, vocabulary

SMALL: dict[str, Any] = {
    "n_tasks": 4,
    "n_inputs": 5,
    "mappings_per_task": 3,
    "strings_per_regex": 12,
    "rows_per_mapping": 5,
}
quick = settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, object]:
    n_inputs = draw(st.integers(2, 6))
    shortest = draw(st.integers(4, 6))
    return {
        "n_tasks": draw(st.integers(2, 5)),
        "n_inputs": n_inputs,
        "mappings_per_task": draw(st.integers(2, n_inputs)),
        "regexes_per_task": draw(st.integers(2, 3)),
        "held_out_regexes": draw(st.integers(0, 2)),
        "held_out_inputs": draw(st.integers(0, 1)),
        "strings_per_regex": draw(st.integers(1, 20)),
        "rows_per_mapping": draw(st.integers(1, 6)),
        "lengths": (shortest, shortest + draw(st.integers(0, 3))),
        "fixed_length": draw(st.booleans()),
        "n_outputs": n_inputs + 4,
        "seed": draw(st.integers(0, 10_000)),
    }


def table(rows: pd.DataFrame, task: int) -> dict[str, str]:
    return dict(rows.loc[rows["task"] == task, ["input", "output"]].itertuples(index=False))


def content(prompts: Prompts) -> tuple[object, ...]:
    return prompts.tokens.tolist(), prompts.rows.to_dict("list"), prompts.answers, prompts.texts


@quick
@given(sizes())
def test_a_string_matches_its_own_expression_and_no_other(knobs):
    rows = sif(**knobs).rows
    patterns = rows.drop_duplicates("template").set_index("template")["pattern"]
    assert patterns.is_unique
    for row in rows.drop_duplicates("instruction").itertuples():
        matching = [t for t, p in patterns.items() if re.fullmatch(p, row.instruction)]
        assert matching == [row.template]


@quick
@given(sizes())
def test_splits_are_what_they_say(knobs):
    rows = sif(**knobs).rows
    assert not rows.duplicated(["instruction", "input"]).any()
    train = rows[rows["split"] == "train"]
    strings, regexes = set(train["instruction"]), set(train["template"])
    pairs = set(zip(train["template"], train["input"], strict=True))
    known = set(zip(train["task"], train["input"], strict=True))
    seen = {  # string, expression, pair of expression and input
        "train": (True, True, True),
        "new_string": (False, True, True),
        "new_pair": (True, True, False),
        "both": (False, True, False),
        "new_regex": (False, False, False),
    }
    row: Any
    for row in rows.itertuples():
        assert seen[row.split] == (
            row.instruction in strings,
            row.template in regexes,
            (row.template, row.input) in pairs,
        )
        assert (row.task, row.input) in known, "asked for an input that the task never showed"
    per_mapping = rows[rows["split"] != "train"].groupby(["split", "task", "input"]).size()
    assert per_mapping.max() <= knobs["rows_per_mapping"]


@quick
@given(sizes())
def test_tables_are_functions_that_disagree(knobs):
    rows = sif(**knobs).rows
    assert (rows.groupby(["task", "input"])["output"].nunique() == 1).all()
    tables = [table(rows, task) for task in range(knobs["n_tasks"])]
    assert {len(t) for t in tables} == {knobs["mappings_per_task"]}
    for a, b in combinations(tables, 2):
        shared = a.keys() & b.keys()
        assert not shared or 2 * sum(a[x] != b[x] for x in shared) > len(shared)
    uses = pd.Series([x for t in tables for x in t]).value_counts()
    assert uses.max() - uses.min() <= 1


@quick
@given(sizes())
def test_every_expression_has_the_same_mix_of_lengths(knobs):
    rows = sif(**knobs).rows
    lengths = rows["instruction"].str.len()
    shortest, longest = knobs["lengths"]
    assert lengths.between(longest if knobs["fixed_length"] else shortest, longest).all()
    train = rows[rows["split"] == "train"].drop_duplicates("instruction")
    mix = train.groupby("template")["instruction"].agg(lambda s: sorted(s.str.len()))
    assert mix.map(tuple).nunique() == 1


@quick
@given(sizes())
def test_tokens_spell_the_text(knobs):
    prompts = sif(**knobs)
    symbols = vocabulary(n_inputs=knobs["n_inputs"], n_outputs=knobs["n_outputs"], n_letters=20)
    assert len(set(symbols)) == len(symbols) == int(prompts.tokens.max()) + 1
    assert prompts.pad_id == symbols.index("<pad>")
    answers = prompts.answers
    assert answers is not None
    for i, row in enumerate(prompts.rows.itertuples()):
        ids = prompts.tokens[i, : prompts.lengths[i]].tolist()
        assert "".join(symbols[t] for t in ids) == prompts.text(i)
        assert prompts.text(i) == f"<bos>{row.instruction}<sep>{row.input}"
        for name in ("instruction", "input"):
            start, stop = (prompts.spans or {})[name][i].tolist()
            assert "".join(symbols[t] for t in ids[start:stop]) == getattr(row, name)
        assert [symbols[t] for t in answers[i]] == [row.output]
    assert prompts.position("answer").equal(prompts.position("input_end"))


@quick
@given(st.integers(0, 2**31 - 1))
def test_global_random_state_is_not_read(state):
    random.seed(state)
    np.random.seed(state)  # noqa: NPY002
    torch.manual_seed(state)
    first = sif(**SMALL, seed=3)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    assert content(first) == content(sif(**SMALL, seed=3))


def test_the_same_in_another_process_and_its_global_state_unchanged():
    # In a process of its own: under pytest the type checker itself draws from `random`.
    script = f"""
import random, numpy, torch
from lensclust.tasks import sif
def state():
    return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
sif(n_tasks=1)  # what is imported on first use may do as it likes
before = state()
prompts = sif(**{SMALL!r}, seed=3)
assert state() == before
print(prompts.tokens.tolist(), prompts.rows.to_csv())
"""
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    printed = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout
    prompts = sif(**SMALL, seed=3)
    assert printed == f"{prompts.tokens.tolist()} {prompts.rows.to_csv()}\n"


def test_seeds_differ_and_tables_do_not_depend_on_the_strings():
    base = sif(**SMALL, seed=0).rows
    assert not base.equals(sif(**SMALL, seed=1).rows)
    longer = sif(**{**SMALL, "lengths": (6, 9), "strings_per_regex": 20}, seed=0).rows
    assert [table(base, t) for t in range(4)] == [table(longer, t) for t in range(4)]


def test_defaults_are_fit_for_clustering_given_the_input():
    prompts = sif()
    rows = prompts.rows
    assert rows["task"].nunique() == rows["input"].nunique() == 10
    assert tuple(rows["split"].unique()) == SPLITS
    evaluated = rows[rows["split"] != "train"]
    assert (evaluated.groupby(["split", "task", "input"]).size() == 8).all()
    assert len(evaluated) < 1500
    # Different outputs for one input: chance of a guess among the tasks that know it is 1 in 5.
    assert (rows.groupby("input")["output"].nunique() == 5).all()


def test_fixed_length_leaves_only_the_input_at_the_last_token():
    prompts = sif(**SMALL, fixed_length=True)
    assert prompts.lengths.unique().numel() == 1
    last = prompts.tokens.gather(1, prompts.position("answer")[:, None])[:, 0]
    assert pd.DataFrame({"x": prompts.rows["input"], "id": last}).drop_duplicates()["x"].is_unique


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"mappings_per_task": 11}, "mappings_per_task=11, expected at most n_inputs=10"),
        ({"n_tasks": 0}, "n_tasks=0, expected at least 1"),
        ({"held_out_inputs": -1}, "held_out_inputs=-1, expected at least 0"),
        ({"regexes_per_task": 1}, "held_out_inputs . regexes_per_task=1, expected at most"),
        ({"lengths": (6, 5)}, "lengths.0.=6, expected at most lengths.1.=5"),
        ({"n_letters": 27}, "n_letters=27, expected at most"),
        ({"n_outputs": 1}, "disagree on most shared inputs"),
        ({"n_letters": 1}, "only 0 of 60 regular expressions found"),
        ({"n_tasks": 300, "n_letters": 2}, "300 tables of 5 inputs that disagree"),
        ({"strings_per_regex": 10**6}, "only 0 of 60 regular expressions found"),
        ({"lengths": (1, 2)}, "regular expressions found"),
    ],
)
def test_what_cannot_be_met_is_one_line(knobs, said):
    with pytest.raises(InputError, match=said) as error:
        sif(**knobs)
    assert "\n" not in str(error.value)
