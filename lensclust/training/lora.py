"""Low-rank adapters (LoRA) on the linear maps of a hooked model, made by `peft`.

An adapter adds ``alpha / rank * B A`` to the weight of a linear map, as a parallel path (Hu et al.,
arXiv 2106.09685). The wrapped maps are unchanged, so removing the adapters restores the model bit
for bit; hooks see the sum of the map and its adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.statistics import derive_generator
from transformers.pytorch_utils import Conv1D

from lensclust.errors import InputError
from lensclust.models import model_name

_NAME = "default"


@dataclass(frozen=True)
class Lora:
    """Options of low-rank adapters: which linear maps, and their size.

    Attributes:
        rank: of the matrix that is added to a weight.
        alpha: that matrix is scaled by ``alpha / rank``.
        targets: the maps, by their TransformerLens names, the same in every architecture:
            ``q``, ``k``, ``v`` and ``o`` of attention, ``gate``, ``in`` and ``out`` of the MLP.
        blocks: the blocks with adapters; all by default.
    """

    rank: int = 8
    alpha: int = 16
    targets: Sequence[str] = ("q", "v")
    blocks: Sequence[int] | range | None = None

    def to_json(self) -> dict[str, Any]:
        """The options as plain values."""
        blocks = None if self.blocks is None else list(self.blocks)
        return {**asdict(self), "targets": list(self.targets), "blocks": blocks}


class Adapters:
    """Adapters of one model, inactive outside `on`.

    Attributes:
        parameters: name -> weight of an adapter. B is initialised to zero, so nothing is added.

    >>> import lensclust as lc
    >>> model, tokens = lc.load("native:sif-small"), torch.tensor([[1, 2, 3]])
    >>> adapters = Adapters(model, Lora(rank=2, blocks=[5]))
    >>> list(adapters.parameters)[:2]
    ['blocks.5.attn.q.lora_A', 'blocks.5.attn.q.lora_B']
    >>> before = model(tokens)
    >>> with torch.no_grad():
    ...     _ = adapters.parameters["blocks.5.attn.q.lora_B"].add_(1)
    >>> with adapters.on():
    ...     torch.equal(model(tokens), before)
    False
    >>> torch.equal(model(tokens), before)
    True
    """

    def __init__(
        self, model: TransformerBridge, lora: Lora, *, seed: int = 0, caller: str = "Adapters"
    ) -> None:
        """Make adapters for a model.

        Args:
            seed: of the initial A; the global random state is unchanged.
            caller: function name used in error messages.

        Raises:
            InputError: if `peft` is missing, rank or alpha is below 1, or a target or block
                does not exist.
        """
        if find_spec("peft") is None:
            raise InputError(f"{caller}: lora needs peft: pip install 'lensclust[peft]'")
        if lora.rank < 1:
            raise InputError(f"{caller}: lora rank={lora.rank}, expected at least 1")
        if lora.alpha < 1:
            raise InputError(f"{caller}: lora alpha={lora.alpha}, expected at least 1")
        self._bridges = _targeted(model, lora, caller)
        self._bases = {name: bridge.original_component for name, bridge in self._bridges.items()}
        self._layers = _wrapped(list(self._bases.values()), lora, seed)
        self.parameters: dict[str, nn.Parameter] = {
            f"{name}.{part}": getattr(layer, part)[_NAME].weight
            for name, layer in zip(self._bases, self._layers, strict=True)
            for part in ("lora_A", "lora_B")
        }

    @contextmanager
    def on(self) -> Iterator[None]:
        """Context in which the adapters are active."""
        try:
            for bridge, layer in zip(self._bridges.values(), self._layers, strict=True):
                bridge.set_original_component(layer)
            yield
        finally:
            for bridge, base in zip(self._bridges.values(), self._bases.values(), strict=True):
                bridge.set_original_component(base)

    @property
    def weights(self) -> list[nn.Parameter]:
        """The model's weights that `put_in` changes: those of the adapted maps."""
        return [base.weight for base in self._bases.values()]

    def put_in(self, held: Mapping[str, Tensor]) -> None:
        """Merge adapters with these values into the model's weights.

        The model then needs no adapters, and its weights include them.
        """
        if not held:  # nothing has changed yet
            return
        with torch.no_grad():
            for name, values in held.items():
                self.parameters[name].copy_(values)
            for weight, layer in zip(self.weights, self._layers, strict=True):
                weight.add_(layer.get_delta_weight(_NAME).to(weight))


def _targeted(model: TransformerBridge, lora: Lora, caller: str) -> dict[str, Any]:
    """Name -> the bridge around each linear map that gets an adapter."""
    stacked: Any = model
    n = len(stacked.blocks)
    outside = [block for block in lora.blocks or () if not 0 <= block < n]
    if outside or (lora.blocks is not None and not len(lora.blocks)):
        raise InputError(f"{caller}: lora blocks={lora.blocks}, expected some of 0..{n - 1}")
    maps = {
        f"blocks.{index}.{part}.{name}": bridge
        for index, block in enumerate(stacked.blocks)
        for part in ("attn", "mlp")
        for name, bridge in _linear_maps(getattr(block, part, None)).items()
    }
    there = list(dict.fromkeys(name.rpartition(".")[2] for name in maps))
    unknown = [target for target in lora.targets if target not in there]
    if unknown or not lora.targets or isinstance(lora.targets, str):
        raise InputError(
            f"{caller}: lora targets={lora.targets!r}, but {model_name(model)} has {there}: "
            "expected a list of some of these"
        )
    blocks = range(n) if lora.blocks is None else lora.blocks
    return {
        name: bridge
        for name, bridge in maps.items()
        if name.rpartition(".")[2] in lora.targets and int(name.split(".")[1]) in blocks
    }


def _linear_maps(part: Any) -> dict[str, Any]:
    bridges = getattr(part, "submodules", {})
    found = {
        name: bridge
        for name, bridge in bridges.items()
        if isinstance(getattr(bridge, "original_component", None), (nn.Linear, Conv1D))
    }
    # A joint projection that TransformerLens has split is no longer run.
    return {name: bridge for name, bridge in found.items() if name != "qkv" or "q" not in found}


def _wrapped(bases: list[nn.Module], lora: Lora, seed: int) -> list[Any]:
    from peft import LoraConfig, inject_adapter_in_model

    # In a separate container, so that the model itself does not reference peft.
    holder = nn.ModuleDict({f"map{i}": base for i, base in enumerate(bases)})
    free = [(p, p.requires_grad) for p in holder.parameters()]
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(holder))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft detects the orientation of a weight and warns of it.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        torch.default_generator.manual_seed(derive_generator(seed, "adapters").initial_seed())
        inject_adapter_in_model(config, holder, adapter_name=_NAME)
    for parameter, was_free in free:
        parameter.requires_grad_(was_free)
    return [layer.eval() for layer in holder.values()]
