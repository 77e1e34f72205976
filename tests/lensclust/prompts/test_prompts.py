"""Prompts: the tokenizer's own ids are the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st

import lensclust as lc
from tests.tiny import hf_model, tiny_tokenizer

CHAT = "{{ bos_token }} w7 {% for m in messages %}{{ m['content'] | trim }}{% endfor %} w8"


def rows(n: int) -> pd.DataFrame:
    return pd.DataFrame({"task": [f"t{i % 2}" for i in range(n)], "n": range(n)})


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_bos_stands_as_often_as_the_tokenizer_puts_it(tmp_path, adds_bos, chat):
    tokenizer = tiny_tokenizer(tmp_path, adds_bos=adds_bos)
    tokenizer.chat_template = CHAT
    prompts = lc.Prompts.from_texts(["w1 w2", "<bos> w3"], rows(2), tokenizer, chat=chat)
    for row in range(2):
        ids = prompts.tokens[row, : prompts.lengths[row]].tolist()
        inner = ids[1:] if adds_bos or chat or row else ids
        assert ids[0] == tokenizer.bos_token_id or not (adds_bos or chat or row)
        if not (chat and row):  # there the text itself spells a second one
            assert tokenizer.bos_token_id not in inner
        assert tokenizer(prompts.text(row))["input_ids"] == ids
    model = lc.load(hf_model("llama"), tokenizer=tokenizer)
    assert (
        model.to_tokens(prompts.text(0))[0].tolist()
        == prompts.tokens[0].tolist()[: prompts.lengths[0]]
    )


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", [CHAT, CHAT.replace("{{ bos_token }}", "")])
def test_a_chat_has_the_tokens_of_its_template(tmp_path, adds_bos, template):
    tokenizer = tiny_tokenizer(tmp_path, adds_bos=adds_bos)
    tokenizer.chat_template = template
    texts = ["w1 w2", "<bos> w3"]
    prompts = lc.Prompts.from_texts(
        texts, rows(2), tokenizer, answers=[" w4", " w5 w6"], spans={"all": [(0, 5)] * 2}, chat=True
    )
    for row, text in enumerate(texts):
        encoded: Any = tokenizer.apply_chat_template([{"role": "user", "content": text}])
        chat = encoded["input_ids"]
        assert prompts.tokens[row, : prompts.lengths[row]].tolist() == chat
        start, stop = (prompts.spans or {})["all"][row].tolist()
        assert tokenizer.decode(chat[start:stop]) == text[:5]


def test_answers_and_spans_follow_the_joint_text(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.chat_template = CHAT
    texts = ["w1 w2 w3", "  w1 w9"]
    spans = {"last": [(6, 8), (5, 7)], "none": [(3, 3), (0, 0)]}
    for chat in (False, True):
        prompts = lc.Prompts.from_texts(
            texts, rows(2), tokenizer, answers=[" w4 w5", " w6"], spans=spans, chat=chat
        )
        start, stop = (prompts.spans or {})["last"].T
        words = tokenizer.convert_ids_to_tokens
        assert [words(int(prompts.tokens[i, start[i]])) for i in range(2)] == ["w3", "w9"]
        assert (stop - start).tolist() == [1, 1]
        assert [words(list(answer)) for answer in prompts.answers or ()] == [["w4", "w5"], ["w6"]]
        assert prompts.position("last_end").tolist() == (stop - 1).tolist()
        with pytest.raises(lc.InputError, match="span 'none' of prompt 0 is empty"):
            prompts.position("none_start")
    tokenizer.chat_template = None
    with pytest.raises(lc.InputError, match="has no chat template"):
        lc.Prompts.from_texts(texts, rows(2), tokenizer, chat=True)


@given(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=9), min_size=1, max_size=8))
def test_padding_and_selection_keep_every_token(ids):
    prompts = lc.Prompts.from_token_lists(ids, rows(len(ids)), answers=[[7]] * len(ids))
    order = np.random.default_rng(len(ids)).permutation(len(ids))
    taken = prompts.take(order)
    for new, old in enumerate(order):
        assert taken.tokens[new, : taken.lengths[new]].tolist() == ids[old]
        assert taken.rows["n"][new] == old
    tokens, lengths, mask = prompts.with_answers()
    for row, given_ids in enumerate(ids):
        assert tokens[row, : lengths[row]].tolist() == [*given_ids, 7]
        assert tokens[row][mask[row]].tolist() == [7]


def test_selection_by_label():
    prompts = lc.Prompts.from_token_lists([[1], [2], [3]], rows(3))
    assert prompts.where(task="t0").rows["n"].tolist() == [0, 2]
    assert prompts.where(task=["t0", "t1"], n=1).rows["n"].tolist() == [1]
    with pytest.raises(lc.InputError, match=r"no label 'mood': rows have \['task', 'n'\]"):
        prompts.where(mood="good")
    with pytest.raises(lc.InputError, match="no prompt has"):
        prompts.where(task="t7")


def test_digest_sees_tokens_and_labels():
    one = lc.Prompts.from_token_lists([[1, 2]], rows(1))
    assert one.digest() == lc.Prompts.from_token_lists([[1, 2]], rows(1)).digest()
    assert one.digest() != lc.Prompts.from_token_lists([[1, 3]], rows(1)).digest()
    relabelled = lc.Prompts.from_token_lists([[1, 2]], rows(1).assign(task="other"))
    assert one.digest() != relabelled.digest()


def test_digest_sees_all_but_padding():
    """Every part that decides what is read or scored; not the width or the id of the padding."""
    ids, table = [[1, 2, 3], [4, 5]], rows(2)
    spans = {"s": [(0, 1), (0, 2)]}
    variants = [
        {},
        {"answers": [[1], [2]]},
        {"answers": [[1], [3]]},
        {"spans": spans},
        {"spans": {"s": [(0, 1), (1, 2)]}},
        {"spans": {"t": spans["s"]}},
        {"spans": spans, "answers": [[1], [2]]},
    ]
    made = [lc.Prompts.from_token_lists(ids, table, **each) for each in variants]
    assert len({each.digest() for each in made}) == len(variants)
    assert len({tuple(each.row_digests()) for each in made}) == len(variants)
    longer = lc.Prompts.from_token_lists([*ids, [9] * 8], rows(3), pad_id=7)
    assert longer.take([0, 1]).digest() == made[0].digest()
    assert longer.row_digests()[:2].tolist() == made[0].row_digests().tolist()
    wide = replace(made[0], tokens=torch.nn.functional.pad(made[0].tokens, (0, 4), value=9))
    assert wide.digest() == made[0].digest()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], rows(0)), "no prompt given"),
        (([[1]], rows(2)), "1 prompts but 2 of 'rows'"),
        (([[1], []], rows(2)), "prompt 1 has no token"),
    ],
)
def test_wrong_lists(arguments, message):
    with pytest.raises(lc.InputError, match=message):
        lc.Prompts.from_token_lists(*arguments)


def test_questions_that_have_no_answer():
    prompts = lc.Prompts.from_token_lists([[1]], rows(1))
    with pytest.raises(lc.InputError, match="no answers given"):
        prompts.with_answers()
    with pytest.raises(lc.InputError, match="no text to show"):
        prompts.text(0)
    assert "1 prompts, 1 tasks" in repr(prompts)
    assert "<table" in prompts._repr_html_()
    assert torch.equal(prompts.position("answer"), torch.tensor([0]))
