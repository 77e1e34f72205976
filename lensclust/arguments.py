"""Arguments of public functions, checked by the kinds that their signatures name.

What is checked alike everywhere is checked here: what is no model, prompts or activations, None
where there is no "none", a single name or number where a list is wanted, text where a number is,
and fractions, NaN and infinity where a whole number is.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

from lensclust.errors import InputError, check_counts

_Given = ParamSpec("_Given")
_Found = TypeVar("_Found")
_NUMBER: Any = Real
_WHOLE: Any = Integral
_LEAST = {"seed": 0, "shard": 1, "batch_tokens": 1}
MODELS = ("TransformerLensModel", "TransformerBridge")
# What an argument has to be, by the name of its class.
CLASSES = {
    "Dataset": "activations: the dataset that lensclust.extract(model, prompts, sites) returns",
    "DataFrame": "a pandas frame",
    "Intervention": "what probes.shift, probes.transport and their like make",
    "ComponentLogits": "what probes.decompose returns",
    "AttentionSamples": "what probes.sample_attention returns",
    "Module": "a model",
}
MEANS = "mean states: the dataset that probes.mean_states(acts) returns"
ELEMENTS = {"str": "texts", "float": "numbers", "int": "whole numbers"}
# What may be None though it does not say so itself.
MAY_BE_NONE = ("None", "Any", "Label", "Units", "bool")
# What is between these is one of the kinds of a union.
_BAR = re.compile(r"\s*\|\s*(?![^\[]*\])")


def checked_arguments(function: Callable[_Given, _Found]) -> Callable[_Given, _Found]:
    """A function whose arguments are checked before it begins, by what its signature says.

    One text or number where only a list of them is wanted counts as a list of one. A ``seed`` is
    not negative and has 64 bits, a ``shard`` and a batch have something in them.

    >>> @checked_arguments
    ... def draw(*, names: "Sequence[str]" = (), draws: "int" = 1, share: "float" = 0.5):
    ...     return names
    >>> draw(names="task")
    ['task']
    >>> draw(draws=2.5)
    Traceback (most recent call last):
    ...
    lensclust.errors.InputError: draw: draws=2.5, expected a whole number
    >>> draw(names=None)
    Traceback (most recent call last):
    ...
    lensclust.errors.InputError: draw: names=None, expected a list of texts
    """
    signature = inspect.signature(function)
    caller = function.__qualname__.rpartition("<locals>.")[2]
    wanted = [_Wanted(caller, each) for each in signature.parameters.values()]
    named_so = {each.name: each for each in wanted}

    @functools.wraps(function)
    def checked(*given: _Given.args, **named: _Given.kwargs) -> _Found:
        taken = [each.taken(value) for each, value in zip(wanted, given, strict=False)]
        in_order: Any = (*taken, *given[len(wanted) :])
        by_name: Any = {
            name: named_so[name].taken(value) if name in named_so else value
            for name, value in named.items()
        }
        return function(*in_order, **by_name)

    return checked


class _Wanted:
    """What one parameter takes."""

    def __init__(self, caller: str, parameter: inspect.Parameter) -> None:
        self.caller, self.name, self.default = caller, parameter.name, parameter.default
        kind = parameter.annotation
        text = kind if isinstance(kind, str) else getattr(kind, "__name__", "Any")
        self.kinds = ["Any"] if kind is inspect.Parameter.empty else _BAR.split(text)
        self.whole = bool(re.search(r"\bint\b", text)) and not re.search(r"\b(float|bool)\b", text)

    def taken(self, value: Any) -> Any:
        """The argument, as the function gets it.

        Raises:
            InputError: if it is of none of the kinds.
        """
        if value is self.default:
            return value
        if value is None and any(kind in MAY_BE_NONE for kind in self.kinds):
            return None
        if any(kind in (*MODELS, "Prompts") for kind in self.kinds):
            self._require_run(value)
            return value
        if self.whole and isinstance(value, _NUMBER):
            self._require_count(value)
            return value
        listed = {kind[9:-1] for kind in self.kinds if kind.startswith("Sequence[")}
        if isinstance(value, str) and "str" not in self.kinds and "str" in listed:
            return [value]
        if isinstance(value, _NUMBER) and listed & {"float | int", "int", "float"}:
            return [value]
        tests = [_test(kind) for kind in self.kinds]
        if value is None or (all(tests) and not any(test(value) for test in tests if test)):
            raise InputError(self._misfit(value))
        return value

    def _require_run(self, value: Any) -> None:
        # They use functions that are checked here.
        from lensclust.fits import require_hooked
        from lensclust.prompts import require_prompts

        if "Prompts" in self.kinds:
            require_prompts(self.caller, value, name=self.name)
        elif len({*self.kinds} - {"None"}) == 1:
            require_hooked(value, caller=self.caller)

    def _require_count(self, value: Any) -> None:
        least = _LEAST.get(self.name, -(sys.maxsize**9))
        check_counts(self.caller, least=least, **{self.name: value})
        if self.name == "seed" and value >= 2**63:
            raise InputError(f"{self.caller}: seed={value}, expected less than 2**63")

    def _misfit(self, value: Any) -> str:
        if value is None and "PreTrainedTokenizerBase" in self.kinds:
            return f"{self.caller}: texts need a tokenizer, given None (a model without one?)"
        plain = value is None or isinstance(value, (str, _NUMBER, list, tuple, dict, set))
        given = f"{self.name}={value!r:.60}"
        if not plain:
            given = f"{type(value).__name__} given as {self.name}"
        kinds = [kind for kind in self.kinds if kind != "int" or "float" not in self.kinds]
        words = [MEANS if self.name == "centroids" else _words(kind) for kind in kinds]
        expected = " or ".join(dict.fromkeys(word for word in words if word))
        return f"{self.caller}: {given}, expected {expected or 'another kind of value'}"


def _test(kind: str) -> Callable[[Any], bool] | None:
    """Whether a value is of a kind; None where that is for the function to find out."""
    name = kind.rpartition(".")[2]
    if name in CLASSES:
        return lambda value: name in {each.__name__ for each in type(value).__mro__}
    return _TESTS.get(kind.partition("[")[0])


def _words(kind: str) -> str:
    name, _, inside = kind.partition("[")
    if name in ("Sequence", "Iterable"):
        element = ELEMENTS.get(re.split(r"\W", inside)[0])
        return f"a list of {element}" if element else "a list"
    return CLASSES.get(kind.rpartition(".")[2]) or _WORDS.get(name, "")


_TESTS: dict[str, Callable[[Any], bool]] = {
    "None": lambda value: value is None,
    "str": lambda value: isinstance(value, str),
    "Path": lambda value: hasattr(value, "__fspath__"),
    "int": lambda value: isinstance(value, _WHOLE) or hasattr(value, "__index__"),
    "float": lambda value: isinstance(value, _NUMBER) or hasattr(value, "__float__"),
    "bool": lambda value: True,
    "PreTrainedTokenizerBase": lambda value: (
        callable(value) and hasattr(value, "pad_token_id") and not hasattr(value, "parameters")
    ),
    "Readout": callable,
    "Make": callable,
    "Moves": callable,
    "Mapping": lambda value: isinstance(value, Mapping),
    "Sequence": lambda value: hasattr(value, "__iter__") and not isinstance(value, (str, bytes)),
    "Iterable": lambda value: hasattr(value, "__iter__") and not isinstance(value, (str, bytes)),
}
_WORDS = {
    "str": "a text",
    "Path": "a path",
    "int": "a whole number",
    "float": "a number",
    "bool": "True or False",
    "PreTrainedTokenizerBase": "a tokenizer such as model.tokenizer",
    "Readout": "a function of logits and the numbers of their prompts",
    "Make": "a function of a site and a strength that makes one",
    "Moves": "a function of source and target that gives a list of interventions, such as "
    "lambda a, b: [probes.shift(means, a, b)]",
    "Mapping": "a dictionary",
    "Choices": "label -> its token, or a list of texts",
    "SiteSelector": "sites such as 'resid', 'head 3.1' or a list of them",
    "Float": "numbers in an array",
}
