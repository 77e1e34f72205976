"""The folder of a training: its checkpoints, and the state to resume from exactly.

The state holds the step to do next, the weights, the optimizer's moments, the scores so far and
the knobs of the training, which goes on with those and no others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge.sources.native import NativeModel

from lensclust.disk import locked, remove_partial, writing
from lensclust.errors import InputError
from lensclust.sealed import read_sealed, save_sealed

# A safetensors file, named otherwise so that no one takes it for a checkpoint.
_STATE = "training.state"
_HEADER = "lensclust-training"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@contextmanager
def claimed(folder: Path | None) -> Iterator[None]:
    """Hold the folder of a training, if it has one, against every other process.

    Raises:
        InputError: if it is a file, cannot be written to, or another process trains there.
    """
    if folder is None:
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise InputError(f"train: {str(folder)!r} is a file, expected a folder")
    what = f"train: {str(folder)!r}"
    with writing(what):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock", what):
        yield


def open_folder(
    folder: Path | None,
    resume: bool,
    knobs: dict[str, Any],
    model: NativeModel,
    optimizer: torch.optim.Optimizer,
) -> tuple[int, list[dict[str, Any]]]:
    """Restore what was done in the folder: the step to do next and the scores so far."""
    if folder is None:
        if resume:
            raise InputError("train: resume=True, expected the folder of the training as out=")
        return 0, []
    if not resume and ((folder / _STATE).exists() or any(folder.glob("step-*.safetensors"))):
        raise InputError(
            f"train: {str(folder)!r} holds a training: expected another folder or resume=True"
        )
    remove_partial(folder)
    if not (folder / _STATE).exists():
        return 0, []
    try:
        done, tensors = read_sealed(folder / _STATE, _HEADER)
    except InputError as error:
        raise InputError(f"train: cannot resume from {error}") from error
    changed = [name for name, value in knobs.items() if done["knobs"].get(name) != value]
    if changed:
        name = changed[0]
        raise InputError(
            f"train: {str(folder)!r} was started with {name}={done['knobs'].get(name)!r}, "
            f"and cannot go on with {name}={knobs[name]!r}"
        )
    model.load_state_dict({name: tensors[f"weights/{name}"] for name in model.state_dict()})
    for name, parameter in model.named_parameters():
        held = [key for key in _MOMENTS if f"{key}/{name}" in tensors]
        if held:
            optimizer.state[parameter] = {
                key: tensors[f"{key}/{name}"].to(parameter.device) for key in held
            }
    return done["step"], done["scores"]


def save_state(
    folder: Path,
    step: int,
    knobs: dict[str, Any],
    scores: list[dict[str, Any]],
    model: NativeModel,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write what `open_folder` resumes from, the state before ``step``."""
    tensors = {f"weights/{name}": tensor for name, tensor in copy_weights(model).items()}
    for name, parameter in model.named_parameters():
        for key, moment in optimizer.state[parameter].items():
            tensors[f"{key}/{name}"] = moment.detach().cpu().contiguous()
    content = {"step": step, "knobs": knobs, "scores": scores}
    # Replaced in one move: a kill leaves the old state or the new one, never half of one.
    with writing(f"train: {str(folder)!r}"):
        save_sealed(folder / _STATE, _HEADER, content, tensors)


def check_checkpoints(folder: Path, steps: list[int]) -> None:
    """Raises InputError unless the folder holds the checkpoints of these steps."""
    missing = [step for step in steps if not checkpoint_path(folder, step).exists()]
    if missing:
        raise InputError(
            f"train: {str(checkpoint_path(folder, missing[0]))!r} is missing, so this training "
            "cannot be resumed: expected the folder as it was left"
        )


def checkpoint_path(folder: Path, step: int) -> Path:
    """File of the checkpoint of a step."""
    return folder / f"step-{step:06d}.safetensors"


def copy_weights(model: NativeModel) -> dict[str, Tensor]:
    """The weights on the CPU, apart from the model."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
