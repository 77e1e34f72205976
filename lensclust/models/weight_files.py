"""Number of tensors and weights in a file, validated against the file's size.

A malicious header of a few bytes may ask for terabytes, or for an endless loop: every count in a
header is compared with the size of its file before a library reads it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from safetensors import safe_open

from lensclust.errors import InputError
from lensclust.storage import read_json

_INDEX = "model.safetensors.index.json"
_SCALARS = {
    GGUFValueType.UINT8: 1,
    GGUFValueType.INT8: 1,
    GGUFValueType.BOOL: 1,
    GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2,
    GGUFValueType.UINT32: 4,
    GGUFValueType.INT32: 4,
    GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8,
    GGUFValueType.INT64: 8,
    GGUFValueType.FLOAT64: 8,
}
_MAX_DIMENSIONS = 8
# Several times as many layers, or experts of one, as any model has.
_MAX_MODULES = 1000


@dataclass(frozen=True)
class Contents:
    """Number of tensors, and of numbers in all of them."""

    tensors: int
    numbers: int


def gguf_contents(path: Path) -> Contents:
    """The contents of a GGUF file of version 2 or 3.

    Raises:
        InputError: if its header is malformed, or announces more than the file holds.
    """
    with path.open("rb") as file:
        header = _Header(path, file)
        if header.bytes(4) != b"GGUF":
            raise header.refusal("not a GGUF file")
        version, tensors, fields = header.number("I"), header.number("Q"), header.number("Q")
        if version not in (2, 3):
            raise header.refusal(f"version {version}, expected 2 or 3")
        for _ in header.counted(fields):
            header.text()
            header.skip_value(header.number("I"))
        numbers = 0
        for _ in header.counted(tensors):
            name, dimensions = header.text(), header.number("I")
            if dimensions > _MAX_DIMENSIONS:
                raise header.refusal(f"tensor {name!r} of {dimensions} dimensions")
            size = math.prod(header.number("Q") for _ in range(dimensions))
            kind, offset = header.kind(GGMLQuantizationType), header.number("Q")
            block, packed = GGML_QUANT_SIZES[kind]
            if offset + size // block * packed > header.size:
                raise header.refusal(f"tensor {name!r} reaches beyond its end")
            numbers += size
    return Contents(tensors, numbers)


def safetensors_contents(folder: Path) -> Contents:
    """The contents of the safetensors files in a model's folder.

    Raises:
        InputError: if one cannot be read, or the index names a file outside the folder.
    """
    index = folder / _INDEX
    names = {path.name for path in folder.glob("*.safetensors")}
    if index.is_file() and not (folder / "model.safetensors").is_file():
        placed = read_json(index, what="load: ")
        placed = placed.get("weight_map") if isinstance(placed, dict) else None
        if not isinstance(placed, dict) or not set(placed.values()) <= names:
            raise InputError(f"load: {index}: expected a weight_map to files beside it")
    tensors = numbers = 0
    for name in sorted(names):
        try:
            with safe_open(folder / name, framework="pt") as file:
                shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
        except Exception as error:  # a malicious header may make the library raise anything
            raise InputError(f"load: {folder / name}: cannot be read: {error}") from error
        tensors, numbers = tensors + len(shapes), numbers + sum(map(math.prod, shapes))
    return Contents(tensors, numbers)


def require_affordable(config: Any, held: Contents, build: Any, *, name: str) -> None:
    """Refuse a configuration that needs far more weights than its files hold.

    Args:
        build: called with the configuration, on the meta device, where tensors take no memory.

    Raises:
        InputError: names the value that is too large.
    """
    counts: Mapping[str, Any] = config.get_text_config().to_dict()
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    for field, value in {**counts, "num_hidden_layers": layers}.items():
        most = held.tensors if field == "num_hidden_layers" else held.numbers
        if field.startswith(("num_", "n_")) and isinstance(value, int) and value > most:
            raise InputError(f"load: {name}: {field}={value}, but its files hold {held}")
    wanted = _weight_count(config, build)
    # Tied or filled-in weights are not in the files; they are never half of all weights.
    if wanted > 2 * held.numbers:
        raise InputError(f"load: {name}: asks for {wanted:,} weights, but its files hold {held}")


def require_buildable(config: Any, build: Any, *, name: str) -> None:
    """Refuse random weights that exceed this machine's memory.

    Args:
        build: as in `require_affordable`.

    Raises:
        InputError: if there are more layers or experts than any model has, or more weights than
            this machine has memory for.
    """
    text = config.get_text_config()
    counts: Mapping[str, Any] = {**config.to_dict(), **text.to_dict()}
    counts |= {"num_hidden_layers": getattr(text, "num_hidden_layers", 0)}
    for field, value in counts.items():
        many = "layer" in field or "expert" in field
        if many and isinstance(value, int) and value > _MAX_MODULES:
            raise InputError(
                f"load: {name}: {field}={value}, expected at most {_MAX_MODULES} for random weights"
            )
    wanted, memory = _weight_count(config, build), psutil.virtual_memory().total
    if 4 * wanted > memory:
        raise InputError(
            f"load: {name}: asks for {wanted:,} random weights, {4 * wanted / 1e9:,.0f} GB, but "
            f"this machine has {memory / 1e9:,.0f} GB of memory"
        )


def _weight_count(config: Any, build: Any) -> int:
    """Number of weights of a configuration."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(config).parameters())


class _Header:
    """Reader of a GGUF header that never reads beyond the end of the file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = path.stat().st_size

    def refusal(self, reason: str) -> InputError:
        return InputError(f"load: {self.path}: not a usable GGUF file: {reason}")

    def bytes(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise self.refusal("its header reaches beyond its end")
        return self.file.read(count)

    def number(self, code: str) -> int:
        return struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}")))[0]

    def counted(self, count: int) -> range:
        """The range of a number of entries, each of which takes at least one byte."""
        if count > self.size - self.file.tell():
            raise self.refusal(f"{count} entries")
        return range(count)

    def text(self) -> str:
        try:
            return self.bytes(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise self.refusal(f"a name that is not UTF-8: {error.reason}") from None

    def kind(self, kinds: Any) -> Any:
        number = self.number("I")
        if number not in set(kinds):
            raise self.refusal(f"{kinds.__name__} {number}")
        return kinds(number)

    def skip_value(self, number: int, depth: int = 0) -> None:
        if number == GGUFValueType.STRING:
            self.bytes(self.number("Q"))
        elif number in _SCALARS:
            self.bytes(_SCALARS[GGUFValueType(number)])
        elif number == GGUFValueType.ARRAY and depth == 0:
            inner, count = self.number("I"), self.number("Q")
            if inner in _SCALARS:
                self.bytes(count * _SCALARS[GGUFValueType(inner)])
            else:
                for _ in self.counted(count):
                    self.skip_value(inner, depth + 1)
        else:
            raise self.refusal(f"value of type {number}")
