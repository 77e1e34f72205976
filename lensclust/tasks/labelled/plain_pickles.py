"""Safe reading of pickles that hold plain values only.

A pickle is a program, and dangerous because it may name functions and classes and call them. Here
every name is refused, so the result consists of lists, tuples, dicts, texts, numbers and None. For
files that others publish in no other form.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from lensclust.errors import InputError

MAX_BYTES = 64_000_000


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler that refuses every global: classes, functions and extensions."""

    def find_class(self, module: str, name: str, /) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, expected plain values only")

    def persistent_load(self, pid: Any, /) -> Any:
        raise pickle.UnpicklingError("it refers to something outside, expected plain values only")


def read_plain_pickle(path: Path) -> Any:
    """The plain value in a pickle file of at most ``MAX_BYTES``.

    Raises:
        InputError: if the file is missing or too large, is no pickle, or names any code.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.pickle"
    >>> _ = path.write_bytes(pickle.dumps([("a", 1)]))
    >>> read_plain_pickle(path)
    [('a', 1)]
    >>> _ = path.write_bytes(pickle.dumps(print))
    >>> read_plain_pickle(path)
    Traceback (most recent call last):
    ...
    lensclust.errors.InputError: ...a.pickle is not usable: it names builtins.print, expected ...
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise InputError(f"{path}: holds {size:,} bytes, expected at most {MAX_BYTES:,}")
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return _PlainUnpickler(io.BytesIO(content)).load()
    except (Exception, MemoryError) as error:  # a damaged pickle may raise nearly anything
        raise InputError(f"{path} is not usable: {error or type(error).__name__}") from None
