"""The shipped set: what it asks is right, and its surface does not tell the tasks apart."""

import hashlib
import itertools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.pairwise import cosine_similarity
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import lensclust as lc
from lensclust import InputError
from lensclust.tasks.words.natural import lay_out, template_names, words

SEEDS = range(10)

# Closed-class words: what English cannot ask without.
FUNCTION_WORDS = """
    a an the this that these those it its he she him her his they them you your i me my
    we who what which how when where while than there here and or not no nothing if as
    so because of in on at to for from with under before around by like is are be been
    being was were has have had do does did done must could would should can may always
    another other one more any every some such said says say but
"""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the instructions: whole words are tokens, as in real ones."""
    untrained = Tokenizer(models.BPE())
    untrained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    untrained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<bos>", "<pad>"],
        show_progress=False,
    )
    untrained.train_from_iterator(_sentences(), trainer)
    untrained.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", untrained.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=untrained,
        bos_token="<bos>",
        pad_token="<pad>",
        chat_template="{% for m in messages %}<bos>user: {{ m['content'] }}\n{% endfor %}reply: ",
    )


@pytest.fixture(scope="module")
def prompts(tokenizer: PreTrainedTokenizerFast) -> lc.Prompts:
    return lc.tasks.natural(tokenizer)


@pytest.fixture(scope="module")
def held_out(tokenizer: PreTrainedTokenizerFast) -> lc.Prompts:
    return lc.tasks.natural(tokenizer, held_out=True)


@pytest.fixture(scope="module")
def every_wording(tokenizer: PreTrainedTokenizerFast) -> lc.Prompts:
    names = template_names() + template_names(held_out=True)
    return lc.tasks.natural(tokenizer, paraphrases=names)


@pytest.fixture(scope="module", params=["prompts", "held_out", "every_wording"])
def instructions(request: pytest.FixtureRequest) -> pd.DataFrame:
    """The sentences of the set, of its held-out wordings, and of both."""
    chosen: lc.Prompts = request.getfixturevalue(request.param)
    return chosen.rows.drop_duplicates("instruction").reset_index(drop=True)


def _sentences() -> Iterator[str]:
    import json
    from importlib.resources import files

    data = json.loads(files("lensclust.tasks.words").joinpath("natural.json").read_text("utf-8"))
    for of_task in data["instructions"].values():
        yield from of_task.values()


def _mean_ari(features: np.ndarray, labels: pd.Series) -> float:
    k = labels.nunique()
    starts: Any = 5
    return float(
        np.mean(
            [
                adjusted_rand_score(
                    labels, KMeans(k, n_init=starts, random_state=seed).fit_predict(features)
                )
                for seed in SEEDS
            ]
        )
    )


# -- design -------------------------------------------------------------------------------


def test_every_task_has_every_paraphrase_and_every_input(prompts: lc.Prompts) -> None:
    rows = prompts.rows
    assert rows["task"].nunique() >= 12
    assert rows["template"].nunique() >= 6
    assert rows["input"].nunique() == 24
    counts = rows.groupby(["task", "template", "input"]).size()
    assert (counts == 1).all()
    assert len(counts) == len(rows) == np.prod(rows[["task", "template", "input"]].nunique())
    assert rows["wording"].nunique() == rows["instruction"].nunique()


def test_every_task_has_every_held_out_wording_and_the_answers_of_the_set(
    prompts: lc.Prompts, held_out: lc.Prompts
) -> None:
    counts = held_out.rows.groupby(["task", "template", "input"]).size()
    assert (counts == 1).all()
    assert len(counts) == prompts.rows["task"].nunique() * 4 * 24
    assert held_out.rows["wording"].nunique() == held_out.rows["instruction"].nunique()
    answers = prompts.rows.drop_duplicates(["task", "input"])
    both = held_out.rows.merge(answers, on=["task", "input"], suffixes=("", "_of_the_set"))
    assert len(both) == len(held_out)
    assert (both["output"] == both["output_of_the_set"]).all()


def test_held_out_wordings_are_told_apart_and_come_only_when_asked_for(
    prompts: lc.Prompts, held_out: lc.Prompts, every_wording: lc.Prompts
) -> None:
    assert prompts.rows["template"].unique().tolist() == template_names()
    assert held_out.rows["template"].unique().tolist() == template_names(held_out=True)
    assert not set(template_names()) & set(template_names(held_out=True))
    assert (prompts.rows["split"] == "all").all()
    assert (held_out.rows["split"] == "held_out").all()
    for split, alone in {"all": prompts, "held_out": held_out}.items():
        assert every_wording.where(split=split).digest() == alone.digest()


def test_the_sentences_that_figures_were_measured_on_have_not_changed(prompts: lc.Prompts) -> None:
    assert prompts.texts is not None
    digest = hashlib.sha256("\0".join(prompts.texts).encode()).hexdigest()
    assert digest == "ee9df574a747613aff8b1e599e5e64a67387c8f8cc67e6e842707502383332b9"


def test_prompts_of_one_instruction_stand_together(prompts: lc.Prompts) -> None:
    runs = [key for key, _ in itertools.groupby(prompts.rows["instruction"])]
    assert len(runs) == len(set(runs))


def test_no_two_tasks_agree_on_more_than_one_input(prompts: lc.Prompts) -> None:
    table = prompts.rows.drop_duplicates(["task", "input"]).pivot(
        index="input", columns="task", values="output"
    )
    for one, other in itertools.combinations(table, 2):
        assert (table[one] == table[other]).sum() <= 1, (one, other)


def test_outputs_are_single_words(prompts: lc.Prompts) -> None:
    assert prompts.rows["output"].str.fullmatch(r"\w+").all()


# -- answers ------------------------------------------------------------------------------

RULES = {
    "first_letter": lambda x: x[:1],
    "upper_case": str.upper,
    "length": lambda x: str(len(x)),
    "plural": lambda x: x + ("es" if re.search(r"(s|sh|ch|x)$", x) else "s"),
}


@pytest.mark.parametrize("task", RULES)
def test_answers_that_follow_a_rule(prompts: lc.Prompts, task: str) -> None:
    rows = prompts.rows[prompts.rows["task"] == task]
    assert rows["output"].tolist() == [RULES[task](x) for x in rows["input"]]


def test_answers_that_follow_a_rule_with_exceptions(prompts: lc.Prompts) -> None:
    table = prompts.rows.drop_duplicates(["task", "input"]).pivot(
        index="input", columns="task", values="output"
    )
    irregular = {
        x for x, y in table["past"].items() if not re.fullmatch(rf"{str(x).rstrip('e')}.?ed", y)
    }
    strong = ["throw", "light", "win", "rise", "sleep", "fall", "catch", "buy"]
    assert irregular == set(strong)
    doers = {x for x, y in table["doer"].items() if not re.fullmatch(rf"{x!s}.?e?r", y)}
    assert doers == {"lie"}
    # The opposite of an opposite is the word, wherever both are asked (but work, play, rest).
    for word, opposite in table["opposite"].items():
        if opposite in table.index and word != "play":
            assert table.loc[opposite, "opposite"] == word


# -- surface ------------------------------------------------------------------------------


def test_paraphrases_of_a_task_share_no_content_word(instructions: pd.DataFrame) -> None:
    known = set(FUNCTION_WORDS.split())
    for task, of_task in instructions.groupby("task"):
        stems = [
            {w[:5] for w in re.findall(r"[^\W\d_]+", s.lower()) if w not in known}
            for s in of_task["wording"]
        ]
        for one, other in itertools.combinations(stems, 2):
            assert not one & other, (task, one & other)


def test_instructions_do_not_contain_their_inputs_or_answers(prompts: lc.Prompts) -> None:
    for row in prompts.rows.itertuples():
        words = set(re.findall(r"\w+", str(row.wording).lower()))
        assert row.input not in words
        if len(str(row.output)) > 1:
            assert str(row.output).lower() not in words, (row.wording, row.output)


def test_held_out_wordings_contain_no_input_or_answer_of_any_task(held_out: lc.Prompts) -> None:
    outputs = {str(output).lower() for output in held_out.rows["output"]}
    told = set(words()) | {output for output in outputs if len(output) > 1 or output.isdigit()}
    for wording in held_out.rows["wording"].unique():
        assert not told & set(re.findall(r"\w+", wording.lower())), wording


def test_words_give_the_shape_away(instructions: pd.DataFrame) -> None:
    """What English cannot ask without is shared by the tasks of a template, not by a task."""
    bags = CountVectorizer(
        token_pattern=r"(?u)\b\w+\b", vocabulary=sorted(set(FUNCTION_WORDS.split()))
    ).fit_transform(instructions["wording"])
    similarity = cosine_similarity(bags)
    np.fill_diagonal(similarity, np.nan)
    same = {
        label: np.equal.outer(instructions[label].to_numpy(), instructions[label].to_numpy())
        for label in ("task", "template")
    }
    for template in instructions["template"].unique():
        rows = (instructions["template"] == template).to_numpy()
        of_shape = np.nanmean(similarity[rows][same["template"][rows]])
        of_task = np.nanmean(similarity[rows][same["task"][rows]])
        assert of_shape > of_task + 0.2, template


@pytest.mark.parametrize("vectorizer", [CountVectorizer, TfidfVectorizer])
@pytest.mark.parametrize("pattern", [r"(?u)\b\w\w+\b", r"(?u)\w+|[^\w\s]"])
def test_words_do_not_give_the_task_away(
    instructions: pd.DataFrame, vectorizer: type, pattern: str
) -> None:
    bags = vectorizer(token_pattern=pattern).fit_transform(instructions["wording"]).toarray()
    assert _mean_ari(bags, instructions["task"]) <= 0.1


def test_words_would_give_overlapping_paraphrases_away(instructions: pd.DataFrame) -> None:
    """The measure above is able to see a leak: name the task in each wording, and it does."""
    leaky = instructions["task"] + " " + instructions["task"] + "! " + instructions["task"]
    counts: Any = CountVectorizer().fit_transform(leaky + " " + instructions["wording"])
    assert _mean_ari(counts.toarray(), instructions["task"]) > 0.6


def test_tokens_do_not_give_the_task_away(
    instructions: pd.DataFrame, tokenizer: PreTrainedTokenizerFast
) -> None:
    bags = np.zeros((len(instructions), len(tokenizer)))
    for row, wording in zip(bags, instructions["wording"], strict=True):
        np.add.at(row, tokenizer(wording)["input_ids"], 1)
    assert _mean_ari(bags, instructions["task"]) <= 0.1


def test_neither_length_nor_template_gives_the_task_away(instructions: pd.DataFrame) -> None:
    def words(wording: Any) -> int:
        return len(wording.split())

    lengths = instructions["wording"].map(words)
    of_task = lengths.groupby(instructions["task"]).mean()
    assert of_task.max() <= 1.35 * of_task.min()
    assert adjusted_rand_score(instructions["task"], lengths) <= 0.1
    shapes = instructions.groupby("task")["template"].apply(list)
    assert all(shape == shapes.iloc[0] for shape in shapes)


# -- tokens -------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
def test_spans_cover_their_text(tokenizer: PreTrainedTokenizerFast, chat: bool) -> None:
    prompts = lc.tasks.natural(tokenizer, inputs=2, chat=chat)
    assert prompts.spans is not None
    for name, label in {"instruction": "wording", "input": "input"}.items():
        for ids, (start, stop), text in zip(
            prompts.tokens, prompts.spans[name].tolist(), prompts.rows[label], strict=True
        ):
            assert text in tokenizer.decode(ids[start:stop])
            assert text not in tokenizer.decode(ids[start + 1 : stop])
            assert text not in tokenizer.decode(ids[start : stop - 1])


@pytest.mark.parametrize("chat", [False, True])
def test_answers_continue_the_prompt_and_bos_comes_once(
    tokenizer: PreTrainedTokenizerFast, chat: bool
) -> None:
    prompts = lc.tasks.natural(tokenizer, tasks=["french", "length"], inputs=3, chat=chat)
    assert prompts.answers is not None
    for index, row in enumerate(prompts.rows.itertuples()):
        ids = prompts.tokens[index, : prompts.lengths[index]].tolist()
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id
        text = str(tokenizer.decode(ids + list(prompts.answers[index]), skip_special_tokens=True))
        assert text.endswith((f'Answer: "{row.output}', f"reply: {row.output}"))
        assert f'{row.wording}\nInput: "{row.input}"' in text


def test_plain_prompts_are_read_at_the_same_token(prompts: lc.Prompts) -> None:
    last = prompts.tokens.gather(1, prompts.position("answer")[:, None])
    assert len(last.unique()) == 1


def test_a_layout_of_ones_own(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = lc.tasks.natural(
        tokenizer,
        tasks=["past"],
        paraphrases=1,
        inputs=["win"],
        layout="{instruction}\nInput: {input}\nOutput:",
    )
    assert prompts.text(0) == "Give the past tense of this word.\nInput: win\nOutput:"
    assert prompts.answers is not None
    assert str(tokenizer.decode(list(prompts.answers[0]))) == " won"


def test_selections(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = lc.tasks.natural(
        tokenizer, tasks=["plural", "past"], paraphrases=["role", "rule"], inputs=5
    )
    assert len(prompts) == 2 * 2 * 5
    assert prompts.rows["instruction"].unique().tolist() == [
        "plural/role",
        "plural/rule",
        "past/role",
        "past/rule",
    ]


def test_selections_of_held_out_wordings(tokenizer: PreTrainedTokenizerFast) -> None:
    first = lc.tasks.natural(tokenizer, paraphrases=2, held_out=True)
    named = lc.tasks.natural(tokenizer, paraphrases=["wish", "correction"])
    assert first.rows["template"].unique().tolist() == ["wish", "correction"]
    assert first.digest() == named.digest()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["plurals"]}, "no task 'plurals': there are opposite, plural"),
        ({"tasks": []}, "no task given"),
        ({"paraphrases": 7}, "7 paraphrases requested, expected 1 to 6"),
        ({"paraphrases": ["wishes"]}, "no paraphrase 'wishes': there are imperative, question"),
        ({"paraphrases": ["role"], "held_out": True}, "no held-out paraphrase 'role': there are"),
        ({"paraphrases": 5, "held_out": True}, "5 held-out paraphrases requested, expected 1 to 4"),
        ({"held_out": "wish"}, "held_out"),
        ({"inputs": ["cat"]}, "no input 'cat'"),
        ({"inputs": 0}, "0 inputs requested, expected 1 to 24"),
        ({"layout": "{input}"}, "has the fields"),
        ({"layout": "{input"}, "is not a format string"),
    ],
)
def test_unusable_selections_say_what_there_is(
    tokenizer: PreTrainedTokenizerFast, options: dict, message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as error:
        lc.tasks.natural(tokenizer, **options)
    assert "\n" not in str(error.value)


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=4), st.text("ab :>\n"))
def test_lay_out_places_each_field(pairs: list[tuple[str, str]], literal: str) -> None:
    fields = {"x": [x for x, _ in pairs], "y": [y for _, y in pairs]}
    texts, spans = lay_out(literal + "{y}" + literal + "{x}", fields)
    for index, (text, (x, y)) in enumerate(zip(texts, pairs, strict=True)):
        assert text == literal + y + literal + x
        assert text[slice(*spans["x"][index])] == x
        assert text[slice(*spans["y"][index])] == y
