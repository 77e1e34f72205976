"""Placement of a model's weights: on one device, spread over several, or offloaded.

Models that were read with a ``device_map`` are placed by accelerate. Its hooks move states from
device to device, and load offloaded weights from host memory or disk for the calls that need
them; outside those calls, such weights are empty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_protocol import TransformerLensModel
from transformer_lens.utilities.multi_gpu import (
    count_unique_devices,
    find_embedding_device,
    find_misplaced_modules,
    is_mixed_offload_gpu,
)

from lensclust.errors import InputError

DeviceMap = str | Mapping[str, str | int]


def model_device(model: TransformerLensModel) -> torch.device:
    """The device of a model's input tokens."""
    return torch.device(model.cfg.device or "cpu")


def require_placeable(device_map: DeviceMap, *, device: Any, stateful: bool = False) -> None:
    """Refuse a device map that TransformerLens cannot run.

    Raises:
        InputError: if a device is given too, the map leaves weights on ``meta`` or mixes a GPU
            with offloaded weights, or the architecture keeps a recurrent state on one device.
    """
    if device is not None:
        raise InputError(f"load: device={str(device)!r} given with a device_map, expected one")
    if stateful:
        raise InputError("load: device_map: a recurrent state cannot be spread over devices")
    if isinstance(device_map, str):
        return
    if any(str(target).lower() == "meta" for target in device_map.values()):
        raise InputError("load: device_map puts weights on 'meta', where there are none")
    if is_mixed_offload_gpu(device_map.values()):
        raise InputError(
            "load: device_map mixes a GPU with 'cpu' or 'disk', expected GPUs alone, or 'cpu' "
            "and 'disk' alone"
        )


def found_device(name: str | torch.device) -> torch.device:
    """The torch device of a name.

    Raises:
        InputError: if torch knows no such device, or this machine has none.

    >>> found_device("cpu")
    device(type='cpu')
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {str(name)!r}: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise InputError("device 'meta' holds no values, expected cpu, cuda, mps, ...")
    return device


def note_placement(bridge: TransformerBridge) -> TransformerBridge:
    """Set a bridge's input device and its number of devices.

    Raises:
        InputError: if weights are not on the device of the map.
    """
    network: Any = bridge.original_model
    placed = getattr(network, "hf_device_map", None)
    if not placed:
        return bridge
    require_placeable(placed, device=None)
    if misplaced := find_misplaced_modules(network):
        name, wanted, found = misplaced[0]
        raise InputError(
            f"load: device_map puts {name!r} on {wanted}, but it is on {found}; weights that two "
            "modules share must lie on one device"
        )
    device = find_embedding_device(network)
    if device is None or device.type == "meta":  # loaded for each call
        device = torch.device("cpu")
    config: Any = bridge.cfg
    config.device, config.n_devices = str(device), count_unique_devices(network)
    return bridge


def brought_in(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function from a weight to its values, which loads offloaded weights one at a time.

    >>> import lensclust as lc
    >>> model = lc.load("native:sif-small", device="cpu")
    >>> values, weight = brought_in(model), next(model.parameters())
    >>> values(weight) is weight
    True
    """
    kept = cache(lambda: _offloaded(model))

    def values(weight: Tensor) -> Tensor:
        if weight.device.type != "meta":
            return weight
        where, name = kept()[id(weight)]
        return where[name].to(weight.dtype)

    return values


def _offloaded(model: nn.Module) -> dict[int, tuple[Any, str]]:
    """For each offloaded weight: the map that holds it, and its name there."""
    kept: dict[int, tuple[Any, str]] = {}
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for each in (hook, *getattr(hook, "hooks", ())):
            if getattr(each, "weights_map", None) is not None:
                own = dict(module.named_parameters(recurse=False))
                kept |= {id(weight): (each.weights_map, name) for name, weight in own.items()}
    return kept
