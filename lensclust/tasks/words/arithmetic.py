"""Arithmetic of one and two steps in words.

The instruction names the operation; the input is three numbers for every task, so the input alone
does not reveal the task. Two steps are two tasks in a row: ``multiply after add`` adds the first
two numbers and multiplies the sum by the third.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING

import pandas as pd

from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.prompts import Prompts
from lensclust.tasks.words.natural import LAYOUT, lay_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AFTER = " after "
STEPS: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
}
# The wording of the first step, and of the second.
_WORDINGS: dict[str, dict[str, tuple[str, str]]] = {
    "imperative": {
        "add": ("Add the first two numbers", "then add the third"),
        "subtract": ("Subtract the second number from the first", "then subtract the third"),
        "multiply": ("Multiply the first two numbers", "then multiply by the third"),
    },
    "question": {
        "add": ("What is the first number plus the second", "all that plus the third"),
        "subtract": ("What is the first number minus the second", "all that minus the third"),
        "multiply": ("What is the first number times the second", "all that times the third"),
    },
}
_ENDS = {"imperative": ".", "question": "?"}


@checked_arguments
def arithmetic(
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str] = ("add", "multiply", "multiply after add"),
    inputs: int = 64,
    test_inputs: int = 16,
    largest: int = 12,
    layout: str = LAYOUT,
    seed: int = 0,
) -> Prompts:
    """Prompts that ask for a result of three numbers, answered token by token.

    Args:
        tokenizer: a fast tokenizer (spans need character offsets).
        tasks: of ``add``, ``subtract``, ``multiply``, and two of them in a row:
            ``"multiply after add"``. Differences may be negative.
        inputs: triples of numbers in the split ``train``, the same for every task.
        test_inputs: further triples, in the split ``test``.
        largest: numbers are drawn from 1 to this.
        layout: as in `natural`.
        seed: of the numbers.

    Returns:
        Prompts with rows ``task, kind`` (``one step`` or ``two steps``), ``instruction`` (id of
        the sentence), ``template`` (``imperative`` or ``question``), ``wording, input, output,
        split``; spans ``instruction`` and ``input``; and the results as answers.

    Raises:
        InputError: if a task is not known, a size is invalid, or there are fewer triples than
            requested.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    >>> byte_level = Tokenizer(models.BPE(letters, []))
    >>> byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level)
    >>> prompts = arithmetic(tokenizer, tasks=["multiply after add"], inputs=1, test_inputs=1)
    >>> print(prompts.text(0), prompts.rows["output"][0], sep="")
    Add the first two numbers, then multiply by the third.
    Input: "8, 3, 11"
    Answer: "121
    """
    steps = {task: _steps(task) for task in tasks}
    for name, value in {"tasks": len(steps), "inputs": inputs, "largest": largest}.items():
        if value < 1:
            raise InputError(f"arithmetic: {name}={value}, expected at least 1")
    if not test_inputs >= 0 or inputs + test_inputs > largest**3:
        raise InputError(
            f"arithmetic: inputs={inputs} and test_inputs={test_inputs}, expected 0 or more and "
            f"at most {largest**3} together with largest={largest}"
        )
    numbers = range(1, largest + 1)
    drawn = random.Random(f"arithmetic-{seed}").sample(
        list(product(numbers, repeat=3)), inputs + test_inputs
    )
    rows = pd.DataFrame(
        [
            {
                "task": task,
                "kind": "one step" if len(parts) == 1 else "two steps",
                "instruction": f"{task}/{template}",
                "template": template,
                "wording": _wording(template, parts),
                "input": ", ".join(map(str, triple)),
                "output": str(_result(parts, triple)),
                "split": "train" if place < inputs else "test",
            }
            for task, parts in steps.items()
            for template in _WORDINGS
            for place, triple in enumerate(drawn)
        ]
    )
    texts, spans = lay_out(
        layout, {"instruction": rows["wording"].tolist(), "input": rows["input"].tolist()}
    )
    return Prompts.from_texts(texts, rows, tokenizer, answers=rows["output"].tolist(), spans=spans)


def _steps(task: str) -> list[str]:
    """The steps of a task, in the order of execution."""
    parts = task.split(AFTER)[::-1]
    if len(parts) > 2 or not set(parts) <= set(STEPS):
        raise InputError(
            f"arithmetic: no task {task!r}: expected {', '.join(STEPS)}, or two of them as in "
            f"'multiply{AFTER}add'"
        )
    return parts


def _wording(template: str, parts: Sequence[str]) -> str:
    said = _WORDINGS[template]
    sentence = ", ".join([said[parts[0]][0], *(said[part][1] for part in parts[1:])])
    return sentence + _ENDS[template]


def _result(parts: Sequence[str], numbers: Sequence[int]) -> int:
    value = numbers[0]
    for part, number in zip(parts, numbers[1:], strict=False):
        value = STEPS[part](value, number)
    return value
