"""Labels and rows as users have them: pandas is the oracle for which rows are meant."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

import lensclust as lc
import probes
from lensclust.prompts.indexing import row_numbers
from lensclust.prompts.labels import label_text, label_texts

N = 7
DAYS: Any = ["2020-01-01", None, *["2021-05-06"] * 5]
COLUMNS = {
    "text": list("abcabca"),
    "number": [0, 1, 2, 0, 1, 2, 0],
    "fraction": [0.5, 1.0, np.nan, 0.5, 2.0, 1.0, np.nan],
    "truth": [True, False, True, True, False, False, True],
    "kind": pd.Categorical(list("xxyyzzx")),
    "nullable": pd.array([1, None, 2, 1, None, 2, 1], dtype="Int64"),
    "day": pd.to_datetime(DAYS),
}
NUMBERS = st.lists(st.integers(-N, N - 1), min_size=1, max_size=9)
MASKS = st.lists(st.booleans(), min_size=N, max_size=N).filter(any)
HOLDERS = {
    "list": list,
    "tuple": tuple,
    "array": np.array,
    "tensor": torch.tensor,
    "Series": pd.Series,
    "generator": iter,
    "objects": lambda values: np.array(values, dtype=object),
}


def prompts() -> lc.Prompts:
    rows = pd.DataFrame({"n": range(N), **COLUMNS})
    return lc.Prompts.from_token_lists([[1 + i] * (1 + i % 3) for i in range(N)], rows)


@pytest.mark.parametrize("holder", HOLDERS)
@settings(max_examples=20)
@given(st.one_of(NUMBERS, MASKS))
def test_take_is_pandas_iloc(holder, index):
    some = prompts()
    expected = some.rows.iloc[index]
    taken = some.take(HOLDERS[holder](index))
    assert taken.rows["n"].tolist() == expected["n"].tolist()
    assert taken.tokens[:, 0].tolist() == [1 + n for n in expected["n"]]


@given(st.slices(N))
def test_take_of_slices(index):
    expected = list(range(N))[index]
    if expected:
        assert prompts().take(index).rows["n"].tolist() == expected


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0.0, 1.0], "fractions such as 0.0"),
        ([0.9], "fractions"),
        ([N], "no row 7, there are 7"),
        ([-N - 1], "no row -8"),
        ([True], "a mask of 1 values for 7 rows"),
        ([[0, 1]], "a table of shape"),
        ("01", "expected row numbers or a mask"),
        (["0"], "texts such as 0"),
        ([None], "values such as None"),
        (np.array([True, None] + [False] * 5, dtype=object), "expected whole row numbers"),
        ([], "none left"),
        ([False] * N, "none left"),
        (slice("a"), "is not a slice"),
        ([2**70], "given values such as|no row"),
    ],
)
def test_what_is_no_index(index, message):
    with pytest.raises(lc.InputError, match=message):
        prompts().take(index)


@pytest.mark.parametrize("column", COLUMNS)
@settings(max_examples=20)
@given(data=st.data())
def test_where_is_pandas_isin(column, data):
    some = prompts()
    present = [v for v in pd.unique(some.rows[column]) if not pd.isna(v)]
    chosen = data.draw(st.lists(st.sampled_from(present), min_size=1, max_size=4))
    spelt = data.draw(st.sampled_from([list, tuple, set, iter, np.array, pd.Series, pd.Index]))
    expected = some.rows["n"][some.rows[column].isin(chosen)].tolist()
    assert some.where(**{column: spelt(chosen)}).rows["n"].tolist() == expected
    one = some.rows["n"][some.rows[column] == chosen[0]].tolist()
    assert some.where(**{column: chosen[0]}).rows["n"].tolist() == one
    assert some.where(**{column: label_text(chosen[0])}).rows["n"].tolist() == one


def test_missing_labels_are_found_by_none():
    some = prompts()
    for column in ("fraction", "nullable", "day"):
        for missing in (None, np.nan, pd.NA, pd.NaT):
            expected = some.rows["n"][some.rows[column].isna()].tolist()
            assert some.where(**{column: missing}).rows["n"].tolist() == expected
    with pytest.raises(lc.InputError, match="no prompt has"):
        some.where(text=None)
    with pytest.raises(lc.InputError, match="is no label"):
        some.where(number=[[0, 1]])


@given(st.lists(st.one_of(st.none(), st.integers(), st.floats(), st.text(), st.booleans())))
def test_a_column_is_spelt_as_its_values_are(values):
    column = np.empty(len(values), dtype=object)
    column[:] = values
    expected = np.array([label_text(value) for value in values], dtype=str).tolist()
    assert label_texts(column).tolist() == expected


def test_numbers_of_any_type_name_one_label():
    for kind in ("i1", "u4", "i8", "f4", "f8", object):
        assert label_texts(np.array([0, 3], dtype=kind)).tolist() == ["0", "3"]
    assert label_text(torch.tensor(3)) == label_text(np.float32(3)) == label_text(3) == "3"
    assert label_text(np.float32(0.1)) == label_texts(np.array([0.1], dtype="f4"))[0]


def test_rows_are_in_the_order_of_the_prompts():
    rows = pd.DataFrame({"task": ["a", "b"]}, index=[5, 3])
    given_rows: Any
    for given_rows in (rows, rows.to_dict("list"), rows.to_dict("records")):
        made = lc.Prompts.from_token_lists([[1], [2]], given_rows)
        assert made.rows["task"].tolist() == ["a", "b"]
    answers = pd.Series([[7], [8]], index=[5, 3])
    assert lc.Prompts.from_token_lists([[1], [2]], rows, answers=answers).answers == ((7,), (8,))
    with pytest.raises(lc.InputError, match="same index in another order"):
        lc.Prompts.from_token_lists([[1], [2]], rows, answers=answers.iloc[::-1])
    with pytest.raises(lc.InputError, match="2 prompts but 1 of 'rows'"):
        replace(made, rows=rows[:1])


@pytest.mark.parametrize("spelt", [np.array, torch.tensor, pd.Series, list, tuple])
def test_ids_answers_and_spans_in_whatever_holds_them(spelt):
    rows = pd.DataFrame({"task": ["a", "b"]})
    made = lc.Prompts.from_token_lists(
        [spelt([1, 2, 3]), spelt([4, 5])],
        rows,
        answers=spelt([6, 7]),
        spans={"s": np.array([[0, 2], [1, 2]]), "t": [spelt([0, 1]), (0, 0)]},
    )
    assert made.tokens.tolist() == [[1, 2, 3], [4, 5, 0]]
    assert made.answers == ((6,), (7,))
    assert (made.spans or {})["s"].tolist() == [[0, 2], [1, 2]]
    assert (made.spans or {})["t"].tolist() == [[0, 1], [0, 0]]


ROWS = pd.DataFrame({"task": ["a", "b"]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": [[1.7], [2]]}, r"prompt 0 is \[1.7\], expected a list of token ids"),
        ({"ids": [[True], [2]]}, "prompt 0 is"),
        ({"ids": ["12", [2]]}, "prompt 0 is '12'"),
        ({"ids": [["1"], [2]]}, "prompt 0 is"),
        ({"ids": [[-1], [2]]}, "outside 0"),
        ({"ids": [[2**31], [2]]}, "outside 0"),
        ({"ids": [1, 2]}, "prompt 0 is 1"),
        ({"answers": ["x", "y"]}, "answer of prompt 0 is"),
        ({"answers": [[1.5], [2]]}, "answer of prompt 0"),
        ({"answers": [[1]]}, "2 prompts but 1 of 'answers'"),
        ({"spans": {"s": [(0, 1.5), (0, 1)]}}, "span 's' of prompt 0"),
        ({"spans": {"s": [0, 1]}}, r"expected a range \(start, stop\)"),
        ({"spans": {"s": [(0, 3), (0, 1)]}}, "positions within its 1 tokens"),
        ({"rows": pd.DataFrame([[1, 2]] * 2, columns=["a", "a"])}, "the column 'a' twice"),
        ({"rows": {"a": 1}}, "rows given as a dict"),
        ({"rows": {"a": [1, 2], "b": [1]}}, "rows given as a dict"),
    ],
)
def test_what_no_prompt_is_made_of(arguments, message):
    with pytest.raises(lc.InputError, match=message):
        lc.Prompts.from_token_lists(**{"ids": [[1], [2]], "rows": ROWS} | arguments)


def test_row_numbers_leave_their_argument_alone():
    index = np.array([-1, 0])
    assert row_numbers("rows", index, 3).tolist() == [2, 0]
    assert index.tolist() == [-1, 0]


def test_columns_in_several_orders_are_refused():
    task, word = pd.Series(["a", "b", "c"]), pd.Series(["x", "y", "z"])
    together = lc.Prompts.from_token_lists([[1], [2], [3]], {"task": task[::-1], "i": word[::-1]})
    assert together.rows["task"].tolist() == ["c", "b", "a"]
    for other in (word.iloc[[1, 2, 0]], word.rename({0: 7}), word.set_axis(list("xyz"))):
        with pytest.raises(lc.InputError, match="'task' and 'i' have different indices"):
            lc.Prompts.from_token_lists([[1], [2], [3]], {"task": task, "i": other})


@given(st.permutations(range(5)), st.lists(st.booleans(), min_size=5, max_size=5))
def test_a_mask_of_a_frame_in_another_order_is_never_taken_for_ours(order, mask):
    series = pd.Series(mask, index=order)
    if order == [0, 1, 2, 3, 4]:
        assert row_numbers("f", series, 5).tolist() == np.flatnonzero(mask).tolist()
    else:
        with pytest.raises(lc.InputError, match="in another order"):
            row_numbers("f", series, 5)
    # An index of other numbers or names says nothing of the order.
    named = series.set_axis([f"row {i}" for i in order])
    assert row_numbers("f", named, 5).tolist() == np.flatnonzero(mask).tolist()


NUMERIC = ["int64", "Int64", "UInt8", "float64", "Float32", "int16[pyarrow]", "double[pyarrow]"]


@pytest.mark.parametrize("kind", NUMERIC)
@given(values=st.lists(st.integers(0, 9), min_size=2, max_size=6), missing=st.booleans())
def test_a_number_is_one_label_and_stays_a_number_in_every_type(
    kind: str, values: list[int], missing: bool
):
    missing = missing and kind != "int64"
    column = pd.Series([*values, None if missing else 3], dtype=kind)
    rows = pd.DataFrame({"x": column})
    prompts = lc.Prompts.from_token_lists([[5]] * len(column), rows)
    found = prompts.label_arrays()["x"]
    assert found.dtype.kind in "iuf"
    assert np.array_equal(found, column.to_numpy("f8", na_value=np.nan), equal_nan=True)
    assert label_texts(found).tolist() == label_texts(column.array).tolist()
    assert len(prompts.where(x=values[0])) == (column == values[0]).sum()


def test_whole_numbers_that_floats_cannot_tell_apart_are_texts():
    column = pd.Series([2**60, 2**60 + 1], dtype="Int64").reindex(range(3))
    prompts = lc.Prompts.from_token_lists([[5]] * 3, pd.DataFrame({"x": column}))
    assert prompts.label_arrays()["x"].tolist() == [str(2**60), str(2**60 + 1), ""]


def test_scores_do_not_depend_on_how_a_number_is_stored():
    model, rng = lc.load("native:sif-small"), np.random.default_rng(0)
    rows = pd.DataFrame({"task": np.repeat(list("abcd"), 6), "size": rng.integers(0, 9, 24) / 2})
    lists = rng.integers(3, 60, (24, 5)).tolist()
    found = []
    for kind in ("float64", "Float64", "double[pyarrow]"):
        prompts = lc.Prompts.from_token_lists(lists, rows.astype({"size": kind}))
        acts = lc.extract(model, prompts, "resid 3", progress=False)
        frame = probes.rsa(
            acts, ["task"], nuisance=["size"], compare="spearman", permutations=2, progress=False
        ).frame
        found.append(frame["value"].tolist())
        means = probes.mean_states(acts, by="size")
        probes.shift(means, rows["size"][0], rows["size"].iloc[-1], by="size")
    assert found[0] == found[1] == found[2]
