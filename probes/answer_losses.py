"""How wrong a model is about the answers of its prompts: what gradients are taken of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lensclust.errors import InputError
from lensclust.prompts import Prompts

# From the logits at the last token of each row to a sum over rows.
Loss = Callable[[Float[Tensor, "row vocab"]], Float[Tensor, ""]]


class AnswerLoss:
    """Cross-entropy of the token that each prompt's answer begins with.

    Args:
        prompts: with answers.
        labels: tokens among which the answer is looked for; all of the vocabulary unless given.
        caller: in whose name errors speak.

    Raises:
        InputError: if a prompt has no answer, or one that is none of the labels.

    >>> import pandas as pd
    >>> prompts = Prompts.from_token_lists([[1]], pd.DataFrame({"task": ["a"]}), answers=[[2]])
    >>> loss = AnswerLoss(prompts, labels=[0, 2], caller="example").of(torch.tensor([0]))
    >>> round(float(loss(torch.tensor([[0.0, 9.0, 0.0]]))), 3)  # two labels, level
    0.693
    """

    def __init__(
        self, prompts: Prompts, *, labels: Sequence[int] | None = None, caller: str
    ) -> None:
        # The first token of each, in a list that is empty where there is none.
        first = [list(answer[:1]) for answer in prompts.answers or ((),)]
        if without := [row for row, tokens in enumerate(first) if not tokens]:
            raise InputError(f"{caller}: prompt {without[0]} has no answer, needed for gradients")
        first = [token for tokens in first for token in tokens]
        self.labels = None if labels is None else torch.tensor(list(labels))
        if labels is not None:
            place = {token: index for index, token in enumerate(labels)}
            if other := [row for row, token in enumerate(first) if token not in place]:
                raise InputError(
                    f"{caller}: the answer of prompt {other[0]} begins with token "
                    f"{first[other[0]]}, expected one of the labels {list(labels)}"
                )
            first = [place[token] for token in first]
        self.right = torch.tensor(first)

    def of(self, rows: Int[Tensor, " row"]) -> Loss:
        """The loss of these prompts: of each its own, added up."""

        def loss(logits: Float[Tensor, "row vocab"]) -> Float[Tensor, ""]:
            if self.labels is not None:
                logits = logits[:, self.labels.to(logits.device)]
            right = self.right[rows].to(logits.device)
            # Rows do not touch each other, so the gradient of the sum is each row's own.
            return torch.nn.functional.cross_entropy(logits, right, reduction="sum")

        return loss
