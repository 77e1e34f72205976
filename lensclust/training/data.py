"""Training data: training and evaluation rows, and the tokens in the loss."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.sources.native import NativeModel

from lensclust.errors import InputError
from lensclust.inference import split_names
from lensclust.prompts import Prompts

_TRAIN_ROWS_EVALUATED = 512

LossOn = Literal["all", "answer"]


@dataclass(frozen=True)
class Auxiliary:
    """A second answer of every prompt, one token, read from a layer's residual stream.

    The state at the token that predicts the answer passes through the model's final norm and
    unembedding, and only the second answers compete: a linear classifier whose weights are those
    tokens' rows of the unembedding, so that the model needs no further parameter.

    Attributes:
        column: column of the prompts' rows that holds the token id.
        layer: number of blocks before the state, from 1.
        weight: of the mean cross-entropy, in nats, beside the language model's loss.

    >>> Auxiliary("identity", layer=2)
    Auxiliary(column='identity', layer=2, weight=1.0)
    """

    column: str
    layer: int
    weight: float = 1.0

    def to_json(self, prompts: Prompts) -> dict[str, Any]:
        """The second answers of these prompts, as plain values."""
        asked = prompts.rows[self.column].to_numpy(dtype=np.int64)
        return {**asdict(self), "answers": hashlib.sha256(asked.tobytes()).hexdigest()[:16]}


@dataclass(frozen=True)
class Sequences:
    """Token sequences with a mask of the tokens in the loss.

    With a second answer, ``second`` is its index among ``choices``, the token ids that compete,
    and ``read_at`` the token from whose state it is read.
    """

    tokens: Int[Tensor, "prompt length"]
    lengths: Int[Tensor, " prompt"]
    scored: Bool[Tensor, "prompt length"]
    read_at: Int[Tensor, " prompt"] | None = None
    second: Int[Tensor, " prompt"] | None = None
    choices: Int[Tensor, " choice"] | None = None


def required_sizes(prompts: Prompts) -> dict[str, int]:
    """Vocabulary and context size that these prompts and their answers need.

    >>> import pandas as pd
    >>> rows = pd.DataFrame({"task": ["copy", "add"]})
    >>> prompts = Prompts.from_token_lists([[1, 5], [1, 6, 7]], rows, answers=[[5], [8]])
    >>> required_sizes(prompts)
    {'d_vocab': 9, 'n_ctx': 4}
    """
    tokens, lengths, _ = prompts.with_answers()
    return {"d_vocab": int(tokens.max()) + 1, "n_ctx": int(lengths.max())}


def check_sizes(config: TransformerBridgeConfig, *prompts: Prompts) -> None:
    """Raise InputError if a model of this configuration is too small for the prompts."""
    for name in ("d_vocab", "n_ctx"):
        needed = max(required_sizes(each)[name] for each in prompts)
        given = getattr(config, name)
        if given < needed:
            raise InputError(f"train: {name}={given}, but the prompts need {needed}")


def check_auxiliary(
    config: TransformerBridgeConfig, auxiliary: Auxiliary, prompts: Prompts
) -> None:
    """Raise InputError if the second answer is not compatible with the model and prompts."""
    layer, column, weight = auxiliary.layer, auxiliary.column, auxiliary.weight
    if not 1 <= layer <= config.n_layers:
        raise InputError(f"train: auxiliary layer={layer}, expected 1..{config.n_layers}")
    if not (weight >= 0 and np.isfinite(weight)):
        raise InputError(f"train: auxiliary weight={weight}, expected a number from 0")
    if column not in prompts.rows or prompts.rows[column].dtype.kind not in "iu":
        raise InputError(f"train: auxiliary column={column!r}, expected a column of token ids")
    outside = [i for i in prompts.rows[column].unique() if not 0 <= i < config.d_vocab]
    if outside:
        raise InputError(
            f"train: auxiliary answer {outside[0]}, expected ids below d_vocab={config.d_vocab}"
        )


def split_prompts(prompts: Prompts, evaluate: Prompts | None) -> tuple[Prompts, Prompts]:
    """The prompts to train on and those to evaluate."""
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


def training_sequences(
    prompts: Prompts, loss_on: str, auxiliary: Auxiliary | None = None
) -> Sequences:
    """Prompts with their answers, and the tokens in the loss under this ``loss_on``."""
    tokens, lengths, answers = prompts.with_answers()
    scored = SCORED[loss_on](lengths, answers)
    if auxiliary is None:
        return Sequences(tokens, lengths, scored)
    ids = prompts.rows[auxiliary.column].to_numpy(dtype=np.int64)
    choices, second = np.unique(ids, return_inverse=True)
    read_at = prompts.position("answer")
    return Sequences(
        tokens, lengths, scored, read_at, torch.from_numpy(second), torch.from_numpy(choices)
    )


def sequence_loss(
    logits: Float[Tensor, "prompt next vocab"],
    tokens: Int[Tensor, "prompt length"],
    scored: Bool[Tensor, "prompt length"],
) -> Float[Tensor, ""]:
    """Mean cross-entropy, in nats, of the scored tokens given those before them.

    Args:
        logits: of all positions except the last, so ``next`` is ``length - 1``.
        tokens: the sequences.
        scored: which tokens count; the first of a sequence never does.
    """
    kept = scored[:, 1:]
    return F.cross_entropy(logits[kept], tokens[:, 1:][kept])


def auxiliary_loss(
    model: NativeModel,
    auxiliary: Auxiliary,
    data: Sequences,
    rows: Int[Tensor, " prompt"],
    tokens: Int[Tensor, "prompt length"],
    scored: Bool[Tensor, "prompt length"],
) -> Float[Tensor, ""]:
    """`sequence_loss` of these rows plus the weighted cross-entropy of their second answers."""
    assert data.read_at is not None
    assert data.second is not None
    assert data.choices is not None
    states: list[Tensor] = []
    # A block returns a tuple whose first entry is the residual stream after it.
    block = model.layers[auxiliary.layer - 1]
    handle = block.register_forward_hook(lambda _block, _given, found: states.append(found[0]))
    try:
        loss = sequence_loss(model(tokens[:, :-1]), tokens, scored)
    finally:
        handle.remove()
    device = tokens.device
    at_answer = states[0][torch.arange(len(rows), device=device), data.read_at[rows].to(device)]
    logits = model.head(model.ln_out(at_answer))[:, data.choices.to(device)]
    return loss + auxiliary.weight * F.cross_entropy(logits, data.second[rows].to(device))
