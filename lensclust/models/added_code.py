"""Code that a user has put on a network's modules: torch hooks, and replaced methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules import module as _GLOBAL

from lensclust.models.parameters import WRAPPED

# Hooks and methods of these libraries are part of how they run or train a network.
LIBRARIES = {"transformer_lens", "transformers", "accelerate", "torch"}
# Modules of lensclust whose hooks are permanent and act on each token separately.
OWN_HOOKS = {
    "lensclust.models.wrapping",
    "lensclust.models.mended_bridges",
    "lensclust.inference.middle_states",
}


@dataclass(frozen=True)
class AddedCode:
    """A hook on a module, or a function that replaces one of its methods."""

    module: str
    kind: str
    code: Callable[..., Any]

    def __str__(self) -> str:
        return f"{self.kind} on {self.module or 'the network'}"


def added_code(network: nn.Module) -> list[AddedCode]:
    """Torch hooks and replaced methods on a network's modules, except those of libraries.

    >>> network = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    >>> _ = network[0].register_forward_hook(lambda module, given, out: 2 * out)
    >>> network[1].forward = lambda value: value
    >>> [str(each) for each in added_code(network)]
    ['forward hook on 0', 'replaced forward on 1']
    """
    return list(_found(network))


def _found(network: nn.Module) -> Iterator[AddedCode]:
    for kind, hooks in (
        ("forward pre-hook", _GLOBAL._global_forward_pre_hooks),
        ("forward hook", _GLOBAL._global_forward_hooks),
    ):
        for hook in hooks.values():
            if home_of(hook) not in LIBRARIES:
                yield AddedCode("all modules", f"global {kind}", hook)
    for name, module in network.named_modules():
        path = name.replace(WRAPPED, "")
        for kind, hooks in (
            ("forward pre-hook", module._forward_pre_hooks),
            ("forward hook", module._forward_hooks),
        ):
            for hook in hooks.values():
                ours = str(getattr(hook, "__module__", "")) in OWN_HOOKS
                if not ours and home_of(hook) not in LIBRARIES:
                    yield AddedCode(path, kind, hook)
        for key, code in vars(module).items():
            # A forward of transformers may belong to another module.
            libraries = LIBRARIES - {"transformers"} if key == "forward" else LIBRARIES
            if isinstance(code, nn.Module) or not callable(code):
                continue
            if key == "forward" and hasattr(module, "_hf_hook"):
                continue
            if callable(getattr(type(module), key, None)) and home_of(code) not in libraries:
                yield AddedCode(path, f"replaced {key}", code)


def home_of(code: Any) -> str:
    """The package in which a function is defined, whatever its ``__module__`` says."""
    while isinstance(code, partial):
        code = code.func
    scope = getattr(code, "__globals__", {})
    return str(scope.get("__name__") or type(code).__module__).partition(".")[0]
