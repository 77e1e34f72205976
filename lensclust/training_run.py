"""What a training leaves: its scores, and the model at each checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from lensclust.native import native_bridge_with
from lensclust.sealed import tensors_digest
from lensclust.showing import as_html
from lensclust.weights import checkpoint_fingerprint, load_checkpoint


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The model after so many steps, in a file or, without one, in memory."""

    step: int
    config: TransformerBridgeConfig = field(repr=False)
    path: Path | None = None
    weights: dict[str, Tensor] | None = field(default=None, repr=False)

    def model(self) -> TransformerBridge:
        """A fresh model with these weights, in eval mode.

        Raises:
            InputError: if the file is gone or damaged.
        """
        if self.path is not None:
            return load_checkpoint(self.path)
        # Copied, so that no edit of the model reaches the checkpoint.
        weights = {name: tensor.clone() for name, tensor in (self.weights or {}).items()}
        return native_bridge_with(self.config, weights, name=f"step {self.step}")

    def fingerprint(self) -> str:
        """What `lensclust.fingerprint` says of the model, without building it.

        Raises:
            InputError: if the file is gone or damaged.
        """
        if self.path is not None:
            return checkpoint_fingerprint(self.path)
        return tensors_digest((self.weights or {}).items())


def described(run: object, frame: pd.DataFrame, checkpoints: Sequence[Any], *further: str) -> str:
    """A run in one line: how long it was, and what it had learnt at the end."""
    learnt = ""
    if len(frame):
        last = frame[frame["step"] == frame["step"].max()]
        found = zip(last["split"], last["accuracy"], strict=True)
        shares = (f"{share:.2f} of {split}" for split, share in found)
        learnt = f"; answers right at the end: {', '.join(shares)}"
    parts = [f"{checkpoints[-1].step} steps", f"{len(checkpoints)} checkpoints", *further]
    return f"{type(run).__name__}({', '.join(parts)}{learnt})"


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """A finished training.

    Attributes:
        frame: ``step, split, accuracy, loss`` at every checkpoint and wherever else it was
            asked for (``evaluate_every``); accuracy is the share of prompts whose whole answer
            is the argmax, loss the mean cross-entropy of the answer in nats.
        checkpoints: by step, the untrained model first.
    """

    frame: pd.DataFrame
    checkpoints: tuple[Checkpoint, ...]

    def model(self) -> TransformerBridge:
        """The trained model."""
        return self.checkpoints[-1].model()

    def __repr__(self) -> str:
        return described(self, self.frame, self.checkpoints)

    def _repr_html_(self) -> str:
        return as_html(repr(self), self.frame)

    def models(self) -> Iterator[tuple[int, TransformerBridge]]:
        """Step and model of each checkpoint, loaded one at a time."""
        return ((checkpoint.step, checkpoint.model()) for checkpoint in self.checkpoints)
