"""Common operations on numpy arrays and device tensors, for the products of probes.

Names that numpy and torch share (``einsum``, ``where``, ``linalg.eigh``, ...) are taken from the
`namespace` of an array. States are uploaded in float32, as they are stored, and sums are kept in
float64 on the device, where it has that (Apple's has not: float32 there). Torch is imported only
for a device, so that worker processes start fast.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# A numpy array, or a tensor on a device.
Array = Any


def placed(x: np.ndarray, device: Any = None) -> Array:
    """An array on a device; unchanged without one.

    >>> placed(np.ones(2)), placed(np.ones(2), "cpu")
    (array([1., 1.]), tensor([1., 1.], dtype=torch.float64))
    """
    if device is None:
        return x
    import torch

    from lensclust.inference import upload

    x = x.astype(np.float32) if torch.device(device).type == "mps" and x.dtype.kind == "f" else x
    return upload(torch.from_numpy(np.ascontiguousarray(x)), torch.device(device))


def like(x: np.ndarray, other: Array) -> Array:
    """An array on the device of another."""
    return placed(x, None if isinstance(other, np.ndarray) else other.device)


def wide(x: Array) -> Array:
    """Convert to the precision of sums.

    >>> wide(np.ones(2, np.float32)).dtype, wide(placed(np.ones(2, np.float32), "cpu")).dtype
    (dtype('float64'), torch.float64)
    """
    if isinstance(x, np.ndarray):
        return x.astype(np.float64, copy=False)
    return x.float() if x.device.type == "mps" else x.double()


def zeros(shape: tuple[int, ...], other: Array) -> Array:
    """Zeros of the type and device of another array."""
    return np.zeros(shape, other.dtype) if isinstance(other, np.ndarray) else other.new_zeros(shape)


def host(x: Array) -> np.ndarray:
    """Convert to a numpy array."""
    return x if isinstance(x, np.ndarray) else x.cpu().numpy()


def namespace(x: Array) -> Any:
    """numpy or torch, by the type of an array."""
    if isinstance(x, np.ndarray):
        return np
    import torch

    return torch
