"""What a fine-tuning leaves: checkpoints of what was trained, put into the model when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from lensclust.adapters import Adapters
from lensclust.chosen_weights import left_as_it_was
from lensclust.errors import InputError
from lensclust.sealed import read_sealed
from lensclust.showing import as_html
from lensclust.training_run import described

HEADER = "lensclust-finetuning"


@dataclass(frozen=True, eq=False)
class ChosenWeights:
    """Weights of the model itself, trained where they are: what `Adapters` is for adapters."""

    parameters: dict[str, nn.Parameter]

    def on(self) -> AbstractContextManager[None]:
        """Inside, the model runs with these parameters, as it does outside."""
        return nullcontext()

    @property
    def weights(self) -> list[nn.Parameter]:
        """The model's weights that `put_in` changes."""
        return list(self.parameters.values())

    def put_in(self, held: Mapping[str, Tensor]) -> None:
        """Give the model's weights these values."""
        with torch.no_grad():
            for name, values in held.items():
                self.parameters[name].copy_(values)


Tuned = ChosenWeights | Adapters


@dataclass(frozen=True, eq=False)
class TunedCheckpoint:
    """What was trained, after so many steps: in a file or, without one, in memory.

    Attributes:
        step: steps done before it.
        samples: prompts seen before it, each as often as it was.
    """

    step: int
    samples: int
    path: Path | None = None
    held: Mapping[str, Tensor] | None = field(default=None, repr=False)

    def tensors(self) -> Mapping[str, Tensor]:
        """What has moved by then, by name.

        Raises:
            InputError: if the file is gone or damaged.
        """
        return read_sealed(self.path, HEADER)[1] if self.path is not None else self.held or {}


@dataclass(frozen=True, eq=False)
class FinetuningRun:
    """A finished fine-tuning of a model that is as it was before.

    Attributes:
        frame: ``step, samples, split, loss, accuracy`` of the prompts to evaluate, at every
            checkpoint: loss the mean cross-entropy of an answer's tokens in nats, accuracy the
            share of prompts whose whole answer is the argmax. Empty without such prompts.
        losses: of each step's batch, before the step: cross-entropy of its answer tokens, nats.
        checkpoints: by step, the model before training first.
        parameters: how many numbers were free to move.
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
        """The model as it was after a step, adapters merged, for as long as the block lasts.

        Args:
            step: of a checkpoint; the last unless given.

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
                f"finetune: step {wanted} asked for while another checkpoint of this run is in "
                "the model, expected that block to end first"
            )
        try:
            held = there[wanted].tensors()
            with left_as_it_was(self._model, self._tuned.weights):
                self._tuned.put_in(held)
                yield self._model
        finally:
            self._in_use.release()

    def series(self) -> Iterator[tuple[int, TransformerBridge]]:
        """Step and model of each checkpoint, as `at` gives it until the next is asked for."""
        for checkpoint in self.checkpoints:
            with self.at(checkpoint.step) as model:
                yield checkpoint.step, model
