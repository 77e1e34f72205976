"""Checks of arguments of public functions, by the types in their signatures.

Checked here, for all functions: objects that are not models, prompts or activations, None where it
is not allowed, a single name or number instead of a list, text instead of a number, fractions,
NaN and infinity instead of a whole number, and a model that another thread is using.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np

from lensclust.errors import InputError, check_counts

_Given = ParamSpec("_Given")
_Found = TypeVar("_Found")
_NUMBER: Any = Real
_WHOLE: Any = Integral
_LEAST = {"seed": 0, "shard": 1, "batch_tokens": 1}
MODELS = ("TransformerLensModel", "TransformerBridge")
# Class name -> description of an expected argument.
CLASSES = {
    "Dataset": "activations: the dataset that lensclust.extract(model, prompts, sites) returns",
    "DataFrame": "a pandas frame",
    "Intervention": "what probes.shift, probes.transport and their like make",
    "ComponentLogits": "what probes.decompose returns",
    "AttentionSamples": "what probes.sample_attention returns",
    "Module": "a model",
    "Auxiliary": "a lensclust.training.Auxiliary",
    "Lora": "a lensclust.Lora",
    "ndarray": "an array",
    "Tensor": "a tensor",
}
MEANS = "mean states: the dataset that probes.mean_states(acts) returns"
ELEMENTS = {"str": "texts", "float": "numbers", "int": "whole numbers", "tuple": "pairs"}
# Types that may be None although the name does not say so.
MAY_BE_NONE = ("None", "Any", "Label", "Units", "bool")
# id of a model -> thread, function and number of calls within one another that use it.
_USERS: dict[int, tuple[int, str, int]] = {}
_LOCK = threading.Lock()
# Separators of the types in a union.
_BAR = re.compile(r"\s*\|\s*(?![^\[]*\])")


def checked_arguments(function: Callable[_Given, _Found]) -> Callable[_Given, _Found]:
    """Decorator: check a function's arguments by its signature before it runs.

    One text or number counts as a list of one if only a list is allowed. A ``seed`` must be
    non-negative and have 64 bits, a ``shard`` and a batch must not be empty.

    >>> @checked_arguments
    ... def draw(*, names: Sequence[str] = (), draws: int = 1, share: float = 0.5):
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
    run: Any = function
    uses = [each for each in signature.parameters if named_so[each].is_model]
    # A context manager uses its model until it is left.
    lasting = inspect.isgeneratorfunction(inspect.unwrap(function))

    @functools.wraps(function)
    def checked(*given: _Given.args, **named: _Given.kwargs) -> _Found:
        taken = [each.taken(value) for each, value in zip(wanted, given, strict=False)]
        in_order: Any = (*taken, *given[len(wanted) :])
        by_name: Any = {
            name: named_so[name].taken(value) if name in named_so else value
            for name, value in named.items()
        }
        if not uses:
            return run(*in_order, **by_name)
        model = signature.bind(*in_order, **by_name).arguments.get(uses[0])
        if lasting:
            whole: Any = _alone_within(run(*in_order, **by_name), model, caller)
            return whole
        with _alone_with(model, caller):
            return run(*in_order, **by_name)

    return checked


@contextmanager
def _alone_with(model: Any, caller: str) -> Iterator[None]:
    """Refuse a model that another thread is using: hooks of one would act on the other's forwards.

    Raises:
        InputError: names the function that is using it.
    """
    here = threading.get_ident()
    with _LOCK:
        thread, user, depth = _USERS.get(id(model), (here, caller, 0))
        if thread != here:
            raise InputError(
                f"{caller}: {user} is using this model in another thread, expected one at a time: "
                "put a threading.Lock around both, or load a model for each thread"
            )
        _USERS[id(model)] = thread, user, depth + 1
    try:
        yield
    finally:
        with _LOCK:
            thread, user, depth = _USERS.pop(id(model))
            if depth > 1:
                _USERS[id(model)] = thread, user, depth - 1


@contextmanager
def _alone_within(inner: Any, model: Any, caller: str) -> Iterator[Any]:
    with _alone_with(model, caller), inner as found:
        yield found


def require_hooked(model: Any, *, caller: str) -> None:
    """Refuse an object that is not a hooked model.

    Raises:
        InputError: starts with ``caller``; says what was given and what to do.
    """
    from transformer_lens.model_protocol import TransformerLensModel
    from transformers import PreTrainedModel

    # Models wrapped by peft, and TransformerLens' modules, have some of a model's attributes.
    bare = isinstance(model, PreTrainedModel) or type(model).__module__.startswith("peft.")
    if bare or not isinstance(model, TransformerLensModel):
        raise InputError(f"{caller}: {_instead_of_a_model(model, caller)}")


def _instead_of_a_model(given: Any, caller: str) -> str:
    from transformers import PreTrainedTokenizerBase

    kind = type(given).__name__
    if "Prompts" in _classes(given):
        return f"Prompts given as model: the model comes first, {caller}(model, prompts, ...)"
    if isinstance(given, (str, Path)):
        return (
            f"{str(given)!r} given as model, expected what lensclust.load({str(given)!r}) returns"
        )
    if isinstance(given, PreTrainedTokenizerBase):
        return f"a tokenizer ({kind}) given as model, expected what lensclust.load returns"
    if "Module" in _classes(given):
        return f"a bare {kind} given as model, expected what lensclust.load(model) returns"
    return f"{kind} given as model, expected what lensclust.load returns"


def require_prompts(caller: str, given: Any, *, name: str = "prompts") -> None:
    """Refuse an object that is not `Prompts`; the error says how to make them.

    >>> require_prompts("extract", "What is 2 + 2?")
    Traceback (most recent call last):
    lensclust.errors.InputError: extract: given a str as prompts, expected Prompts such as \
Prompts.from_texts(texts, rows, model.tokenizer)
    """
    if "Prompts" in _classes(given):
        return
    advice = "Prompts such as Prompts.from_texts(texts, rows, model.tokenizer)"
    if "Module" in _classes(given):
        advice = f"Prompts: the model comes first, {caller}(model, prompts, ...)"
    raise InputError(f"{caller}: given a {type(given).__name__} as {name}, expected {advice}")


def numbers(caller: str, what: str, given: Any) -> np.ndarray:
    """Numbers in an array, a tensor or lists, as float64.

    Raises:
        InputError: names the argument, what was given and what was expected.

    >>> numbers("f", "the vector", {1.0})
    Traceback (most recent call last):
    ...
    lensclust.errors.InputError: f: set given as the vector, expected numbers in an array
    """
    if "Tensor" in _classes(given):
        return given.detach().cpu().double().numpy()
    try:
        if not _is_listed(given) or isinstance(given, Set) or not hasattr(given, "__len__"):
            raise TypeError
        return np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(
            f"{caller}: {type(given).__name__} given as {what}, expected numbers in an array"
        ) from None


def pairs(caller: str, series: Any, second: str) -> Iterator[tuple[Any, Any]]:
    """The elements of a series of pairs, such as a step and a model.

    Raises:
        InputError: if it is no series, or an element is no pair.

    >>> list(pairs("f", [(0, "a"), 1], "a model"))
    Traceback (most recent call last):
    ...
    lensclust.errors.InputError: f: a series with a int, expected pairs of a step and a model
    """
    expected = f"expected pairs of a step and {second}"
    if not _is_listed(series):
        raise InputError(f"{caller}: {type(series).__name__} given, {expected}")
    for item in series:
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise InputError(f"{caller}: a series with a {type(item).__name__}, {expected}")
        yield item[0], item[1]


class _Wanted:
    """The allowed types of one parameter."""

    def __init__(self, caller: str, parameter: inspect.Parameter) -> None:
        self.caller, self.name, self.default = caller, parameter.name, parameter.default
        kind = parameter.annotation
        text = kind if isinstance(kind, str) else getattr(kind, "__name__", "Any")
        self.kinds = ["Any"] if kind is inspect.Parameter.empty else _BAR.split(text)
        self.is_model = not {*self.kinds}.isdisjoint(MODELS)
        self.whole = "int" in self.kinds and not {"float", "bool"} & {*self.kinds}

    def taken(self, value: Any) -> Any:
        """The checked argument, as it is passed to the function.

        Raises:
            InputError: if it has none of the allowed types.
        """
        if value is self.default:
            return value
        if isinstance(value, str):
            value = str(value)  # the repr of numpy texts includes their type
        if self.name == "dtype" and "str" in self.kinds:
            value = _dtype_name(value)
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
        if self._fits(value):
            return value
        raise InputError(self._misfit(value))

    def _fits(self, value: Any) -> bool:
        """Whether a value has one of the allowed types, as far as is known here."""
        if value is None:
            return not any(map(_words, self.kinds))
        return _is_one_of(self.kinds, value)

    def _require_run(self, value: Any) -> None:
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


def _is_one_of(kinds: Sequence[str], value: Any) -> bool:
    """Whether a value has one of the types; unknown types allow any value."""
    return any(_is(kind, value) for kind in kinds)


def _is(kind: str, value: Any) -> bool:
    outer, _, inside = kind.partition("[")
    name = outer.rpartition(".")[2]
    if name in CLASSES:
        return name in _classes(value)
    if name not in _TESTS:
        return True
    if not _TESTS[name](value):
        return False
    if name == "tuple":
        each = inside[:-1].split(", ")
        return len(value) == len(each) and all(map(_is, each, value))
    if name == "Sequence" and inside.startswith("str") and hasattr(value, "dtype"):
        # An array of texts, none of numbers.
        return "Tensor" not in _classes(value) and np.asarray(value).dtype.kind in "OUST"
    # In a list of texts, the function itself names the wrong one.
    if (name == "Sequence" or inside.startswith("tuple")) and isinstance(value, (list, tuple)):
        return all(_is_one_of(_BAR.split(inside[:-1]), each) for each in value)
    return True


def _classes(value: Any) -> set[str]:
    return {each.__name__ for each in type(value).__mro__}


def _is_function(value: Any, arguments: int = 0) -> bool:
    """Whether a value is a function, with this number of arguments if it has a signature."""
    if not callable(value) or hasattr(value, "parameters"):  # a model is callable, too
        return False
    try:
        inspect.signature(value).bind(*[None] * arguments)
    except TypeError:
        return not arguments
    except ValueError:  # some C functions have no signature
        return True
    return True


def _dtype_name(given: Any) -> Any:
    """The name of a torch or numpy dtype, such as ``"float16"``; other values unchanged."""
    name = str(given).removeprefix("torch.")
    if type(given).__name__ == "dtype":
        return name
    is_numpy = isinstance(given, type) and given.__module__ == "numpy"
    return given.__name__ if is_numpy else getattr(given, "name", given)


def _is_listed(value: Any) -> bool:
    table = {"DataFrame", "Dataset"} & _classes(value) or isinstance(value, Mapping)
    return hasattr(value, "__iter__") and not isinstance(value, (str, bytes)) and not table


def _words(kind: str) -> str:
    name, _, inside = kind.partition("[")
    element = ELEMENTS.get(re.split(r"\W", inside)[0])
    if name in ("Sequence", "Iterable"):
        return f"a list of {element}" if element else "a list"
    if name == "tuple":
        return f"{inside.count(',') + 1} {element}"
    return CLASSES.get(kind.rpartition(".")[2]) or _WORDS.get(name, "")


_TESTS: dict[str, Callable[[Any], bool]] = {
    "None": lambda value: value is None,
    "str": lambda value: isinstance(value, str),
    "Path": lambda value: hasattr(value, "__fspath__"),
    "int": lambda value: isinstance(value, _WHOLE) or hasattr(value, "__index__"),
    "float": lambda value: isinstance(value, _NUMBER) or hasattr(value, "__float__"),
    "bool": lambda value: isinstance(value, _WHOLE) or type(value).__name__ == "bool_",
    "PreTrainedTokenizerBase": lambda value: _is_function(value) and hasattr(value, "pad_token_id"),
    "Readout": functools.partial(_is_function, arguments=2),
    "Make": functools.partial(_is_function, arguments=2),
    "Moves": functools.partial(_is_function, arguments=2),
    "LossOn": lambda value: isinstance(value, str),
    "SiteSelector": lambda value: (
        isinstance(value, str) or "Site" in _classes(value) or _is_listed(value)
    ),
    "Choices": lambda value: _is_listed(value) or isinstance(value, (str, Mapping)),
    "Units": lambda value: _is_listed(value) or isinstance(value, str),
    "Float": lambda value: not isinstance(value, (str, Mapping)),
    "Vector": lambda value: _is_listed(value) and not any(isinstance(v, str) for v in value),
    "Mapping": lambda value: isinstance(value, Mapping),
    "Sequence": _is_listed,
    "Iterable": _is_listed,
    "tuple": lambda value: _is_listed(value) and hasattr(value, "__len__"),
}
_WORDS = {
    "str": "one text",
    "Path": "a path",
    "int": "a whole number",
    "float": "a number",
    "bool": "True or False",
    "PreTrainedTokenizerBase": "a tokenizer such as model.tokenizer",
    "Readout": "a function of logits (row, vocab) and the numbers of their prompts that gives one "
    "value a row, such as lambda logits, rows: logits[:, 0]",
    "Make": "a function of a site and a strength that makes one",
    "Moves": "a function of source and target that gives a list of interventions, such as "
    "lambda a, b: [probes.shift(means, a, b)]",
    "Mapping": "a dictionary",
    "LossOn": "'all' or 'answer'",
    "Units": "a column, several, one value a row, or 'rows'",
    "Vector": "numbers",
    "Choices": "label -> its token, or a list of texts",
    "SiteSelector": "sites such as 'resid', 'head 3.1' or a list of them",
    "Float": "numbers in an array",
}
