"""Results of a training: its scores, and the model at each checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from lensclust.errors import InputError
from lensclust.figures import as_html
from lensclust.models import (
    checkpoint_fingerprint,
    load_checkpoint,
    native_bridge_with,
    restored_afterwards,
)
from lensclust.storage import read_checksummed, tensors_digest
from lensclust.training.lora import Adapters

HEADER = "lensclust-finetuning"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The model after ``step`` steps, in a file or, without one, in memory."""

    step: int
    config: TransformerBridgeConfig = field(repr=False)
    path: Path | None = None
    weights: dict[str, Tensor] | None = field(default=None, repr=False)

    def model(self) -> TransformerBridge:
        """A new model with these weights, in eval mode.

        Raises:
            InputError: if the file is gone or damaged.
        """
        if self.path is not None:
            return load_checkpoint(self.path)
        # Copied, so that no edit of the model reaches the checkpoint.
        weights = {name: tensor.clone() for name, tensor in (self.weights or {}).items()}
        return native_bridge_with(self.config, weights, name=f"step {self.step}")

    def fingerprint(self) -> str:
        """The `lensclust.fingerprint` of the model, without building it.

        Raises:
            InputError: if the file is gone or damaged.
        """
        if self.path is not None:
            return checkpoint_fingerprint(self.path)
        return tensors_digest((self.weights or {}).items())


def described(run: object, frame: pd.DataFrame, checkpoints: Sequence[Any], *further: str) -> str:
    """A run in one line: its length and its final scores."""
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
        frame: ``step, split, accuracy, loss`` at every checkpoint and further steps
            (``evaluate_every``); accuracy is the share of prompts whose whole answer
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


@dataclass(frozen=True, eq=False)
class ChosenWeights:
    """Weights of the model that are trained in place; the counterpart of `Adapters`."""

    parameters: dict[str, nn.Parameter]

    def on(self) -> AbstractContextManager[None]:
        """A context without effect: the model always runs with these parameters."""
        return nullcontext()

    @property
    def weights(self) -> list[nn.Parameter]:
        """The model's weights that `put_in` changes."""
        return list(self.parameters.values())

    def put_in(self, held: Mapping[str, Tensor]) -> None:
        """Copy these values into the model's weights."""
        with torch.no_grad():
            for name, values in held.items():
                self.parameters[name].copy_(values)


Tuned = ChosenWeights | Adapters


@dataclass(frozen=True, eq=False)
class TunedCheckpoint:
    """The trained parameters after ``step`` steps: in a file or, without one, in memory.

    Attributes:
        step: number of steps before it.
        samples: number of prompts seen before it, with repetitions.
    """

    step: int
    samples: int
    path: Path | None = None
    held: Mapping[str, Tensor] | None = field(default=None, repr=False)

    def tensors(self) -> Mapping[str, Tensor]:
        """The trained parameters at this step, by name.

        Raises:
            InputError: if the file is gone or damaged.
        """
        return read_checksummed(self.path, HEADER)[1] if self.path is not None else self.held or {}


@dataclass(frozen=True, eq=False)
class FinetuningRun:
    """A finished fine-tuning; the model itself is unchanged.

    Attributes:
        frame: ``step, samples, split, loss, accuracy`` of the prompts to evaluate, at every
            checkpoint: loss the mean cross-entropy of an answer's tokens in nats, accuracy the
            share of prompts whose whole answer is the argmax. Empty without such prompts.
        losses: of each step's batch, before the step: cross-entropy of its answer tokens, nats.
        checkpoints: by step, the model before training first.
        parameters: number of trained parameters.
    """

    frame: pd.DataFrame
    losses: tuple[float, ...]
    checkpoints: tuple[TunedCheckpoint, ...]
    parameters: int
    _model: TransformerBridge
    _tuned: Tuned
    _in_use: Any = field(default_factory=Lock)

    def __repr__(self) -> str:
        trained = f"{self.parameters:,} parameters trained"
        return described(self, self.frame, self.checkpoints, trained)

    def _repr_html_(self) -> str:
        return as_html(repr(self), self.frame)

    @contextmanager
    def at(self, step: int | None = None) -> Iterator[TransformerBridge]:
        """Context with the model after a step, adapters merged.

        Args:
            step: of a checkpoint; the last by default.

        Raises:
            InputError: if there is no such checkpoint, its file is gone or damaged, or another
                checkpoint of this run is in the model.
        """
        there = {checkpoint.step: checkpoint for checkpoint in self.checkpoints}
        wanted = self.checkpoints[-1].step if step is None else step
        if wanted not in there:
            raise InputError(f"finetune: step={wanted}, expected a checkpoint: one of {[*there]}")
        if not self._in_use.acquire(blocking=False):
            raise InputError(
                f"finetune: step {wanted} requested while another checkpoint of this run is in "
                "the model, expected that block to end first"
            )
        try:
            held = there[wanted].tensors()
            with restored_afterwards(self._model, self._tuned.weights):
                self._tuned.put_in(held)
                yield self._model
        finally:
            self._in_use.release()

    def series(self) -> Iterator[tuple[int, TransformerBridge]]:
        """Step and model of each checkpoint, as in `at`, valid until the next is requested."""
        for checkpoint in self.checkpoints:
            with self.at(checkpoint.step) as model:
                yield checkpoint.step, model
