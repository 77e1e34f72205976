"""Accuracy and loss of a model on the answers of prompts, by split."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch.nn import functional as F
from transformer_lens.model_bridge.sources.native import NativeModel

from lensclust.prompts import Prompts

_EVALUATION_BATCH = 512


def score_answers(model: NativeModel, prompts: Prompts, step: int) -> list[dict[str, Any]]:
    """Accuracy and loss of the answers, a row a split."""
    tokens, _, answers = prompts.with_answers()
    device = next(model.parameters()).device
    right, loss = [], []
    for rows in torch.arange(len(tokens)).split(_EVALUATION_BATCH):
        batch, asked = tokens[rows].to(device), answers[rows, 1:].to(device)
        with torch.inference_mode():
            logits = model(batch[:, :-1])
            each = F.cross_entropy(logits.mT, batch[:, 1:], reduction="none")
        wrong = (logits.argmax(-1) != batch[:, 1:]) & asked
        right += (~wrong.any(-1)).tolist()
        loss += ((each * asked).sum(-1) / asked.sum(-1)).tolist()
    frame = pd.DataFrame({"split": split_names(prompts), "accuracy": right, "loss": loss})
    means = frame.groupby("split", sort=False)[["accuracy", "loss"]].mean()
    return [
        {"step": step, "split": split, "accuracy": float(accuracy), "loss": float(nats)}
        for split, accuracy, nats in means.itertuples()
    ]


def split_names(prompts: Prompts) -> list[str]:
    """Split of each prompt; "all" where rows have none."""
    has_splits = "split" in prompts.rows
    return prompts.rows["split"].astype(str).tolist() if has_splits else ["all"] * len(prompts)
