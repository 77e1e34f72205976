"""Functions that compute gradients even if the caller has disabled them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from lensclust.errors import InputError
from lensclust.models import model_name

_Given = ParamSpec("_Given")
_Found = TypeVar("_Found")


def with_gradients(function: Callable[_Given, _Found]) -> Callable[_Given, _Found]:
    """Make a function compute gradients even inside ``no_grad`` and ``inference_mode``.

    Raises:
        InputError: from the function, if a model's weights were created inside
            ``inference_mode``: there are no gradients with respect to them, or through them.

    >>> @with_gradients
    ... def slope(x):
    ...     x = x.clone().requires_grad_()
    ...     return torch.autograd.grad(x**2, x)[0].item()
    >>> with torch.inference_mode():
    ...     slope(torch.tensor(3.0))
    6.0
    """

    @functools.wraps(function)
    def run(*given: _Given.args, **named: _Given.kwargs) -> _Found:
        for model in [*given, *named.values()]:
            if isinstance(model, nn.Module) and any(p.is_inference() for p in model.parameters()):
                raise InputError(
                    f"{function.__name__.strip('_')}: the weights of {_name(model)} were made "
                    "inside torch.inference_mode(), so nothing has a gradient: make the model "
                    "outside it"
                )
        with torch.inference_mode(False), torch.enable_grad():
            return function(*given, **named)

    return run


def _name(model: nn.Module) -> str:
    return model_name(model) if hasattr(model, "cfg") else type(model).__name__  # pyright: ignore[reportArgumentType]
