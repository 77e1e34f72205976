"""Tensors in a safetensors file that carries its own digests: checkpoints and training states.

Such a file travels alone, so what `lensclust.storage.integrity` notes beside other files stands in
its
header: sealed JSON ``{"content": ..., "tensors": digest}`` under a key of ours. What the file says
can be trusted after its header was read, and the tensors after they were. Nothing is pickled, and
the file appears whole or not at all.
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
from lensclust.storage.integrity import sealed, unsealed


def save_sealed(
    path: Path, key: str, content: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write tensors and JSON content to one file.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> save_sealed(path, "mine", {"step": 3}, {"w": torch.ones(2)})
    >>> read_sealed(path, "mine")
    ({'step': 3}, {'w': tensor([1., 1.])})
    """
    header = sealed({"content": content, "tensors": tensors_digest(tensors.items())})
    # One entry: safetensors writes several in an order of its own, never the same bytes.
    with replacing(path) as partial:
        save_file(dict(tensors), partial, metadata={key: json.dumps(header)})


def read_sealed(path: Path, key: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Content and tensors, held against their checksums.

    Raises:
        InputError: if the file is missing, damaged or not one of ours.
    """
    header, tensors = _read(path, key, with_tensors=True)
    if tensors_digest(tensors.items()) != header["tensors"]:
        raise InputError(f"{path}: is damaged: its tensors do not match their checksum")
    return header["content"], tensors


def read_content(path: Path, key: str) -> tuple[dict[str, Any], str]:
    """Content, and the digest that the tensors should have; the tensors are not read.

    Raises:
        InputError: as :func:`read_sealed`, but for the tensors.
    """
    header, _ = _read(path, key, with_tensors=False)
    return header["content"], header["tensors"]


def tensors_digest(
    tensors: Iterable[tuple[str, Tensor]], values: Callable[[Tensor], Tensor] = lambda held: held
) -> str:
    """sha256 over names, shapes, dtypes and bytes, in the order of the names.

    Args:
        values: called with each tensor when its bytes are read, for those that lie elsewhere.
    """
    named = sorted(tensors, key=lambda item: item[0])
    total = hashlib.sha256()
    # hashlib lets go of the interpreter lock, so tensors are hashed side by side.
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
        raise InputError(f"{path}: is no readable safetensors file: {error}") from error
    if key not in metadata:
        raise InputError(f"{path}: is not a lensclust checkpoint: no {key!r} in its header")
    text = metadata[key]
    if hashlib.sha256(text[65:].encode()).hexdigest() == text[:64]:  # of an earlier version
        header = parse_json(text[65:], str(path))
    else:
        header = unsealed(parse_json(text, f"{path}: its header"), f"{path}: its header")
    if not isinstance(header, dict) or not isinstance(header.get("content"), dict):
        raise InputError(f"{path}: is not a lensclust checkpoint: its header holds no content")
    return {"tensors": None, **header}, tensors


def _content(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()
