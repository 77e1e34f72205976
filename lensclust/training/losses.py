"""Losses on a model's internal states, beside that of its answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Float[Tensor, "row d"], Int[Tensor, " row"]], Float[Tensor, ""]]


@dataclass(frozen=True)
class StateLoss:
    """An additional loss on the prompts' states at one layer of the residual stream.

    Attributes:
        layer: 0 is the embeddings, ``l`` the output of block ``l - 1``.
        loss: from states ``(row, d)`` and the prompt number of each row to a number, such as
            the functions returned by `pull` and `contrast`.
        weight: of this loss beside the cross-entropy of the answers.
        at: read position of the states (`Prompts.position`).
    """

    layer: int
    loss: Loss
    weight: float | int = 1.0
    at: str = "answer"


def pull(wanted: Float[Tensor, "prompt d"], spread: float) -> Loss:
    """A loss: mean squared distance of each prompt's state to its target, over ``spread``.

    Args:
        wanted: target state of each prompt, NaN for prompts without a target.
        spread: the squared distance that counts as 1.

    >>> import torch
    >>> loss = pull(torch.tensor([[1.0, 0.0], [float("nan")] * 2]), spread=4.0)
    >>> float(loss(torch.tensor([[3.0, 0.0], [9.0, 9.0]]), torch.tensor([0, 1])))
    1.0
    """

    def loss(states: Float[Tensor, "row d"], rows: Int[Tensor, " row"]) -> Float[Tensor, ""]:
        goal = wanted.to(states)[rows.to(wanted.device)]
        known = goal.isfinite().all(-1)
        # A sum over no rows is 0, a mean would be NaN.
        return ((states - goal)[known] ** 2).sum() / (spread * max(1, int(known.sum())))

    return loss


def contrast(
    wanted: Float[Tensor, "prompt d"], unwanted: Float[Tensor, "prompt d"], spread: float
) -> Loss:
    """A loss: cross-entropy of the wanted state against the unwanted one.

    Logits are minus the squared distances over ``spread``, so the loss of a state halfway between
    the two is ``log 2``. Rows that are NaN are ignored.

    >>> import torch
    >>> points = torch.eye(2)
    >>> loss = contrast(points[:1], points[1:], spread=1.0)
    >>> round(float(loss(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))), 3)
    0.693
    """

    def loss(states: Float[Tensor, "row d"], rows: Int[Tensor, " row"]) -> Float[Tensor, ""]:
        goal, away = (each.to(states)[rows.to(each.device)] for each in (wanted, unwanted))
        known = (goal + away).isfinite().all(-1)
        near, far = (((states - each)[known] ** 2).sum(-1) / spread for each in (goal, away))
        return F.softplus(near - far).sum() / max(1, int(known.sum()))

    return loss
