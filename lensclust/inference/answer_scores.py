"""Accuracy and loss of a model on the answers of prompts, by split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.errors import InputError
from lensclust.inference.checks import require_answers, require_fits
from lensclust.inference.partial_forwards import scored_logits
from lensclust.models import announced, batches, default_budget, model_device, wrong_with_cache
from lensclust.prompts import Prompts

LogitsAt = Callable[
    [Int[Tensor, "prompt length"], Bool[Tensor, "prompt length"]], Float[Tensor, "token vocab"]
]


"""A function from right-padded sequences to the logits at masked positions, row by row."""


def score_answers(
    model: TransformerLensModel,
    logits_at: LogitsAt,
    prompts: Prompts,
    step: int,
    *,
    device: torch.device,
    batch_tokens: int = 16_384,
) -> list[dict[str, Any]]:
    """Accuracy and loss of the answers, one row per split.

    A prompt is right if every token of its answer is the argmax; its loss is the mean
    cross-entropy of the answer's tokens, in nats. A row is the mean over prompts.
    """
    tokens, lengths, answers = prompts.with_answers()
    right, loss = torch.zeros(len(tokens), dtype=torch.bool), torch.zeros(len(tokens))
    for rows in batches(model, lengths - 1, batch_tokens):
        longest = int(lengths[rows].max())
        batch = tokens[rows, :longest].to(device)
        asked = answers[rows, 1:longest].to(device)
        wanted = batch[:, 1:][asked]
        with torch.inference_mode():
            logits = logits_at(batch[:, :-1], asked).float()
            each = torch.zeros(asked.shape, device=device, dtype=torch.float32)
            each[asked] = F.cross_entropy(logits, wanted, reduction="none")
            wrong = torch.zeros_like(asked)
            wrong[asked] = logits.argmax(-1) != wanted
        right[rows] = ~wrong.any(-1).cpu()
        loss[rows] = (each.sum(-1) / asked.sum(-1)).cpu()
    frame = pd.DataFrame(
        {"split": split_names(prompts), "accuracy": right.tolist(), "loss": loss.tolist()}
    )
    means = frame.groupby("split", sort=False)[["accuracy", "loss"]].mean()
    return [
        {"step": step, "split": split, "accuracy": float(accuracy), "loss": float(nats)}
        for split, accuracy, nats in means.itertuples()
    ]


def split_names(prompts: Prompts) -> list[str]:
    """Split of each prompt; "all" if rows have none."""
    has_splits = "split" in prompts.rows
    return prompts.rows["split"].astype(str).tolist() if has_splits else ["all"] * len(prompts)


def answer_scores(
    model: TransformerBridge,
    prompts: Prompts,
    *,
    others: Sequence[Sequence[int]] | None = None,
    batch_tokens: int | None = None,
) -> pd.DataFrame:
    """Log probability of each prompt's whole answer, and whether greedy decoding gives it.

    Args:
        model: a hooked model, in eval mode.
        prompts: prompts with answers.
        others: token ids of another answer to each prompt, such as a wrong one; only the first
            is used.
        batch_tokens: upper bound of the tokens in one forward; default that of `extract`.

    Returns:
        One row per prompt: ``confidence`` (log probability of the answer, in nats), ``right`` (1 if
        every token of it is the most likely one) and, with ``others``, ``choice`` (log
        probability of the answer's first token less that of the other's) and ``says_other`` (1
        if the most likely token is the other's).

    Raises:
        InputError: if the prompts have no answers or are not compatible with the model, an answer
            is empty, or the number of others is wrong.

    >>> import lensclust as lc
    >>> model, prompts = lc.load("native:sif-small"), lc.tasks.sif().where(split="new_string")
    >>> scores = answer_scores(model, prompts)
    >>> bool((scores.confidence < 0).all()), list(scores)
    (True, ['confidence', 'right'])
    """
    require_fits(model, prompts, caller="answer_scores")
    require_answers(model, prompts, caller="answer_scores")
    if others is not None and (len(others) != len(prompts) or not all(map(len, others))):
        raise InputError(
            f"answer_scores: {len(others)} other answers to {len(prompts)} prompts, expected one "
            "each, none empty"
        )
    tokens, lengths, asked = prompts.with_answers()
    columns = ["confidence", "right", *(["choice", "says_other"] if others is not None else [])]
    device = model_device(model)
    table = torch.empty((len(prompts), len(columns)), dtype=torch.float64)
    for rows in batches(model, lengths - 1, batch_tokens or default_budget(model)):
        longest = int(lengths[rows].max())
        # The logits at a token are about the next one.
        row, place = asked[rows, 1:longest].nonzero().unbind(1)

        with torch.no_grad():
            # The last token of an answer is predicted, never an input.
            logits = scored_logits(
                model, tokens[rows, : longest - 1].to(device), asked[rows, 1:longest].to(device)
            )
        told = logits.float().log_softmax(-1).double().cpu()
        right = tokens[rows][row, place + 1]
        each = told.gather(1, right[:, None])[:, 0]
        total = torch.zeros(len(rows), dtype=torch.float64).index_add(0, row, each)
        wrong = torch.zeros(len(rows), dtype=torch.float32).index_add(
            0, row, (told.argmax(-1) != right).float()
        )
        table[rows, 0], table[rows, 1] = total, (wrong == 0).double()
        if others is not None:
            first = place == prompts.lengths[rows][row] - 1
            other = torch.tensor([others[index][0] for index in rows.tolist()])
            of_other = told[first].gather(1, other[:, None])[:, 0]
            table[rows, 2] = each[first] - of_other
            table[rows, 3] = (told[first].argmax(-1) == other).double()
    return pd.DataFrame(table.numpy(), columns=columns)


def greedy_texts(
    model: TransformerLensModel, prompts: Prompts, *, new_tokens: int, batch: int = 32
) -> list[str]:
    """The model's greedy continuation of each prompt.

    Prompts of one length run together, so nothing is padded.

    Args:
        new_tokens: number of tokens to generate; the model does not stop before.

    Raises:
        InputError: if the model has no tokenizer, or is not compatible with the prompts.
    """
    require_fits(model, prompts, caller="greedy_texts")
    hooked: Any = model
    if getattr(hooked, "tokenizer", None) is None:
        raise InputError("greedy_texts: the model has no tokenizer, needed to decode its output")
    found = [""] * len(prompts)
    same = [(prompts.lengths == length).nonzero()[:, 0] for length in prompts.lengths.unique()]
    parts = [rows for group in same for rows in group.split(batch)]
    for rows in announced(parts, len(prompts), whole=True):
        length = int(prompts.lengths[rows[0]])
        written = hooked.generate(
            prompts.tokens[rows, :length].to(model_device(model)),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_past_kv_cache=wrong_with_cache(model, length, length + new_tokens - 1) is None,
            stop_at_eos=False,
            return_type="tokens",
            verbose=False,
        )
        for row, tokens in zip(rows.tolist(), written[:, length:], strict=True):
            found[row] = hooked.tokenizer.decode(tokens)
    return found
