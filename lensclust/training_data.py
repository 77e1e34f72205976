"""What a training reads: the rows it trains and reports on, and the tokens its loss counts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformer_lens.config import TransformerBridgeConfig

from lensclust.errors import InputError
from lensclust.evaluation import split_names
from lensclust.prompts import Prompts

_TRAIN_ROWS_EVALUATED = 512

LossOn = Literal["all", "answer"]


@dataclass(frozen=True)
class Sequences:
    """Token sequences with the tokens that the loss counts."""

    tokens: Int[Tensor, "prompt length"]
    lengths: Int[Tensor, " prompt"]
    scored: Bool[Tensor, "prompt length"]


def required_sizes(prompts: Prompts) -> dict[str, int]:
    """Vocabulary and context that a model needs for these prompts and their answers.

    >>> import pandas as pd
    >>> rows = pd.DataFrame({"task": ["copy", "add"]})
    >>> prompts = Prompts.from_token_lists([[1, 5], [1, 6, 7]], rows, answers=[[5], [8]])
    >>> required_sizes(prompts)
    {'d_vocab': 9, 'n_ctx': 4}
    """
    tokens, lengths, _ = prompts.with_answers()
    return {"d_vocab": int(tokens.max()) + 1, "n_ctx": int(lengths.max())}


def check_fit(config: TransformerBridgeConfig, *prompts: Prompts) -> None:
    """Raises InputError if a model of this configuration is too small for the prompts."""
    for name in ("d_vocab", "n_ctx"):
        needed = max(required_sizes(each)[name] for each in prompts)
        given = getattr(config, name)
        if given < needed:
            raise InputError(f"train: {name}={given}, but the prompts need {needed}")


def split_prompts(prompts: Prompts, evaluate: Prompts | None) -> tuple[Prompts, Prompts]:
    """The prompts to train on and those to report on."""
    if "split" not in prompts.rows:
        return prompts, prompts if evaluate is None else evaluate
    is_train = (prompts.rows["split"] == "train").to_numpy()
    if not is_train.any():
        raise InputError(f"train: no row of split 'train': rows have {set(split_names(prompts))}")
    train_rows = np.flatnonzero(is_train)
    if evaluate is not None:
        return prompts.take(train_rows), evaluate
    every = -(-len(train_rows) // _TRAIN_ROWS_EVALUATED)
    reported = np.concatenate([train_rows[::every], np.flatnonzero(~is_train)])
    return prompts.take(train_rows), prompts.take(reported)


def content_digest(prompts: Prompts) -> str:
    """Digest of the sequences, the answers in them and the splits."""
    tokens, lengths, answers = prompts.with_answers()
    total = hashlib.sha256(json.dumps(split_names(prompts)).encode())
    for tensor in (tokens, lengths, answers):
        total.update(f"{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return total.hexdigest()[:16]


def _scored_all(
    lengths: Int[Tensor, " prompt"], answers: Bool[Tensor, "prompt length"]
) -> Bool[Tensor, "prompt length"]:
    index = torch.arange(answers.shape[1])
    return (index >= 1) & (index < lengths[:, None])


def _scored_answer(
    lengths: Int[Tensor, " prompt"], answers: Bool[Tensor, "prompt length"]
) -> Bool[Tensor, "prompt length"]:
    return answers


SCORED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "all": _scored_all,
    "answer": _scored_answer,
}


def training_sequences(prompts: Prompts, loss_on: str) -> Sequences:
    """Prompts with their answers, and the tokens that count with this ``loss_on``."""
    tokens, lengths, answers = prompts.with_answers()
    return Sequences(tokens, lengths, SCORED[loss_on](lengths, answers))


def sequence_loss(
    logits: Float[Tensor, "prompt next vocab"],
    tokens: Int[Tensor, "prompt length"],
    scored: Bool[Tensor, "prompt length"],
) -> Float[Tensor, ""]:
    """Mean cross-entropy, in nats, of the scored tokens given those before them.

    Args:
        logits: of all positions but the last, so ``next`` is ``length - 1``.
        tokens: the sequences.
        scored: which tokens count; the first of a sequence never does.
    """
    kept = scored[:, 1:]
    return F.cross_entropy(logits[kept], tokens[:, 1:][kept])
