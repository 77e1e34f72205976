"""Few-shot classification of labelled texts with one-token labels.

A small model's answers depend strongly on the template, down to a single space: templates are
plain data (``classification.json``), filled byte for byte. An example is the filled template; a
query is the template up to its label, and the space before the label belongs to the label's token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from string import Formatter
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Int

from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.prompts import Prompts
from lensclust.tasks.labelled.label_words import single_tokens
from lensclust.tasks.labelled.labelled_texts import LabelledTexts, data_names, labelled_texts
from lensclust.tasks.words import lay_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@checked_arguments
def classification(
    data: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | None = None,
    words: Sequence[str] | None = None,
    shots: int | None = None,
    examples: int | None = None,
    queries: int | None = 100,
    longest: int | None = None,
    seed: int = 0,
) -> Prompts:
    """Prompts of labelled texts and one more text, to be answered by its label's word.

    Half of the texts of each class are for demonstrations and the other half for queries, whatever
    the seed. The examples of a seed are drawn in rounds of one text per class, so the first few
    are balanced, and a smaller number is a subset of a larger. The queries are drawn the same
    way, and are the same for every seed, template and number of shots.

    Args:
        data: a name (``sst2``, ``agnews``, ...; see `data_names`), or any other source of
            `labelled_texts`, or its result.
        tokenizer: a fast tokenizer (spans need character offsets).
        template: name of one of the set's templates (default: the first), or a template: one
            example, with ``{input}`` and then ``{label}``, and all white space.
        words: label words, one per class; the set's by default.
        shots: demonstrations in every prompt, may be 0; default four, or one per class if there
            are more classes.
        examples: labelled texts of this seed, demonstrations included; the others are queries
            after the demonstrations, for a method to learn from. Default: as many as shots.
        queries: maximum number of queries; None for all, 0 for none.
        longest: drop texts of more characters.
        seed: of the examples and their order.

    Returns:
        Prompts with a common prefix, examples before queries, with rows ``task`` (the set),
        ``instruction`` (``sst2/review``), ``template``, ``input``, ``output`` (the word),
        ``label`` (the class), ``class`` (its number), ``split`` (``example`` or ``query``),
        ``shots``, ``seed``, ``demonstrations`` (the texts shown, a JSON list); spans
        ``demonstrations`` and ``input``; and as answers one token each (see `choices`).

    Raises:
        InputError: if there is no such set or template, the template lacks a slot, the numbers of
            words and classes differ, a word is not one token or starts with the same token as
            another, or there are fewer shots than classes or fewer texts than requested.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> vocabulary = {word: i for i, word in enumerate(["?", "bad", "good"])}
    >>> words = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    >>> frame = pd.DataFrame({"text": list("abcdef"), "label": ["bad", "good"] * 3})
    >>> prompts = classification(frame, tokenizer, shots=2, queries=2)
    >>> print(prompts.text(0))
    Text: c
    Label: bad
    Text: d
    Label: good
    Text: a
    Label:
    >>> from lensclust.tasks.labelled import choices
    >>> choices(prompts)
    {'bad': 1, 'good': 2}
    """
    texts = data if isinstance(data, LabelledTexts) else _named(data)
    n_classes = len(texts.classes)
    shots = max(4, n_classes) if shots is None else shots
    examples = shots if examples is None else examples
    head, tail, lead = _parts(texts, template)
    words = list(texts.words if words is None else words)
    if len(words) != n_classes:
        raise InputError(
            f"classification: {len(words)} labels {words}, expected {n_classes}: "
            f"{texts.name} has the classes {', '.join(texts.classes)}"
        )
    _check_sizes(texts, shots, examples, queries)

    shown, asked = _drawn(texts, examples, queries, longest, seed)
    demonstrations = "".join(
        _fill(head, texts.texts[i]) + lead + words[texts.labels[i]] + tail
        for i in shown[:shots].tolist()
    )
    order = [*shown[shots:].tolist(), *asked.tolist()]
    if not order:
        raise InputError("classification: nothing to ask: no queries, and all examples are shown")
    name = _template_name(texts, template)
    rows = pd.DataFrame(
        {
            "task": texts.name,
            "instruction": f"{texts.name}/{name}",
            "template": name,
            "input": [texts.texts[i] for i in order],
            "output": [words[texts.labels[i]] for i in order],
            "label": [texts.classes[texts.labels[i]] for i in order],
            "class": texts.labels[order],
            "split": ["example"] * (len(shown) - shots) + ["query"] * len(asked),
            "shots": shots,
            "seed": seed,
            "demonstrations": json.dumps(
                [texts.texts[i] for i in shown[:shots].tolist()], ensure_ascii=False
            ),
        }
    )
    fields = {"demonstrations": [demonstrations] * len(rows), "input": rows["input"].tolist()}
    filled, spans = lay_out("{demonstrations}" + head, fields)
    answers = [lead + word for word in rows["output"]]
    single_tokens(
        tokenizer, _fill(head, rows["input"][0]), [lead + w for w in words], what="classification"
    )
    prompts = Prompts.from_texts(filled, rows, tokenizer, answers=answers, spans=spans)
    odd = [i for i, answer in enumerate(prompts.answers or ()) if len(answer) != 1]
    if odd:
        raise InputError(
            f"classification: after the text {rows['input'][odd[0]]!r} the label "
            f"{answers[odd[0]]!r} is not one token; end the template's input with other text"
        )
    return prompts


def balanced_order(
    labels: Int[np.ndarray, " text"], generator: np.random.Generator
) -> Int[np.ndarray, " text"]:
    """Indices in rounds of one item per class, in random order, until all are used.

    >>> labels = np.array([0, 0, 0, 0, 1, 1])
    >>> labels[balanced_order(labels, np.random.default_rng(0))].reshape(3, 2).tolist()
    [[1, 0], [1, 0], [0, 0]]
    """
    mixed = generator.permutation(len(labels))
    drawn = pd.Series(labels[mixed])
    rounds = drawn.groupby(drawn).cumcount().to_numpy()
    return mixed[np.lexsort((generator.random(len(labels)), rounds))]


def _named(data: Any) -> LabelledTexts:
    if isinstance(data, str) and not data:
        raise InputError(
            f"classification: no data named, expected one of {', '.join(data_names())}"
        )
    return labelled_texts(data)


def _parts(texts: LabelledTexts, template: str | None) -> tuple[str, str, str]:
    """A template up to its label, after it, and the space before the label."""
    if template is None:
        layout = next(iter(texts.templates.values()))
    elif template in texts.templates:
        layout = texts.templates[template]
    elif "{" in template:
        layout = template
    else:
        raise InputError(
            f"classification: no template {template!r}: {texts.name} has "
            f"{', '.join(map(repr, texts.templates))}, or give one with {{input}} and {{label}}"
        )
    try:
        slots = [name for _, name, _, _ in Formatter().parse(layout) if name is not None]
    except ValueError as error:
        raise InputError(f"classification: template {layout!r} is unreadable: {error}") from error
    head, slot, tail = layout.partition("{label}")
    if slots != ["input", "label"] or not slot or "{input}" not in head:
        lacking = [name for name in ("input", "label") if name not in slots]
        said = f"no slot {{{lacking[0]}}}" if lacking else f"the slots {slots}"
        raise InputError(
            f"classification: template {layout!r} has {said}, expected {{input}} and then {{label}}"
        )
    lead = " " if head.endswith(" ") else ""
    return head.removesuffix(" "), tail.format(), lead


def _fill(head: str, text: str) -> str:
    return head.format(input=text)


def _template_name(texts: LabelledTexts, template: str | None) -> str:
    return next(iter(texts.templates)) if template is None else template


def _check_sizes(texts: LabelledTexts, shots: int, examples: int, queries: int | None) -> None:
    n_classes = len(texts.classes)
    if shots != 0 and shots < n_classes:
        raise InputError(
            f"classification: shots={shots}, expected 0 or at least {n_classes}: "
            f"{texts.name} has {n_classes} classes"
        )
    if examples < shots:
        raise InputError(f"classification: examples={examples}, expected at least shots={shots}")
    if queries is not None and queries < 0:
        raise InputError(f"classification: queries={queries}, expected 0 or more")


def _drawn(
    texts: LabelledTexts, examples: int, queries: int | None, longest: int | None, seed: int
) -> tuple[Int[np.ndarray, " example"], Int[np.ndarray, " query"]]:
    """Texts for examples, and texts for queries, balanced and from disjoint halves."""
    drawn = []
    # The second number gives queries and examples separate random streams.
    for half, wanted, key in zip(
        texts.halves, (examples, queries), ([seed, 0], [0, 1]), strict=True
    ):
        if longest is not None:
            half = half[[len(texts.texts[i]) <= longest for i in half.tolist()]]
        order = balanced_order(texts.labels[half], np.random.default_rng(key))
        if wanted is not None and wanted > len(half):
            raise InputError(
                f"classification: {wanted} texts wanted, but {texts.name} has {len(half)} "
                f"{'to show' if key[1] == 0 else 'to ask'}"
            )
        drawn.append(half[order[:wanted]])
    return drawn[0], drawn[1]
