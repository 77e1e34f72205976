"""Task sets by their names on the command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.prompts import Prompts
from lensclust.tasks.in_context.linear_regression import linear_regression
from lensclust.tasks.in_context.prompt_injection import prompt_injection
from lensclust.tasks.in_context.reading_comprehension import reading_comprehension
from lensclust.tasks.labelled.classification import classification
from lensclust.tasks.names import TASK_NAMES, spelt_names
from lensclust.tasks.synthetic.sif import sif
from lensclust.tasks.words.instruction_induction import instruction_induction
from lensclust.tasks.words.natural import natural

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOURCES: dict[str, Callable[[str, PreTrainedTokenizerBase | None], Prompts]] = {
    "sif": lambda _, tokenizer: _synthetic(tokenizer),
    "natural": lambda _, tokenizer: natural(_required(tokenizer, "natural")),
    "instruction_induction": lambda folder, tokenizer: instruction_induction(
        folder, _required(tokenizer, "instruction_induction")
    ),
    "classification": lambda data, tokenizer: classification(
        data, _required(tokenizer, "classification")
    ),
    "reading_comprehension": lambda _, tokenizer: reading_comprehension(
        _required(tokenizer, "reading_comprehension")
    ),
    "linear_regression": lambda _, tokenizer: linear_regression(
        _required(tokenizer, "linear_regression")
    ),
    "prompt_injection": lambda _, tokenizer: prompt_injection(
        _required(tokenizer, "prompt_injection")
    ),
}


@checked_arguments
def from_name(name: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Prompts:
    """The prompts of a source, by its name.

    Names: ``sif``, ``natural``, ``reading_comprehension``, ``linear_regression``,
    ``prompt_injection``, ``instruction_induction:FOLDER`` or ``classification:DATA``
    (``classification:sst2``).

    Raises:
        InputError: if there is no such source, its folder is missing, or it needs a tokenizer.

    >>> len(from_name("sif")) > 1000
    True
    """
    source, _, argument = name.partition(":")
    if source not in SOURCES or bool(argument) != bool(TASK_NAMES[source]):
        raise InputError(f"tasks {name!r} are not known: expected {', '.join(spelt_names())}")
    return SOURCES[source](argument, tokenizer)


def _synthetic(tokenizer: PreTrainedTokenizerBase | None) -> Prompts:
    if tokenizer is not None:
        raise InputError("tasks 'sif': made of token ids, expected a model without a tokenizer")
    return sif()


def _required(tokenizer: PreTrainedTokenizerBase | None, source: str) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise InputError(f"tasks {source!r}: need a tokenizer, this model has none")
    return tokenizer
