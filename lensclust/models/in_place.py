"""Whether a forward writes into the weights that it runs with, as RWKV's does.

RWKV divides the weights of its deeper blocks at its first forward in eval mode, multiplies them
back in the next one in training mode, and keeps track in an attribute. Two networks that share
such weights would each do so.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel


class _Written(BaseException):
    pass


class _WritesForbidden(TorchDispatchMode):
    """Raise at the first operation that would change a weight."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.places = {weight.untyped_storage().data_ptr() for weight in weights} - {0}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            written = value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(each, Tensor) and self._is_weight(each) for each in written):
                raise _Written
        return func(*args, **kwargs)

    def _is_weight(self, value: Tensor) -> bool:
        return not value.is_meta and value.untyped_storage().data_ptr() in self.places


@contextmanager
def _weights_kept(network: nn.Module) -> Iterator[None]:
    """Stop what would write into a network's weights, and keep the random states of torch."""
    weights = list(network.parameters())
    devices = {weight.device for weight in weights if weight.is_cuda}
    with torch.random.fork_rng(devices), _WritesForbidden(weights):
        yield


def tried_copy(network: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy to run forwards on: its parameters share the network's memory, its buffers do not.

    Args:
        memo: what the copy shares beside these, as `copy.deepcopy` takes it.
    """
    apart = {
        id(each): nn.Parameter(each.detach(), each.requires_grad) for each in network.parameters()
    }
    return copy.deepcopy(network, memo | apart)


def writes_its_weights(network: nn.Module, tried: nn.Module) -> bool:
    """Whether forwards, in eval or in training mode, would change a network's weights.

    Nothing of the network is changed to find out: an operation that would write into memory of its
    parameters is stopped, parameters that are given other memory are the copy's, and so are
    buffers. Writes past torch (into ``weight.numpy()``) are not seen.

    Args:
        network: a network of transformers; others do not write, and are not run.
        tried: its `tried_copy`.

    >>> from transformers import RwkvConfig, RwkvForCausalLM
    >>> network = RwkvForCausalLM(RwkvConfig(vocab_size=8, hidden_size=8, num_hidden_layers=7))
    >>> writes_its_weights(network, tried_copy(network, {}))
    True
    """
    try:
        with _weights_kept(network):
            for training in (False, True):
                for module in tried.modules():
                    module.training = training
                run_few(tried)
                if _has_other_weights(tried, network, buffers=not training):
                    return True
    except _Written:
        return True
    return False


def run_few(network: nn.Module, length: int = 4) -> None:
    """A forward over a few tokens, for what it leaves behind; errors show in use."""
    known: Any = network
    if not isinstance(network, PreTrainedModel) or any(p.is_meta for p in network.parameters()):
        return
    tokens = torch.arange(length, device=known.device)[None] % 3 + length % 2
    with suppress(Exception), torch.no_grad():
        known(tokens, use_cache=False)


def run_again(network: nn.Module, tried: nn.Module) -> None:
    """A forward of a `tried_copy` over other tokens, which writes into no weight of the network."""
    tried.eval()
    with suppress(_Written), _weights_kept(network):
        run_few(tried, 7)


def _has_other_weights(tried: nn.Module, network: nn.Module, *, buffers: bool) -> bool:
    own, found = (dict(each.named_parameters(remove_duplicate=False)) for each in (network, tried))
    if own.keys() != found.keys():
        return True
    if any(own[name].data_ptr() != found[name].data_ptr() for name in own):
        return True
    if not buffers:  # what is averaged in training is the network's business
        return False
    kept = network.state_dict(keep_vars=True)
    held = dict(tried.named_buffers(remove_duplicate=False))
    return any(
        not torch.equal(values, held[name])
        for name, values in network.named_buffers(remove_duplicate=False)
        if name in kept and name in held
    )
