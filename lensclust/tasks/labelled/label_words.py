"""Label words: distinct single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lensclust.errors import InputError
from lensclust.prompts import Prompts, continuation, encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def single_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, words: Sequence[str], *, what: str
) -> tuple[int, ...]:
    """The token of each word after ``text``.

    Args:
        words: with the space before them, if there is one.
        what: function name used in error messages.

    Raises:
        InputError: if two words start with the same token, or one is not a single token; names it
            and its tokens.
    """
    prompt = encoded(tokenizer, text).ids
    ids = [continuation(tokenizer, text, prompt, word) for word in words]
    split = {
        word: " + ".join(repr(tokenizer.decode([token])) for token in tokens)
        for word, tokens in zip(words, ids, strict=True)
    }
    first: dict[int, str] = {}
    for word, tokens in zip(words, ids, strict=True):
        if not tokens:
            raise InputError(f"{what}: label {word!r} is no token, expected one")
        other = first.setdefault(tokens[0], word)
        if other is not word:
            raise InputError(
                f"{what}: labels {other!r} ({split[other]}) and {word!r} ({split[word]}) begin "
                "with the same token, expected words that their first token tells apart"
            )
    for word, tokens in zip(words, ids, strict=True):
        if len(tokens) > 1:
            raise InputError(
                f"{what}: label {word!r} is {len(tokens)} tokens ({split[word]}), expected one; "
                "give other words"
            )
    return tuple(tokens[0] for tokens in ids)


def choices(prompts: Prompts) -> dict[str, int]:
    """Class -> the token of its label word, in the order of the classes.

    Args:
        prompts: as those of `classification`.

    Raises:
        InputError: if the prompts lack answers or the rows ``label`` and ``class``.

    >>> import pandas as pd
    >>> rows = pd.DataFrame({"label": ["positive", "negative"], "class": [1, 0]})
    >>> choices(Prompts.from_token_lists([[1], [2]], rows, answers=[[8], [9]]))
    {'negative': 9, 'positive': 8}
    """
    if prompts.answers is None or not {"label", "class"} <= set(prompts.rows):
        raise InputError("choices: expected prompts with answers, and rows 'label' and 'class'")
    table = prompts.rows[["class", "label"]].assign(token=[a[0] for a in prompts.answers])
    table = table.drop_duplicates("class").sort_values("class")
    return {str(label): int(token) for _, label, token in table.itertuples(index=False)}
