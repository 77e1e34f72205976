"""Natural-language tasks: 12 word tasks, 6 paraphrases each, 24 shared words.

The set is designed so that neither the wording nor the input reveals the task. It is fully
crossed (every word occurs with every task and every paraphrase). The paraphrases of one task
share no content word, while the k-th paraphrases of all tasks share their sentence shape (the
row label ``template``), so that a bag-of-words clustering of the instructions finds shapes, not
tasks. A clustering by task therefore has to come from meaning.

The six paraphrases were revised while looking at a model's scores, so figures on them are
optimistic. Four held-out wordings of each task follow the same rules, and were written before
any model was run on them. Do not revise them after seeing scores: add others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from string import Formatter
from typing import TYPE_CHECKING, Any

import pandas as pd

from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.prompts import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAYOUT = '{instruction}\nInput: "{input}"\nAnswer: "'
CHAT_LAYOUT = '{instruction}\nInput: "{input}"'

CharSpan = tuple[int, int]


@checked_arguments
def natural(
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str] | None = None,
    paraphrases: int | Sequence[str] | None = None,
    inputs: int | Sequence[str] | None = None,
    held_out: bool = False,
    chat: bool = False,
    layout: str | None = None,
) -> Prompts:
    """Prompts that ask for a word's opposite, plural, French translation, ... in six wordings.

    A plain prompt is the instruction, a line ``Input: "love"`` and a line ``Answer: "``. The
    quotation that the answer completes makes the readout token the same in every prompt, and
    allows nothing but the answer. In the chat layout the instruction and the input line are the
    user's message, and the reply is open: a model may start it with another phrase ("The plural
    of ..."), and the template's tokens make the prompts two to three times as long.

    Args:
        tokenizer: a fast tokenizer (spans need character offsets).
        tasks: names of tasks; all by default.
        paraphrases: their number, from the first, or names of templates (``imperative``,
            ``question``, ``request``, ``scenario``, ``rule``, ``role``, and the held-out
            ``wish``, ``correction``, ``condition``, ``dialogue``); by default all six, or with
            ``held_out`` all four.
        inputs: number of words, from the first, or the words; all by default.
        held_out: only the held-out wordings, written without seeing any model's scores.
            For both kinds in one set, name their templates (see `template_names`).
        chat: wrap each prompt in the tokenizer's chat template.
        layout: another layout, with ``{instruction}`` and ``{input}``.

    Returns:
        Prompts, those of one instruction next to each other, with rows ``task``,
        ``instruction`` (id of the sentence: ``plural/question``), ``template``, ``wording``
        (the sentence), ``input``, ``output``, ``split`` (``held_out`` for a held-out wording,
        otherwise ``all``); spans ``instruction`` and ``input``; and the outputs as answers
        (with a leading space if the layout ends in neither a quotation mark nor white space).

    Raises:
        InputError: if a task, template or word is not in the set, or the layout lacks a field.

    >>> from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    >>> byte_level = Tokenizer(models.BPE(letters, []))
    >>> byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level)
    >>> prompts = natural(tokenizer, tasks=["plural", "french"], paraphrases=["question"], inputs=2)
    >>> print(prompts.text(0))
    What do you call it when there is more than one?
    Input: "love"
    Answer: "
    >>> prompts.rows[["instruction", "input", "output"]].values.tolist()
    [['plural/question', 'love', 'loves'], ['plural/question', 'answer', 'answers'],
     ['french/question', 'love', 'amour'], ['french/question', 'answer', 'réponse']]
    >>> natural(tokenizer, tasks=["plural"], held_out=True, inputs=1).rows["wording"].tolist()
    ['I wish I owned at least a dozen of these.', 'Not just one specimen of it, but a pair.',
     'If twenty of them were on a shelf, what would they be?',
     'He says it for one copy, and she says it for thousands.']
    """
    data = _data()
    chosen_tasks = _choose("task", tasks, list(data["instructions"]))
    if held_out:
        templates = _choose("held-out paraphrase", paraphrases, data["held_out"])
    elif paraphrases is None or isinstance(paraphrases, int):
        templates = _choose("paraphrase", paraphrases, data["templates"])
    else:
        templates = _choose("paraphrase", paraphrases, data["templates"] + data["held_out"])
    chosen_words = _choose("input", inputs, words())
    rows = pd.DataFrame(
        [
            {
                "task": task,
                "instruction": f"{task}/{template}",
                "template": template,
                "wording": data["instructions"][task][template],
                "input": word,
                "output": data["answers"][word][task],
                "split": "held_out" if template in data["held_out"] else "all",
            }
            for task in chosen_tasks
            for template in templates
            for word in chosen_words
        ]
    )
    layout = layout or (CHAT_LAYOUT if chat else LAYOUT)
    texts, spans = lay_out(
        layout, {"instruction": rows["wording"].tolist(), "input": rows["input"].tolist()}
    )
    # A word at the start of a quotation, a line or a reply has no space before it.
    lead = "" if chat or layout.endswith(('"', "'", " ", "\n")) else " "
    answers = [lead + output for output in rows["output"]]
    return Prompts.from_texts(texts, rows, tokenizer, answers=answers, spans=spans, chat=chat)


def task_names() -> list[str]:
    """Names of the tasks of the set.

    >>> len(task_names())
    12
    """
    return list(_data()["instructions"])


def template_names(*, held_out: bool = False) -> list[str]:
    """The templates of the six paraphrases, or of the four held-out wordings.

    >>> template_names(held_out=True)
    ['wish', 'correction', 'condition', 'dialogue']
    """
    return list(_data()["held_out" if held_out else "templates"])


def words() -> list[str]:
    """The input words of every task of the set.

    >>> len(words())
    24
    """
    return list(_data()["answers"])


def lay_out(
    layout: str, fields: Mapping[str, Sequence[str]]
) -> tuple[list[str], dict[str, list[CharSpan]]]:
    """Fill a layout for each prompt, and return the character range of each field.

    Args:
        layout: a format string that names each of the fields once.
        fields: name -> one text per prompt.

    Returns:
        The texts, and name -> character range ``[start, stop)`` in each text.

    Raises:
        InputError: if the layout is not a format string of these fields.

    >>> lay_out("{a}: {b}!", {"a": ["x", "long"], "b": ["y", "z"]})
    (['x: y!', 'long: z!'], {'a': [(0, 1), (0, 4)], 'b': [(3, 4), (6, 7)]})
    """
    try:
        pieces = [(literal, name) for literal, name, _, _ in Formatter().parse(layout)]
    except ValueError as error:
        raise InputError(f"layout {layout!r} is not a format string: {error}") from error
    named = [name for _, name in pieces if name is not None]
    if sorted(named) != sorted(fields):
        raise InputError(f"layout {layout!r} has the fields {named}, expected {list(fields)}")
    texts: list[str] = []
    spans: dict[str, list[CharSpan]] = {name: [] for name in fields}
    for values in zip(*fields.values(), strict=True):
        value_of = dict(zip(fields, values, strict=True))
        text = ""
        for literal, name in pieces:
            text += literal
            if name is not None:
                spans[name].append((len(text), len(text) + len(value_of[name])))
                text += value_of[name]
        texts.append(text)
    return texts, spans


@cache
def _data() -> dict[str, Any]:
    return json.loads(files("lensclust.tasks.words").joinpath("natural.json").read_text("utf-8"))


def _choose(kind: str, wanted: int | Sequence[str] | None, known: list[str]) -> list[str]:
    if wanted is None:
        return known
    if isinstance(wanted, int):
        if not 1 <= wanted <= len(known):
            raise InputError(f"natural: {wanted} {kind}s requested, expected 1 to {len(known)}")
        return known[:wanted]
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    for name in names:
        if name not in known:
            raise InputError(f"natural: no {kind} {name!r}: there are {', '.join(known)}")
    if not names:
        raise InputError(f"natural: no {kind} given, expected some of {', '.join(known)}")
    return list(dict.fromkeys(names))
