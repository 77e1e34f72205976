"""Spans and added tokens by construction, whatever the text says and the template does.

The oracle of spans: a template that is known, so that where it puts each character of a message
can be computed without rendering anything, and a tokenizer with one token a byte.
"""

from __future__ import annotations

import copy
import html

import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

import lensclust as lc
from lensclust.models.tokenizers import same_tokenizer, tokenizer_fingerprint
from lensclust.prompts.chat_templates import render
from tests.tiny import byte_tokenizer, tiny_tokenizer

BYTES = byte_tokenizer()
# Jinja expression of the message -> what each of its characters becomes.
CHANGES = {
    "m['content']": lambda text: list(text),
    "m['content'] | trim": lambda text: _trimmed(text, text.strip()),
    "m['content'].lstrip()": lambda text: _trimmed(text, text.lstrip()),
    "m['content'].rstrip()": lambda text: [
        *text.rstrip(),
        *[""] * (len(text) - len(text.rstrip())),
    ],
    "m['content'] | upper": lambda text: [character.upper() for character in text],
    "m['content'] | e": lambda text: [_escaped(character) for character in text],
    "(m['content'] | trim | e)": lambda text: list(map(_escaped, _trimmed(text, text.strip()))),
}
FRAMES = {
    "plain": "<user> {} <reply>",
    "close": "{}",
    "system": "You are a helpful AI. a b  <user>{}.\nAI:",
    "repeated": "Topic: {} -- now {}.\n<reply>",
    "cut": "{{% for m in messages %}}{{{{ m['content'][:3] }}}}{{% endfor %}}| {}",
}
MESSAGES = st.text(st.sampled_from("aAI <&>é \n{}%你"), min_size=1, max_size=8)


def _trimmed(text: str, kept: str) -> list[str]:
    lead = len(text) - len(text.lstrip()) if kept != text or kept[:1].strip() else 0
    if not kept:
        return [""] * len(text)
    return [*[""] * lead, *kept, *[""] * (len(text) - lead - len(kept))]


def _escaped(character: str) -> str:
    return html.escape(character).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")


def ids_of(text: str) -> list[int]:
    return BYTES(text)["input_ids"]


@pytest.fixture(scope="module", autouse=True)
def _rendering() -> None:
    """The process that renders chats is there before any example is timed."""
    assert render("{{ messages[0].content }}", "a", {}) == "a"


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("frame", FRAMES)
@settings(max_examples=25)
@given(text=MESSAGES, data=st.data())
def test_a_span_is_where_the_template_puts_its_characters(frame, change, text, data):
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, len(text)))
    tokenizer = copy.copy(BYTES)
    shown = "{% for m in messages %}{{ " + change + " }}{% endfor %}"
    tokenizer.chat_template = FRAMES[frame].format(*[shown] * 2)
    pieces = CHANGES[change](text)
    whole = "".join(pieces)
    outer = FRAMES[frame]
    if frame == "cut":
        head, tail = text[:3] + "| ", ""
    elif frame == "repeated":
        head, tail = f"Topic: {whole} -- now ", ".\n<reply>"
    else:
        head, tail = outer.split("{}")
    message = head + whole + tail
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
    assert rendered == message  # the oracle knows the template
    if not message:
        return
    inside = "".join(pieces[start:stop])
    arguments = ([text], pd.DataFrame({"task": ["a"]}), tokenizer)
    spans = {"s": [(start, stop)]}
    if start < stop and not inside:
        with pytest.raises(lc.InputError, match=r"omits .* so that their span cannot be located"):
            lc.Prompts.from_texts(*arguments, chat=True, spans=spans)
        return
    prompts = lc.Prompts.from_texts(*arguments, chat=True, spans=spans)
    assert prompts.tokens[0].tolist() == ids_of(message)
    first, last = (prompts.spans or {})["s"][0].tolist()
    assert prompts.tokens[0, first:last].tolist() == ids_of(inside)
    if inside:
        assert first == len((head + "".join(pieces[:start])).encode())


def test_a_template_that_changes_a_message_beyond_recognition_is_refused():
    tokenizer = copy.copy(BYTES)
    tokenizer.chat_template = "{{ messages[0]['content'] | reverse }}"
    arguments = (["abc"], pd.DataFrame({"task": ["a"]}), tokenizer)
    assert lc.Prompts.from_texts(*arguments, chat=True).text(0) == "cba"
    with pytest.raises(lc.InputError, match="changes the text 'abc'"):
        lc.Prompts.from_texts(*arguments, chat=True, spans={"s": [(0, 2)]})
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(lc.InputError, match="refuses the text 'abc': no such role"):
        lc.Prompts.from_texts(*arguments, chat=True)


@pytest.mark.parametrize(
    "single",
    ["$A", "<bos> $A", "$A <eos>", "<bos> $A <eos>", "<eos> $A", "<bos> $A w5", "$A w5 <eos>"],
)
@given(words=st.lists(st.sampled_from(["<bos>", "<eos>", "w1", "w2", "odd"]), max_size=5))
def test_only_what_the_tokenizer_added_is_left_out(single, words):
    tokenizer = closing(single)
    spelt = ["w3", *words] if words[:1] == ["<bos>"] else words
    text = " ".join(spelt)
    if not text:
        return
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompts = lc.Prompts.from_texts([text], pd.DataFrame({"task": ["a"]}), tokenizer)
    before = {"<bos>": [1], "<eos>": [2]}.get(single.split()[0], [])
    assert prompts.tokens[0].tolist() == [*before, *own]


@pytest.mark.parametrize("single", ["$A", "<bos> $A", "<bos> $A <eos>"])
@pytest.mark.parametrize("text", ["<bos> w1 <eos>", "<bos> <bos> w1", "<bos>"])
def test_a_bos_that_the_text_spells_is_not_added_again(single, text):
    tokenizer = closing(single)
    rows = pd.DataFrame({"task": ["a"]})
    found = lc.Prompts.from_texts(
        [text], rows, tokenizer, answers=[" w4 <eos>"], spans={"all": [(0, len(text))]}
    )
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert found.tokens[0].tolist() == own
    assert found.answers == ((8, 2),)
    assert (found.spans or {})["all"].tolist() == [[0, len(own)]]


def closing(single: str):
    """A word tokenizer that adds these tokens; unknown words are its BOS, as in GPT-2."""
    tokenizer = copy.deepcopy(_WORDS)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<bos>", 1), ("<eos>", 2), ("w5", 9)]
    )
    return tokenizer


@pytest.fixture(scope="module", autouse=True)
def words(tmp_path_factory):
    global _WORDS
    _WORDS = tiny_tokenizer(tmp_path_factory.mktemp("words"))


def test_an_unknown_word_is_no_added_bos(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.bos_token = tokenizer.unk_token
    prompts = lc.Prompts.from_texts(["<unk> odd w1"], pd.DataFrame({"task": ["a"]}), tokenizer)
    assert prompts.tokens[0].tolist() == tokenizer("<unk> odd w1")["input_ids"]


def spacing(scheme: str) -> PreTrainedTokenizerFast:
    """A tokenizer that shows spaces as ``▁``, and puts one before a text as ``scheme`` says."""
    cut = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if scheme == "normalizer":  # as in Llama 2
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        cut.normalizer = normalizers.Sequence(steps)
    else:
        cut.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    corpus = ["may be maybe the answer is yes no", "is yes. yes, no"] * 9
    cut.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    strip = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    cut.decoder = decoders.Sequence(steps)
    cut.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=cut, bos_token="<s>", unk_token="<unk>")


SPACING = {scheme: spacing(scheme) for scheme in ("always", "first", "never", "normalizer")}


@pytest.mark.parametrize("scheme", SPACING)
@given(
    text=st.text("maybe is\né", max_size=8).map("yes".__add__),
    answer=st.one_of(st.text("maybe is.\né", max_size=6), st.sampled_from(["be", "yes", " no"])),
)
def test_prompt_and_answer_spell_the_joint_text(scheme, text, answer):
    tokenizer = SPACING[scheme]
    rows = pd.DataFrame({"task": ["a"]})
    prompts = lc.Prompts.from_texts([text], rows, tokenizer, answers=[answer])
    ids = prompts.with_answers()[0][0]
    assert tokenizer.decode(ids[1:]) == text + answer
    assert prompts.tokens[0].tolist() == tokenizer(text)["input_ids"]
    joint = tokenizer(text + answer)["input_ids"]
    if joint[: len(prompts.tokens[0])] == prompts.tokens[0].tolist():
        assert ids.tolist() == joint


def test_an_answer_that_no_tokens_spell_there_is_refused():
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("-", "removed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    rows = pd.DataFrame({"task": ["x"]})
    with pytest.raises(lc.InputError, match=r"no tokens spell the answer 'b' .* ends in 'b-a'"):
        lc.Prompts.from_texts(["b-a"], rows, tokenizer, answers=["b"])
    found = lc.Prompts.from_texts(["b-a"], rows, tokenizer, answers=["-b"])
    assert found.answers == ((2,),)


@pytest.mark.parametrize("answer", ["w2", " w2"])
def test_words_follow_where_spaces_are_no_tokens(answer):
    rows = pd.DataFrame({"task": ["a"]})
    tokenizer = closing("$A")
    found = lc.Prompts.from_texts(["w3 w1"], rows, tokenizer, answers=[answer])
    assert found.answers == (tuple(tokenizer("w2", add_special_tokens=False)["input_ids"]),)


def test_fingerprints_tell_how_a_text_is_cut(tmp_path):
    one = tiny_tokenizer(tmp_path)
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(tiny_tokenizer(tmp_path))
    for part, change in (
        ("normalizer", normalizers.Lowercase()),
        ("pre_tokenizer", pre_tokenizers.Whitespace()),
    ):
        other = tiny_tokenizer(tmp_path)
        setattr(other.backend_tokenizer, part, change)
        found = tokenizer_fingerprint(other)
        assert found.split(".")[0] == tokenizer_fingerprint(one).split(".")[0]
        assert not same_tokenizer(found, tokenizer_fingerprint(one))
        assert same_tokenizer(found.split(".")[0], tokenizer_fingerprint(one))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": "ab"}, "texts='ab', expected a list of texts"),
        ({"answers": "ab"}, "answers='ab', expected a list of texts"),
        ({"spans": {"s": [(0, 2), (0, 1)]}}, "positions within its 1 characters"),
    ],
)
def test_what_no_text_is(arguments, message):
    rows = pd.DataFrame({"task": ["a", "b"]})
    given_arguments = {"texts": ["a", "b"], "rows": rows, "tokenizer": BYTES} | arguments
    with pytest.raises(lc.InputError, match=message):
        lc.Prompts.from_texts(**given_arguments)
