"""The folder of a training: its checkpoints, and the state to resume from exactly.

The state holds the next step, the weights, the optimizer's moments, the records so far and the
hyperparameters, with which alone the training can be resumed. A checkpoint holds a digest of its
hyperparameters, so that checkpoints of another training are detected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lensclust.errors import InputError
from lensclust.storage import (
    LOCK,
    created,
    digest_of,
    locked,
    read_checksummed,
    read_content,
    remove_partial,
    require_name,
    save_checksummed,
    writing,
)

# A safetensors file, with another ending so that it is not mistaken for a checkpoint.
_STATE = "training.state"
_HEADER = "lensclust-training"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@contextmanager
def claimed(folder: Path | None, *, caller: str) -> Iterator[None]:
    """Lock the folder of a training, if it has one, against other processes.

    Raises:
        InputError: if it is a file, has no name or is not writable, or another process trains
            there.
    """
    if folder is None:
        yield
        return
    what = f"{caller}: {str(folder)!r}"
    require_name(folder, what)
    with writing(what):
        is_file = folder.exists() and not folder.is_dir()
    if is_file:
        raise InputError(f"{what} is a file, expected a folder")
    with created(folder, what), locked(folder / LOCK, what):
        yield


def open_folder(
    folder: Path | None,
    resume: bool,
    knobs: dict[str, Any],
    tensors: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    at: Sequence[int],
    header: str,
    caller: str,
) -> tuple[int, dict[str, Any]]:
    """Restore the state of a folder; return the next step and the records so far.

    Args:
        tensors: the weights, which are set to the values in the state.
        at: steps of the checkpoints.
        header: the key of the checkpoints' headers.
        caller: function name used in error messages.
    """
    if folder is None:
        if resume:
            raise InputError(f"{caller}: resume=True, expected the folder of the training as out=")
        return 0, {}
    if not resume and ((folder / _STATE).exists() or any(folder.glob("step-*.safetensors"))):
        raise InputError(
            f"{caller}: {str(folder)!r} holds a training: expected another folder or resume=True"
        )
    remove_partial(folder)
    done: dict[str, Any] = {"knobs": knobs}
    held: dict[str, Tensor] = {}
    known = (folder / _STATE).exists()
    try:
        if known:
            done, held = read_checksummed(folder / _STATE, _HEADER)
    except InputError as error:
        raise InputError(f"{caller}: cannot resume from {error}") from error
    changed = [name for name, value in knobs.items() if done["knobs"].get(name) != value]
    if changed:
        name = changed[0]
        raise InputError(
            f"{caller}: {str(folder)!r} was started with {name}={done['knobs'].get(name)!r}, "
            f"and cannot be resumed with {name}={knobs[name]!r}"
        )
    training = digest_of(knobs)
    ours = (path for path in folder.glob("step-*.safetensors") if path.stem[5:].isdigit())
    for path in sorted(ours):
        said = read_content(path, header)[0]
        said = said.get("metadata", said)
        # Checkpoints of an earlier version do not name their training.
        if said.get("training", training) != training:
            raise InputError(f"{caller}: {str(path)!r} is of another training: delete its folder")
        if said.get("step") != int(path.stem[5:]):
            raise InputError(f"{caller}: {str(path)!r} is of another step: delete its folder")
    if not known:
        return 0, {}
    for path in (checkpoint_path(folder, step) for step in at if step <= done["step"]):
        if not path.exists():
            raise InputError(
                f"{caller}: {str(path)!r} is missing, so this training cannot be resumed: expected "
                "the folder unchanged"
            )
    for name, tensor in tensors.items():
        if f"weights/{name}" in held:
            with torch.no_grad():
                tensor.copy_(held[f"weights/{name}"])
        moments = [key for key in _MOMENTS if f"{key}/{name}" in held]
        if moments:
            optimizer.state[tensor] = {
                key: held[f"{key}/{name}"].to(tensor.device) for key in moments
            }
    return done["step"], done


def save_state(
    folder: Path,
    content: dict[str, Any],
    tensors: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    caller: str,
) -> None:
    """Write the state before ``content["step"]``, from which `open_folder` resumes."""
    held = {f"weights/{name}": copied(tensor) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        for key, moment in optimizer.state.get(tensor, {}).items():
            held[f"{key}/{name}"] = moment.detach().cpu().contiguous()
    # Replaced atomically: a kill leaves the old state or the new one, never half of one.
    with writing(f"{caller}: {str(folder)!r}"):
        save_checksummed(folder / _STATE, _HEADER, content, held)


def checkpoint_path(folder: Path, step: int) -> Path:
    """File of the checkpoint of a step."""
    return folder / f"step-{step:06d}.safetensors"


def copied(tensor: Tensor) -> Tensor:
    """A copy of a tensor on the CPU."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
