"""Safetensors files with checksums: checkpoints and training states.

Such a file may be moved alone, so its header holds what `lensclust.storage.integrity` writes beside
other files: JSON with a checksum, ``{"content": ..., "tensors": digest}``, under a key. The header
is verified when it is read, and the tensors when they are. Nothing is pickled, and writes are
atomic.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lensclust.errors import InputError
from lensclust.storage.atomic import parse_json, replacing
from lensclust.storage.integrity import verified, with_checksum


def save_checksummed(
    path: Path, key: str, content: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write tensors and JSON content with checksums to one file.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> save_checksummed(path, "mine", {"step": 3}, {"w": torch.ones(2)})
    >>> read_checksummed(path, "mine")
    ({'step': 3}, {'w': tensor([1., 1.])})
    """
    header = with_checksum({"content": content, "tensors": tensors_digest(tensors.items())})
    # One entry: safetensors writes several in a varying order, so bytes would differ.
    with replacing(path) as partial:
        save_file(dict(tensors), partial, metadata={key: json.dumps(header)})


def read_checksummed(path: Path, key: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read content and tensors and verify their checksums.

    Raises:
        InputError: if the file is missing, damaged or not of lensclust.
    """
    header, tensors = _read(path, key, with_tensors=True)
    if tensors_digest(tensors.items()) != header["tensors"]:
        raise InputError(f"{path}: is damaged: its tensors do not match their checksum")
    return header["content"], tensors


def read_content(path: Path, key: str) -> tuple[dict[str, Any], str]:
    """Read content, and the expected digest of the tensors, which are not read.

    Raises:
        InputError: as :func:`read_checksummed`, except for the tensors.
    """
    header, _ = _read(path, key, with_tensors=False)
    return header["content"], header["tensors"]


def tensors_digest(
    tensors: Iterable[tuple[str, Tensor]], values: Callable[[Tensor], Tensor] = lambda held: held
) -> str:
    """sha256 over names, shapes, dtypes and bytes, in the order of the names.

    Args:
        values: called with each tensor when its bytes are read, to load offloaded ones.
    """
    named = sorted(tensors, key=lambda item: item[0])
    total = hashlib.sha256()
    # hashlib releases the interpreter lock, so tensors are hashed in parallel.
    with ThreadPoolExecutor() as pool:
        contents = pool.map(lambda pair: _content(values(pair[1])), named)
        for (name, tensor), content in zip(named, contents, strict=True):
            entry = [name, list(tensor.shape), str(tensor.dtype), content]
            total.update(json.dumps(entry).encode())
    return total.hexdigest()


def _read(path: Path, key: str, *, with_tensors: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys() if with_tensors else []
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        raise InputError(f"{path}: is not a readable safetensors file: {error}") from error
    if key not in metadata:
        raise InputError(f"{path}: is not a lensclust checkpoint: no {key!r} in its header")
    text = metadata[key]
    if hashlib.sha256(text[65:].encode()).hexdigest() == text[:64]:  # of an earlier version
        header = parse_json(text[65:], str(path))
    else:
        header = verified(parse_json(text, f"{path}: its header"), f"{path}: its header")
    if not isinstance(header, dict) or not isinstance(header.get("content"), dict):
        raise InputError(f"{path}: is not a lensclust checkpoint: its header holds no content")
    return {"tensors": None, **header}, tensors


def _content(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()
