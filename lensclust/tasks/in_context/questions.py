"""Few-shot prompts of questions whose text consists of named pieces."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import TYPE_CHECKING

import pandas as pd

from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.prompts import Prompts
from lensclust.tasks.in_context.demonstrations import drawn, mismatched

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BETWEEN = "\n\n"
UNNAMED = ""

# A name (possibly empty) and a text.
Piece = tuple[str, str]
CharSpan = tuple[int, int]


@dataclass(frozen=True)
class Question:
    """A question, up to its answer.

    Attributes:
        item: the content, whatever the wording: a query's item is never in its demonstrations.
        template: name of the wording; demonstrations have the wording of the query.
        pieces: the text in order; pieces with a name become spans.
        answer: the right answer, without the space before it.
        labels: further columns of the rows.
    """

    item: str
    template: str
    pieces: tuple[Piece, ...]
    answer: str
    labels: Mapping[str, object] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The text of the question."""
        return "".join(text for _, text in self.pieces)

    def spans(self, start: int) -> dict[str, CharSpan]:
        """Character ranges of the named pieces if the question starts at ``start``."""
        found = {}
        for name, text in self.pieces:
            if name != UNNAMED:
                found[name] = (start, start + len(text))
            start += len(text)
        return found


def filled(layout: str, fields: Mapping[str, Sequence[Piece]]) -> tuple[Piece, ...]:
    """Fill the slots of a layout with pieces.

    >>> filled("{who} is {what}.", {"who": [("name", "Ida")], "what": [("", "out")]})
    (('name', 'Ida'), ('', ' is '), ('', 'out'), ('', '.'))
    """
    pieces: list[Piece] = []
    for literal, slot, _, _ in Formatter().parse(layout):
        pieces += [(UNNAMED, literal)] if literal else []
        pieces += fields[slot] if slot is not None else []
    return tuple(pieces)


def chosen_names(
    given: Sequence[str] | None, known: Iterable[str], *, kind: str, task: str
) -> list[str]:
    """The chosen names, in their order; all known ones by default.

    Raises:
        InputError: if one is not known, there is none, or one comes twice; starts with ``task``.

    >>> chosen_names(None, ["points", "lines"], kind="template", task="example")
    ['points', 'lines']
    """
    there = list(known)
    chosen = there if given is None else list(given)
    if unknown := [name for name in chosen if name not in there]:
        # Names with a comma in them need their quotes.
        listed = there if any("," in name for name in there) else ", ".join(there)
        raise InputError(f"{task}: no {kind} {unknown[0]!r}: there are {listed}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise InputError(f"{task}: {kind}s={chosen}, expected different ones of {there}")
    return chosen


@checked_arguments
def few_shot(
    queries: Sequence[Question],
    pool: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: str,
    shots: int | Sequence[int] = (0, 4),
    shuffled: bool = False,
    seed: int = 0,
    chat: bool = False,
) -> Prompts:
    """Few-shot prompts: each query after each number of demonstrations.

    Demonstrations are resampled for every item, without replacement, from the questions of the
    pool with the query's template; all wordings of an item have the same ones, and a smaller
    number has the last ones of a larger. So prompts of one item and template differ only before
    the query.

    Args:
        queries: the questions to ask.
        pool: the questions for demonstrations.
        tokenizer: a fast tokenizer (spans need character offsets).
        task: the task's name.
        shots: numbers of demonstrations.
        shuffled: permute the answers of the demonstrations, so that as few as possible keep their
            own; a single one keeps it.
        seed: of the draws and the shuffles.
        chat: wrap each prompt in the tokenizer's chat template.

    Returns:
        Prompts, those of one query next to each other, with rows ``task``, ``instruction``
        (``TASK/TEMPLATE``), ``template``, ``item``, ``input`` (the question), ``output``,
        ``split`` (``query``), ``shots``, ``shuffled``, ``demonstrations`` (the items shown, a
        JSON list) and the questions' labels; spans ``query`` (the whole question),
        ``demonstrations``, ``shown_1``, ``shown_2``, ... (the answers shown, the last one first;
        empty where there are fewer) and the named pieces of the queries; and the answers.

    Raises:
        InputError: if there is no query, a number of shots is negative, repeated or larger than
            the pool, a query's item or text is in the pool, or queries differ in the names of
            their pieces.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    >>> ask = lambda n: Question(f"{n}", "plain", (("number", f"{n}"), ("", " + 1 =")), f"{n + 1}")
    >>> prompts = few_shot([ask(7)], [ask(2), ask(3)], tokenizer, task="next", shots=[0, 1])
    >>> prompts.texts
    ('7 + 1 =', '3 + 1 = 4\\n\\n7 + 1 =')
    >>> {name: span[1].tolist() for name, span in prompts.spans.items()}
    {'demonstrations': [0, 5], 'shown_1': [4, 5], 'query': [5, 9], 'number': [5, 6]}
    """
    numbers = [shots] if isinstance(shots, int) else list(shots)
    by_template = _checked(queries, pool, numbers, task)
    order = {item: number for number, item in enumerate(dict.fromkeys(q.item for q in queries))}
    texts: list[str] = []
    rows: list[dict[str, object]] = []
    spans: list[dict[str, CharSpan]] = []
    for query in queries:
        key = {"seed": seed, "query": order[query.item]}
        worked = drawn(by_template[query.template], max(numbers), **key) if max(numbers) else []
        for n in numbers:
            shown = worked[len(worked) - n :]
            answers = [question.answer for question in shown]
            if shuffled and n:
                answers = mismatched(answers, **key)
            text, own = _shown(shown, answers, max(numbers))
            texts.append(text + query.text)
            own["query"] = (len(text), len(texts[-1]))
            spans.append(own | query.spans(len(text)))
            rows.append(
                {
                    "task": task,
                    "instruction": f"{task}/{query.template}",
                    "template": query.template,
                    "item": query.item,
                    "input": query.text,
                    "output": query.answer,
                    "split": "query",
                    "shots": n,
                    "shuffled": shuffled,
                    "demonstrations": json.dumps([q.item for q in shown], ensure_ascii=False),
                    **query.labels,
                }
            )
    return Prompts.from_texts(
        texts,
        pd.DataFrame(rows),
        tokenizer,
        answers=[f"{'' if chat else ' '}{row['output']}" for row in rows],
        spans={name: [each[name] for each in spans] for name in spans[0]},
        chat=chat,
    )


def _shown(
    shown: Sequence[Question], answers: Sequence[str], most: int
) -> tuple[str, dict[str, CharSpan]]:
    """The text of the demonstrations, up to the query, and the ranges of their answers."""
    text, places = "", []
    for question, answer in zip(shown, answers, strict=True):
        text += f"{question.text} {answer}"
        places.append((len(text) - len(answer), len(text)))
        text += BETWEEN
    spans = {"demonstrations": (0, len(text.removesuffix(BETWEEN)))}
    last_first = [*reversed(places), *[(0, 0)] * (most - len(places))]
    return text, spans | {f"shown_{n}": place for n, place in enumerate(last_first, start=1)}


def _checked(
    queries: Sequence[Question], pool: Sequence[Question], shots: list[int], task: str
) -> dict[str, list[Question]]:
    """The questions for demonstrations, by template."""
    if not queries:
        raise InputError(f"{task}: no question to ask, expected at least one")
    if not shots or min(shots) < 0 or len(set(shots)) < len(shots):
        raise InputError(f"{task}: shots={shots}, expected different numbers from 0")
    names = set(queries[0].spans(0))
    for query in queries:
        if set(query.spans(0)) != names:
            raise InputError(
                f"{task}: the pieces of {query.item!r} are named {sorted(query.spans(0))}, "
                f"expected {sorted(names)} as in {queries[0].item!r}"
            )
    items, wordings = {q.item for q in pool}, {q.text for q in pool}
    for query in queries:
        if query.item in items or query.text in wordings:
            raise InputError(
                f"{task}: demonstrations overlap the query: {query.item!r} is asked and may be "
                "shown, expected different items"
            )
    found = {q.template: [shown for shown in pool if shown.template == q.template] for q in queries}
    for template, few in found.items():
        if len(few) < max(shots):
            raise InputError(
                f"{task}: shots={max(shots)}, expected at most {len(few)}: that many questions "
                f"may be shown in the wording {template!r}"
            )
    return found
