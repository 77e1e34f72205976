"""The small model that most studies begin with, trained on the prompts of one seed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import lensclust as lc

if TYPE_CHECKING:
    from lensclust.training import TrainingRun


@runtime_checkable
class Trains(Protocol):
    """A study with the knobs of a training."""

    @property
    def model(self) -> str: ...
    @property
    def steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def lr(self) -> float: ...


def trained(
    study: Trains,
    prompts: lc.Prompts,
    seed: int,
    folder: Path,
    *,
    n_checkpoints: int,
    sizes: dict[str, int] | None = None,
    **options: Any,
) -> TrainingRun:
    """Train the study's native preset on a seed's prompts, or read the training in ``folder``.

    Args:
        study: names the preset, and the steps, prompts a step and learning rate.
        folder: of the seed; checkpoints lie below it, and a training that was killed goes on.
        sizes: fields of the preset that are changed, beside those that the prompts need.
        options: further ones of `lensclust.train`.
    """
    from lensclust.native import native_config
    from lensclust.training import required_sizes

    return lc.train(
        native_config(study.model, **required_sizes(prompts), **(sizes or {})),
        prompts,
        steps=study.steps,
        batch_size=study.batch_size,
        lr=study.lr,
        n_checkpoints=n_checkpoints,
        out=folder / "checkpoints",
        seed=seed,
        resume=True,
        progress=False,
        **options,
    )
