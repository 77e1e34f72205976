"""Weights of a model: fingerprints, checkpoint files, series of checkpoints."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources.native import NativeModel

from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.models.devices import brought_in
from lensclust.models.native import config_from_json, config_to_json, native_bridge_with
from lensclust.models.parameters import WRAPPED
from lensclust.models.wrapping import keep_up
from lensclust.storage import read_checksummed, read_content, save_checksummed, tensors_digest

_log = logging.getLogger(__name__)

HEADER = "lensclust"


@checked_arguments
def fingerprint(model: nn.Module) -> str:
    """sha256 over names, shapes, dtypes and bytes of a model's weights, as 64 hex digits.

    It does not depend on the device, and is the same for a native model, its bridge and its
    checkpoint file. A Hugging Face model and its bridge agree unless the bridge splits joint
    projections (GPT-2, GPT-NeoX), which adds weights. Takes half a second for 500 MB.

    >>> from lensclust import load
    >>> one, other = load("native:sif-small", seed=0), load("native:sif-small", seed=1)
    >>> fingerprint(one) == fingerprint(one), fingerprint(one) == fingerprint(other)
    (True, False)
    """
    return tensors_digest(named_weights(model).items(), brought_in(model))


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights under the names they had before TransformerLens wrapped it.

    Reads the wrapped model, because ``TransformerBridge.state_dict`` omits weights (the experts
    of Mixtral). Weights that only the bridge has keep their wrapped names, except for plain
    aliases and the zero bias that it adds to every unembedding.
    """
    raw = held_weights(model)
    wrapped = {prefix for name in raw for prefix in _prefixes(name) if WRAPPED in name}
    wrapped = {prefix for prefix in wrapped if f"{prefix}{WRAPPED}" in wrapped}
    own = {name: tensor for name, tensor in raw.items() if not _is_added(name, wrapped)}
    aliases = {id(tensor) for tensor in own.values()}
    added = {name: tensor for name, tensor in raw.items() if id(tensor) not in aliases}
    named = {name.replace(WRAPPED, ""): tensor for name, tensor in own.items()} | added
    return {name: tensor for name, tensor in named.items() if not _is_filler(tensor)}


def held_weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights under their present names; shared ones appear under several."""
    keep_up(model)
    module = model.original_model if isinstance(model, TransformerBridge) else model
    return module.state_dict(keep_vars=True)


def save_checkpoint(model: nn.Module, path: str | Path, **metadata: Any) -> Path:
    """Save a native model (its bridge, or the bare module) and metadata in one file.

    A safetensors file whose header holds the configuration and the metadata as JSON; nothing is
    pickled, and the write is atomic. ``load(path)`` restores the model bit for bit.

    Raises:
        InputError: if the model is not native, its weights were folded, or the metadata is not
            JSON.
        OSError: if the file cannot be written.

    >>> import tempfile
    >>> from lensclust import load
    >>> path = Path(tempfile.mkdtemp()) / "step-3.safetensors"
    >>> model = load("native:sif-small", seed=1)
    >>> read_metadata(save_checkpoint(model, path, step=3, seed=1))["step"]
    3
    >>> fingerprint(load(path)) == fingerprint(model)
    True
    """
    path = Path(path)
    bare = model.original_model if isinstance(model, TransformerBridge) else model
    if not isinstance(bare, NativeModel):
        raise InputError(f"save_checkpoint: {type(bare).__name__} is not a native model")
    if path.suffix != ".safetensors":
        raise InputError(f"save_checkpoint: {str(path)!r} does not end in '.safetensors'")
    weights = {k: t.detach().cpu().contiguous() for k, t in named_weights(model).items()}
    with torch.random.fork_rng(devices=[]):
        expected = NativeModel(bare.cfg).state_dict().keys()
    if set(weights) != set(expected):
        odd = sorted(set(weights) ^ set(expected))
        raise InputError(f"save_checkpoint: folded or edited weights cannot be saved: {odd}")
    config = {**json.loads(config_to_json(bare.cfg)), "dtype": _dtype_name(weights)}
    try:
        content = json.dumps({"config": config, "metadata": metadata}, default=_plain_number)
    except (TypeError, AttributeError) as error:
        raise InputError(f"save_checkpoint: metadata must be JSON: {error}") from error
    save_checksummed(path, HEADER, json.loads(content), weights)
    return path


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata given to :func:`save_checkpoint`.

    Raises:
        InputError: if the file is missing, damaged or not one of our checkpoints.
    """
    return _content(path)[0]["metadata"]


def load_checkpoint(path: str | Path) -> TransformerBridge:
    """The native model in a checkpoint, in eval mode, bit for bit as it was saved.

    Raises:
        InputError: as :func:`read_metadata`, or if weights and configuration disagree.
    """
    path = Path(path)
    content, weights = read_checksummed(path, HEADER)
    config = config_from_json(json.dumps(content.get("config")), where=str(path))
    return native_bridge_with(config, weights, name=str(path))


def checkpoint_config(path: str | Path) -> TransformerBridgeConfig:
    """The configuration of the model in a checkpoint.

    Raises:
        InputError: as :func:`read_metadata`.
    """
    return config_from_json(json.dumps(_content(path)[0]["config"]), where=str(path))


def checkpoint_fingerprint(path: str | Path) -> str:
    """The fingerprint stored in a checkpoint; the weights are not read.

    Raises:
        InputError: as :func:`read_metadata`.
    """
    return _content(path)[1]


def checkpoint_series(folder: str | Path) -> pd.DataFrame:
    """The lensclust checkpoints in a folder by step, with duplicates marked.

    Returns:
        ``step``, ``path``, ``fingerprint`` (that of the loaded model) and ``duplicate_of``: the
        earliest step with the same weights, or missing. Duplicates are logged in one warning:
        the model was not trained between them, or the wrong model was saved.

    Raises:
        InputError: if there is no checkpoint, one is damaged or has no step, or they are of
            several trainings.
    """
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise InputError(f"checkpoint_series: no '*.safetensors' in {str(folder)!r}")
    said = {path: read_metadata(path) for path in paths}
    steps = {path: metadata.get("step") for path, metadata in said.items()}
    trainings = {metadata.get("training") for metadata in said.values()}
    if len(trainings) > 1:
        raise InputError(
            f"checkpoint_series: {str(folder)!r} holds checkpoints of {len(trainings)} trainings, "
            "expected a folder for each"
        )
    without = [path.name for path, step in steps.items() if not isinstance(step, int)]
    if without:
        raise InputError(f"checkpoint_series: {without[0]!r} was saved without a step")
    frame = pd.DataFrame(
        [
            {"step": steps[path], "path": path, "fingerprint": tensors_digest(weights.items())}
            for path in paths
            for _, weights in [read_checksummed(path, HEADER)]
        ]
    ).sort_values("step", ignore_index=True)
    duplicates = report_repeats(
        frame["step"].tolist(), frame["fingerprint"].tolist(), where=str(folder)
    )
    return frame.assign(duplicate_of=pd.array(duplicates, dtype="Int64"))


def report_repeats(
    steps: Sequence[int], fingerprints: Sequence[str], *, where: str
) -> list[int | None]:
    """For each step, in rising order, the earliest with the same weights; logs one warning.

    A warning, not an error, since the other steps remain valid. But a flat stretch of a training
    curve between two identical checkpoints is no evidence that nothing was learned.

    >>> report_repeats([0, 10, 20], ["a", "b", "a"], where="a folder")
    [None, None, 0]
    """
    first: dict[str, int] = {}
    earliest = [
        first.setdefault(digest, step) for step, digest in zip(steps, fingerprints, strict=True)
    ]
    found = [None if e == step else e for e, step in zip(earliest, steps, strict=True)]
    pairs = [f"{step} = {e}" for step, e in zip(steps, found, strict=True) if e is not None]
    if pairs:
        _log.warning("checkpoints in %s: same weights at steps %s", where, ", ".join(pairs))
    return found


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _is_added(name: str, wrapped: set[str]) -> bool:
    """Whether a weight belongs to a child that a wrapper adds to the module it wraps."""
    return any(
        prefix in wrapped and not name.startswith(f"{prefix}{WRAPPED}.")
        for prefix in _prefixes(name)
    )


def _is_filler(tensor: Tensor) -> bool:
    """Whether this is a buffer of zeros, which the bridge adds to an unembedding without bias."""
    return not isinstance(tensor, nn.Parameter) and not bool(tensor.any())


def _dtype_name(weights: Mapping[str, Tensor]) -> str:
    return str(next(iter(weights.values())).dtype).removeprefix("torch.")


def _plain_number(value: Any) -> Any:
    """A numpy or torch scalar as a plain number."""
    return value.item()


def _content(path: str | Path) -> tuple[dict[str, Any], str]:
    """The header of a checkpoint, and the digest of its weights."""
    content, digest = read_content(Path(path), HEADER)
    if not all(isinstance(content.get(name), dict) for name in ("config", "metadata")):
        raise InputError(f"{path}: is not a lensclust checkpoint: no config or no metadata in it")
    return content, digest
