"""Asynchronous copies between host and device.

Uploads from pinned memory do not wait for the device; downloads into pinned memory run on a
separate stream while the next forwards are launched. On a CPU nothing is copied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Item = TypeVar("Item")


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without waiting for it.

    >>> upload(torch.arange(3), torch.device("cpu")).tolist()
    [0, 1, 2]
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """An asynchronous copy of tensors to the host, after the work queued so far.

    Attributes:
        pending: whether the copy may be unfinished; never true on a CPU.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        # Keeps the sources until the copy is done, so that they are not overwritten.
        self._sources = dict(tensors)
        self._done: Any = None  # an event of the device, while the copy may be unfinished
        device = next(iter(tensors.values())).device
        if device.type != "cuda":
            self._host = {name: tensor.cpu() for name, tensor in tensors.items()}
            return
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._host = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
                    tensor, non_blocking=True
                )
                for name, tensor in tensors.items()
            }
            self._done = stream.record_event()

    @property
    def pending(self) -> bool:
        return self._done is not None

    def values(self) -> dict[str, np.ndarray]:
        """Wait for the copy and return its values."""
        if self._done is not None:
            self._done.synchronize()
        self._done, self._sources = None, {}
        return {name: tensor.numpy() for name, tensor in self._host.items()}


def arrived(
    copies: Iterable[tuple[Item, HostCopy]],
) -> Iterator[tuple[Item, dict[str, np.ndarray]]]:
    """Yield each copy's values in order, after the next copy has been queued.

    A copy that is not pending is yielded at once.

    >>> list(arrived([("a", HostCopy({"x": torch.ones(2)}))]))
    [('a', {'x': array([1., 1.], dtype=float32)})]
    """
    waiting: deque[tuple[Item, HostCopy]] = deque()
    for item, copy in copies:
        waiting.append((item, copy))
        while waiting and (len(waiting) > 1 or not copy.pending):
            first, done = waiting.popleft()
            yield first, done.values()
    while waiting:
        first, done = waiting.popleft()
        yield first, done.values()
