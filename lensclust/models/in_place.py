"""Whether a forward writes into the weights that it runs with, as RWKV's does.

RWKV divides the weights of its deeper blocks at its first forward in eval mode, multiplies them
back in the next one in training mode, and keeps track in an attribute. Two networks that share
such weights would each do so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel


class _Written(Exception):
    pass


class _WritesForbidden(TorchDispatchMode):
    """Raise at the first operation that would change a weight."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.places = {weight.untyped_storage().data_ptr() for weight in weights} - {0}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Any = None,
    ) -> Any:
        schema = func._schema
        if schema.is_mutable:
            for argument, value in zip(schema.arguments, args, strict=False):
                written = argument.alias_info is not None and argument.alias_info.is_write
                if written and isinstance(value, Tensor) and self._is_weight(value):
                    raise _Written
        return func(*args, **(kwargs or {}))

    def _is_weight(self, value: Tensor) -> bool:
        return not value.is_meta and value.untyped_storage().data_ptr() in self.places


def writes_its_weights(network: nn.Module) -> bool:
    """Whether a forward, in eval or in training mode, would change parameters of a network.

    No weight is changed: the forward is stopped before. Buffers, in which some networks count or
    average, are restored.

    Args:
        network: a network of transformers; others, none of which do this, are not run.

    >>> from transformers import RwkvConfig, RwkvForCausalLM
    >>> network = RwkvForCausalLM(RwkvConfig(vocab_size=8, hidden_size=8, num_hidden_layers=7))
    >>> writes_its_weights(network)
    True
    """
    known: Any = network
    if not isinstance(network, PreTrainedModel) or any(p.is_meta for p in network.parameters()):
        return False
    tokens = torch.ones(1, 4, dtype=torch.long, device=known.device)
    modes = [(module, module.training) for module in network.modules()]
    held = [(buffer, buffer.clone()) for buffer in network.buffers() if not buffer.is_meta]
    weights = list(network.parameters())
    try:
        with torch.random.fork_rng(), torch.no_grad():
            for training in (False, True):
                for module, _ in modes:
                    module.training = training
                with _WritesForbidden(weights):
                    network(tokens, use_cache=False)
    except _Written:
        return True
    except Exception:  # a network's code may raise anything; the user sees it in a forward
        return False
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, values in held:
                if not torch.equal(buffer, values):
                    buffer.copy_(values)
    return False
