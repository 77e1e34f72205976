"""Labels as single tokens: the answers of a language model used as a classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lensclust.errors import InputError, check_counts
from lensclust.models import model_name

Choices = Mapping[str, int | str] | Sequence[str]


def label_tokens(model: Any, choices: Choices, *, caller: str) -> dict[str, int]:
    """Map each label to the id of its single token.

    Args:
        choices: label -> token id, or its answer text, with a leading space where the prompts end
            without one; or only the texts, each its own label.

    Raises:
        InputError: if there are fewer than two labels, a text is not one token (with its split)
            or not in the vocabulary, two labels have the same token, an id is outside the
            vocabulary, or texts are given and the model has no tokenizer; names ``caller``.

    >>> import lensclust as lc
    >>> label_tokens(lc.load("native:sif-small"), {"no": 3, "yes": 5}, caller="decompose")
    {'no': 3, 'yes': 5}
    """
    texts = [choices] if isinstance(choices, str) else choices
    pairs = list(texts.items()) if isinstance(texts, Mapping) else [(each, each) for each in texts]
    named = {str(label): choice for label, choice in pairs}
    if len(named) < 2 or len(named) < len(pairs):
        given = [str(label) for label, _ in pairs]
        raise InputError(f"{caller}: labels {given} given, expected two or more different ones")
    found: dict[str, int] = {}
    for label, choice in named.items():
        token = _one_token(model, label, choice, caller) if isinstance(choice, str) else choice
        check_counts(caller, least=0, **{f"choices[{label!r}]": token})
        if not token < model.cfg.d_vocab:
            raise InputError(
                f"{caller}: label {label!r} is token {token}, but {model_name(model)} has a "
                f"vocabulary of {model.cfg.d_vocab}"
            )
        for other, taken in found.items():
            if taken == token:
                raise InputError(
                    f"{caller}: labels {other!r} and {label!r} are both token {token}, expected "
                    "a different token for each label"
                )
        found[label] = int(token)
    return found


def _one_token(model: Any, label: str, text: str, caller: str) -> int:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise InputError(
            f"{caller}: label {label!r} is given as text, but {model_name(model)} has no "
            "tokenizer; give token ids"
        )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        split = [tokenizer.decode([token]) for token in ids]
        raise InputError(
            f"{caller}: label {label!r} is {text!r}, which splits into {len(ids)} tokens {split} "
            f"in {model_name(model)}, expected one token"
        )
    if ids[0] == tokenizer.unk_token_id and text.strip() != str(tokenizer.unk_token):
        raise InputError(
            f"{caller}: label {label!r} is {text!r}, which is not in the vocabulary of "
            f"{model_name(model)}: it becomes {tokenizer.unk_token!r}; choose another word"
        )
    return ids[0]
