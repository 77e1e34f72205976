"""Labelled examples of many problems in one padded batch.

A problem has examples, and each example has features for every label; one weight per feature gives
logits. Problems may differ in their numbers of examples and labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples of several problems, padded.

    Attributes:
        features: ``(problem, example, label, weight)``, zero in the padding.
        offsets: constants added to the logits; minus infinity for labels that a problem does not
            have.
        targets: index of the right label.
        shares: weight of each example in its problem's mean: 1 / examples, zero in the padding.
    """

    features: Float[Tensor, "problem example label weight"]
    offsets: Float[Tensor, "problem example label"]
    targets: Int[Tensor, "problem example"]
    shares: Float[Tensor, "problem example"]

    @classmethod
    def of(
        cls,
        features: Sequence[Float[np.ndarray, "_example _label weight"]],
        offsets: Sequence[Float[np.ndarray, "_example _label"]],
        targets: Sequence[Int[np.ndarray, " _example"]],
    ) -> Examples:
        """Make a batch from lists with one entry per problem.

        >>> Examples.of([np.ones((3, 2, 5))], [np.zeros((3, 2))], [np.zeros(3, int)]).shares
        tensor([[0.3333, 0.3333, 0.3333]])
        """
        sizes = np.array([each.shape for each in features])
        n, examples, labels = len(features), int(sizes[:, 0].max()), int(sizes[:, 1].max())
        made = cls(
            torch.zeros(n, examples, labels, int(sizes[0, 2]), dtype=torch.float32),
            torch.full((n, examples, labels), -torch.inf, dtype=torch.float32),
            torch.zeros(n, examples, dtype=torch.long),
            torch.zeros(n, examples, dtype=torch.float32),
        )
        for problem, (rows, columns, _) in enumerate(sizes.tolist()):
            made.features[problem, :rows, :columns] = torch.from_numpy(features[problem]).float()
            # Also in the padding of examples, so that a softmax there is finite.
            made.offsets[problem, :, :columns] = 0
            made.offsets[problem, :rows, :columns] = torch.from_numpy(offsets[problem]).float()
            made.targets[problem, :rows] = torch.from_numpy(targets[problem])
            made.shares[problem, :rows] = 1 / rows
        return made

    def take(self, problems: Int[Tensor, " some"]) -> Examples:
        """The problems at these indices."""
        return Examples(
            self.features[problems],
            self.offsets[problems],
            self.targets[problems],
            self.shares[problems],
        )

    def logits(
        self, weights: Float[Tensor, "problem weight column"]
    ) -> Float[Tensor, "problem example label column"]:
        """Logits under several columns of weights per problem."""
        made = (self.features.flatten(1, 2) @ weights).unflatten(1, self.offsets.shape[1:])
        return made + self.offsets[..., None]

    def losses(
        self, logits: Float[Tensor, "problem example label column"]
    ) -> Float[Tensor, "problem example column"]:
        """Cross-entropy of every example."""
        chosen = self.targets[:, :, None, None].expand(-1, -1, 1, logits.shape[-1])
        return -logits.log_softmax(2).gather(2, chosen).squeeze(2)

    def pull(
        self,
        logits: Float[Tensor, "problem example label column"],
        shares: Float[Tensor, "problem example column"],
    ) -> Float[Tensor, "problem weight column"]:
        """Gradient of ``sum of shares x losses`` with respect to the weights."""
        right = F.one_hot(self.targets, logits.shape[2])[..., None]
        residual = (logits.softmax(2) - right) * shares[:, :, None]
        return self.features.flatten(1, 2).mT @ residual.flatten(1, 2)
