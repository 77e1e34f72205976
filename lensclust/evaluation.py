"""Accuracy and loss of a model on the answers of prompts, by split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.batching import batches
from lensclust.prompts import Prompts

LogitsAt = Callable[
    [Int[Tensor, "prompt length"], Bool[Tensor, "prompt length"]], Float[Tensor, "token vocab"]
]
"""From right-padded sequences to the logits at the places that a mask marks, row by row."""


def score_answers(
    model: TransformerLensModel,
    logits_at: LogitsAt,
    prompts: Prompts,
    step: int,
    *,
    device: torch.device,
    batch_tokens: int = 16_384,
) -> list[dict[str, Any]]:
    """Accuracy and loss of the answers, a row a split.

    A prompt is right where every token of its answer is the argmax; its loss is the mean
    cross-entropy of the answer's tokens, in nats. A row is the mean over the prompts.
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
            each = torch.zeros(asked.shape, device=device)
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
    """Split of each prompt; "all" where rows have none."""
    has_splits = "split" in prompts.rows
    return prompts.rows["split"].astype(str).tolist() if has_splits else ["all"] * len(prompts)
