"""One family to be examined: a plain network, our model of a copy, prompts, and plain hooks.

The plain side is a Hugging Face network that was never wrapped, run on one unpadded prompt at a
time, and looked at with torch hooks on its own modules.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

import lensclust as lc
from tests.families.registry import FAMILIES, VOCABULARY, Family, build

LENGTHS = (9, 4, 12, 9, 6, 2)
POSITIONS = ("answer", "word_end")
# Two exact ways to one result, each rounded in single precision.
TOLERANCE = 1e-3

Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Verdict:
    """What a feature is for a family: ``right``, ``refused``, ``none`` (nothing there to read),
    or, which must not be, ``wrong`` or ``error``."""

    kind: str
    reason: str = ""

    @property
    def acceptable(self) -> bool:
        return self.kind not in ("wrong", "error")


class Wrong(AssertionError):
    """What was found is not what plain hooks find."""


class Nothing(Exception):
    """The network has nothing of the kind, so that no feature could read it."""


@dataclass(frozen=True)
class Parts:
    """What a plain forward of one prompt makes, ``(layer or block, token, d)``.

    Attributes:
        resid: what goes into each block, and what comes out of the last.
        middle: per block, the state between attention and MLP; None where there is none.
        z: per block, what goes into the linear module that sums the heads; None without heads.
        heads_out: per block, what comes out of it.
        mlp: per block, what comes out of the MLP where states do not show it.
        logits: of every token.
    """

    resid: list[Tensor]
    middle: list[Tensor | None]
    z: list[Tensor | None]
    heads_out: list[Tensor | None]
    mlp: list[Tensor | None]
    logits: Tensor


@dataclass(frozen=True)
class Subject:
    """A family, wrapped and plain."""

    name: str
    family: Family

    @classmethod
    def of(cls, name: str) -> Subject:
        return cls(name, FAMILIES[name])

    @cached_property
    def network(self) -> PreTrainedModel:
        """The plain network."""
        return build(self.family)

    @cached_property
    def model(self) -> TransformerBridge:
        """Ours, around a copy."""
        return lc.load(self.copied())

    def copied(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        network: Any = copy.deepcopy(self.network)
        return network.to(dtype)

    @cached_property
    def prompts(self) -> lc.Prompts:
        return prompts()

    def lists(self) -> list[list[int]]:
        """The ids of each prompt, without padding."""
        found = self.prompts
        return [
            found.tokens[row, : int(length)].tolist() for row, length in enumerate(found.lengths)
        ]

    def places(self) -> list[list[int]]:
        """For each prompt, the tokens at `POSITIONS`."""
        return torch.stack([self.prompts.position(name) for name in POSITIONS], 1).tolist()

    def stack(self) -> list[nn.Module]:
        """The blocks of the plain network."""
        return list(self.network.get_submodule(self.family.layers).children())

    @property
    def blocks(self) -> range:
        return range(len(self.parts[0].z))

    @cached_property
    def parts(self) -> list[Parts]:
        """Plain forwards, one for each prompt."""
        return [parts(self.network, self.family, ids) for ids in self.lists()]

    def at(self, choose: Callable[[Parts], list[Tensor]]) -> np.ndarray:
        """``(prompt, position, layer or block, d)`` of what is chosen of each plain forward."""
        rows = [
            torch.stack([each[places].float() for each in choose(found)], 1)
            for found, places in zip(self.parts, self.places(), strict=True)
        ]
        return torch.stack(rows).numpy()


def prompts(seed: int = 0) -> lc.Prompts:
    """Prompts of several lengths, with a span and an answer each."""
    rng = np.random.default_rng(seed)
    rows = pd.DataFrame({"task": list("ababab"), "input": list("xxyyzz")})
    return lc.Prompts.from_token_lists(
        [rng.integers(3, VOCABULARY, length).tolist() for length in LENGTHS],
        rows,
        answers=[[int(token)] for token in rng.integers(3, VOCABULARY, len(LENGTHS))],
        spans={"word": [(0, 2)] * len(LENGTHS)},
    )


@torch.no_grad()
def parts(network: PreTrainedModel, family: Family, ids: list[int]) -> Parts:
    """One plain forward, looked at with torch hooks."""
    stacked = network.get_submodule(family.layers)
    into, out, middle, z, heads_out, mlp = ({} for _ in range(6))
    with ExitStack() as hooks:
        for index, block in enumerate(stacked.children()):
            hooks.enter_context(_seen(block, index, into, out))
            between = family.middle if isinstance(family.middle, str) else family.middle[index]
            for path, given, found in (
                ("" if family.parallel else between, middle, {}),
                (family.output, z, heads_out),
                (family.mlp, {}, mlp),
            ):
                module = submodule(block, path)
                if module is not None:
                    hooks.enter_context(_seen(module, index, given, found))
        logits = network(torch.tensor([ids]), use_cache=False).logits
    blocks = range(len(into))
    resid = [into[index][0] for index in blocks] + [out[len(into) - 1][0]]
    return Parts(
        resid,
        [_first(middle.get(index)) for index in blocks],
        [_first(z.get(index)) for index in blocks],
        [_first(heads_out.get(index)) for index in blocks],
        [_first(mlp.get(index)) for index in blocks],
        logits[0],
    )


def submodule(block: nn.Module, path: str) -> nn.Module | None:
    """A block's part by its path, None where this block has none."""
    try:
        return block.get_submodule(path) if path else None
    except AttributeError:
        return None


@contextmanager
def edited(network: PreTrainedModel, family: Family, layer: int, edit: Edit) -> Iterator[None]:
    """Inside, a plain network's residual stream at a layer is ``edit`` of what it was."""
    blocks = list(network.get_submodule(family.layers).children())
    if layer < len(blocks):

        def before(_module: nn.Module, given: Any, named: Any) -> Any:
            if "hidden_states" in named:
                return given, {**named, "hidden_states": edit(named["hidden_states"])}
            return (edit(given[0]), *given[1:]), named

        handle = blocks[layer].register_forward_pre_hook(before, with_kwargs=True)
    else:

        def after(_module: nn.Module, _given: Any, found: Any) -> Any:
            return edit(found) if isinstance(found, Tensor) else (edit(found[0]), *found[1:])

        handle = blocks[-1].register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def require_equal(found: Any, expected: Any, *, what: str, tolerance: float = TOLERANCE) -> None:
    """Vectors along the last axis are equal up to rounding.

    Raises:
        Wrong: with the largest relative difference.
    """
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        raise Wrong(f"{what}: shape {found.shape}, expected {expected.shape}")
    size = np.linalg.norm(expected, axis=-1)
    # A vector that is nearly zero beside the others is not known better than they are.
    floor = np.maximum(size, 1e-3 * size.max(initial=0.0) + 1e-12)
    error = np.linalg.norm(found - expected, axis=-1) / floor
    if not error.size or not error.max() <= tolerance:
        raise Wrong(f"{what}: relative error {error.max(initial=-1.0):.2g}")


def judged(feature: Callable[[Subject], None], subject: Subject) -> Verdict:
    """A feature of a family; a `lensclust.InputError` of one line is a refusal."""
    try:
        feature(subject)
    except Nothing as error:
        return Verdict("none", str(error))
    except lc.InputError as error:
        one_line = "\n" not in str(error) and len(str(error)) < 400
        return Verdict("refused" if one_line else "error", str(error))
    except Wrong as error:
        return Verdict("wrong", str(error))
    except Exception as error:
        return Verdict("error", f"{type(error).__name__}: {error}")
    return Verdict("right")


def row(subject: Subject, features: Mapping[str, Callable[[Subject], None]]) -> dict[str, Verdict]:
    """Feature -> verdict of one family; a family that cannot be loaded is refused throughout."""
    loaded = judged(lambda one: one.model and None, subject)
    if loaded.kind != "right":
        return dict.fromkeys(features, loaded)
    return {name: judged(feature, subject) for name, feature in features.items()}


@contextmanager
def _seen(
    module: nn.Module, index: int, given: dict[int, Tensor], found: dict[int, Tensor]
) -> Iterator[None]:
    def look(_module: nn.Module, args: Any, named: Any, out: Any) -> None:
        given[index] = (args[0] if args else named["hidden_states"]).clone()
        found[index] = (out if isinstance(out, Tensor) else out[0]).clone()

    handle = module.register_forward_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _first(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.reshape(-1, *state.shape[-1:])
