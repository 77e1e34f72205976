"""Composed word tasks: the plural in upper case, the first letter of the opposite, ...

The second step is applied to the answer of a task of `natural`. Its result depends on the
spelling of that answer only, so it is computed, not looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.prompts import Prompts
from lensclust.tasks.words.arithmetic import AFTER
from lensclust.tasks.words.natural import LAYOUT, lay_out, natural, task_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STEPS: dict[str, Callable[[str], str]] = {
    "upper_case": str.upper,
    "first_letter": lambda word: word[0],
    "length": lambda word: str(sum(map(str.isalpha, word))),
}
_THEN: dict[str, dict[str, str]] = {
    "imperative": {
        "upper_case": "Give it in upper case.",
        "first_letter": "Give the first letter of it.",
        "length": "Count the letters in it.",
    },
    "question": {
        "upper_case": "And how does that look in capitals?",
        "first_letter": "And with which character does that begin?",
        "length": "And how long is that, as a number?",
    },
}


@checked_arguments
def composed_words(
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str] = ("upper_case after plural",),
    inputs: int | Sequence[str] | None = None,
    layout: str = LAYOUT,
) -> Prompts:
    """Prompts that ask for two word tasks in a row, in two wordings.

    Args:
        tokenizer: a fast tokenizer (spans need character offsets).
        tasks: ``"upper_case after plural"``: ``upper_case``, ``first_letter`` or ``length``
            after any task of `natural`.
        inputs, layout: as in `natural`.

    Returns:
        Prompts as those of `natural`, with templates ``imperative`` and ``question``.

    Raises:
        InputError: if a task is not known, or as `natural`.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    >>> byte_level = Tokenizer(models.BPE(letters, []))
    >>> byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level)
    >>> prompts = composed_words(tokenizer, inputs=["love"])
    >>> print(prompts.text(0), prompts.rows["output"][0], sep="")
    Give the plural of this word. Give it in upper case.
    Input: "love"
    Answer: "LOVES
    """
    named = dict(zip(tasks, map(_parts, tasks), strict=True))
    if not named:
        raise InputError("composed_words: no task given, expected at least one")
    tables = []
    for task, (last, first) in named.items():
        asked = natural(tokenizer, tasks=[first], paraphrases=list(_THEN), inputs=inputs).rows
        tables.append(
            asked.assign(
                task=task,
                instruction=f"{task}/" + asked["template"],
                wording=[
                    f"{wording} {_THEN[template][last]}"
                    for wording, template in zip(asked["wording"], asked["template"], strict=True)
                ],
                output=asked["output"].map(STEPS[last]),
            )
        )
    rows = pd.concat(tables, ignore_index=True)
    texts, spans = lay_out(
        layout, {"instruction": rows["wording"].tolist(), "input": rows["input"].tolist()}
    )
    return Prompts.from_texts(texts, rows, tokenizer, answers=rows["output"].tolist(), spans=spans)


def _parts(task: str) -> tuple[str, str]:
    """The last step and the first of a task."""
    last, _, first = task.partition(AFTER)
    if last not in STEPS or first not in task_names():
        raise InputError(
            f"composed_words: no task {task!r}: expected {', '.join(STEPS)}, {AFTER.strip()} one "
            f"of {', '.join(task_names())}"
        )
    return last, first
