"""Hashes and samples of weights, which detect a change without a copy."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch
import xxhash
from jaxtyping import Float, Int
from torch import Tensor

# Values sampled from each weight where comparing all would take too long.
_SAMPLED = 16
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def mark(weight: Tensor) -> bytes | Tensor:
    """The hash of a weight's bytes; on a device its row and column sums, computed asynchronously.

    >>> weight = torch.arange(6.0).reshape(2, 3)
    >>> mark(weight) == mark(weight.clone()), mark(weight) == mark(weight.flip(0))
    (True, False)
    """
    if weight.device.type != "cpu":
        return _margins(weight)
    return xxhash.xxh3_128_digest(weight.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def sampled(weights: Iterable[Tensor]) -> Float[Tensor, "weight value"]:
    """A few evenly spaced values of each weight, on the host; zeros for an empty weight.

    Far cheaper than `mark`, but blind to an edit of other values.

    >>> sampled([torch.zeros(0), torch.arange(100.0)])[:, :3]
    tensor([[ 0.,  0.,  0.],
            [ 0.,  6., 13.]])
    """
    held = [weight.detach() for weight in weights]
    found = torch.zeros(len(held), _SAMPLED, dtype=torch.float32)
    places: dict[torch.device, list[int]] = {}
    for number, weight in enumerate(held):
        if weight.numel() and not weight.is_meta:
            places.setdefault(weight.device, []).append(number)
    for device, numbers in places.items():  # one synchronisation per device
        flat = [held[number].reshape(-1) for number in numbers]
        values = [weight[_spread(weight.numel(), device)].float() for weight in flat]
        found[numbers] = torch.stack(values).cpu()
    return found.nan_to_num()


@lru_cache(maxsize=1024)
def _spread(total: int, device: torch.device) -> Int[Tensor, " value"]:
    return torch.linspace(0, total - 1, _SAMPLED, dtype=torch.float64).long().to(device)


def _margins(weight: Tensor) -> Int[Tensor, " row_and_column"]:
    """Sums of a weight's bits by row and by column: they detect edits and permutations."""
    words = weight.view(_WORDS[weight.element_size()])
    table = words.flatten(1) if words.dim() > 1 else words.reshape(1, -1)
    return torch.cat([table.sum(axis, dtype=table.dtype) for axis in (0, 1)])
