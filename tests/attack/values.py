"""Library calls with wrong values: each gives a result, or one line that says what is wrong.

``python -m tests.attack.values --tries 500`` draws so many calls and prints what became of them.
A call takes good arguments and puts one or two values of the right kind, but wrong, in the place of
others: of every option of every public function, as their signatures name them.
"""

from __future__ import annotations

import inspect
import re
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from hypothesis import strategies as st

import lensclust as lc
import probes
from lensclust import figures, tasks
from tests.attack import give_many, tries_and_seed
from tests.tiny import byte_tokenizer, hf_model

# Wrong values by the kind of an option, as its annotation names it.
SMALL = [0, -1, -7, 2.5, float("nan"), float("inf"), True]
COUNTS = [*SMALL, 10**6, 2**31, 2**63, 10**30]
NUMBERS = [float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e308, 5e-324, -0.5, 2]
TEXTS = ["", "no such", "\0", "\udc80", "a\nb", "é" * 300, "../..", "resid 99", "task", "\x1b[31m"]
# Of another kind than anything that is taken there.
KINDS = [None, 3, "no such", ["no such"], [3], {"a": 1}, np.str_("no such"), object()]
LISTS = [[], ["no such"], ["task", "task"], [""], ["\udc80"], ["\0", "a"], "no such"]
# More of these is more work, not a mistake; more processes than there are cores is unkind.
COSTLY = {
    *(
        "permutations",
        "steps",
        "draws",
        "resamples",
        "rounds",
        "nulls",
        "n_init",
        "jobs",
        "n_tasks",
    ),
    *("n_inputs", "mappings_per_task", "regexes_per_task", "held_out_regexes", "shots"),
    *("strings_per_regex",),
    *("held_out_inputs", "rows_per_mapping", "n_checkpoints", "checkpoints", "n_moves", "n_maps"),
    *("width", "n_symbols", "test_strings", "inputs_per_string", "names", "activities", "slopes"),
    *("intercepts", "points", "largest", "batch_size", "n_outputs", "n_letters"),
}
# What is no value, starts processes, reaches for the network or writes.
LEFT_OUT = {"out", "store", "device", "device_map", "progress", "resume", "append", "tokenizer"}
LEFT_OUT |= {"trust_remote_code", "loading", "dtype", "evaluate", "lora", "auxiliary", "start_from"}
LEFT_OUT |= {"other", "units", "attention", "donors", "answers", "shared", "loss_on", "wanted"}


@dataclass(frozen=True)
class Call:
    """A public function, good arguments for it, and wrong ones to put in their place."""

    function: Callable[..., Any]
    good: dict[str, Any]
    wrong: dict[str, list[Any]]


@dataclass
class Report:
    """What became of the calls that were tried."""

    tries: int = 0
    results: int = 0
    refused: int = 0
    foreign: list[str] = field(default_factory=list)
    long: list[str] = field(default_factory=list)
    functions: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [
            f"{self.tries} tries of {len(self.functions)} functions: {self.results} results, "
            f"{self.refused} refused in one line, {len(self.foreign)} foreign, "
            f"{len(self.long)} longer than {SECONDS} s"
        ]
        return "\n".join([*lines, *self.foreign, *self.long])


class TookLong(BaseException):
    """A call did not end in time."""


def _where(error: BaseException) -> str:
    """The last line of ours that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if not _ELSEWHERE.search(frame.filename)]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"


def _late(number: int, frame: Any) -> None:
    raise TookLong


# The code of others.
_ELSEWHERE = re.compile(r"site-packages|/lib/python|^<|values.py|errors.py")
SECONDS = 120
N = 24


def activations() -> xr.Dataset:
    rng = np.random.default_rng(0)
    task, word, wording = np.arange(N) % 3, np.arange(N) // 3 % 4, np.arange(N) // 12
    z = rng.normal(0, 1, (N, 1, 1, 2, 8))
    return xr.Dataset(
        {
            "resid": (("prompt", "position", "layer", "d_model"), rng.normal(0, 1, (N, 1, 2, 32))),
            "z": (("prompt", "position", "block", "head", "d_head"), z),
            "head_frame": (("block", "head", "d_head", "rank"), rng.normal(0, 1, (1, 2, 8, 8))),
        },
        {
            "layer": [0, 1],
            "block": [0],
            "head": [0, 1],
            "position": ["answer"],
            "task": ("prompt", np.array(list("abc"), dtype=object)[task]),
            "input": ("prompt", [f"i{i}" for i in word]),
            "template": ("prompt", [f"t{i}" for i in wording]),
            "length": ("prompt", rng.integers(3, 9, N)),
        },
    ).astype("f4")


def some_prompts(first: int = 5) -> lc.Prompts:
    rows = {"task": ["a", "b"] * 4, "input": list("uuvvwwxx"), "label": ["a", "b"] * 4}
    tokens = [[1, first + i % 3, 7 + i // 2, 9] for i in range(8)]
    spans: dict[str, Any] = dict.fromkeys(("relevant", "irrelevant", "label_words"), [(1, 2)] * 8)
    spans["irrelevant"] = [(2, 3)] * 8
    return lc.Prompts.from_token_lists(
        tokens, rows, answers=[[20 + i % 2] for i in range(8)], spans=spans
    )


@cache
def calls() -> tuple[Call, ...]:
    """Every public function with arguments that it takes."""
    acts, prompts, tokenizer = activations(), some_prompts(), byte_tokenizer()
    means = probes.mean_states(acts)
    model = lc.load(hf_model("llama"), device="cpu")
    native = lc.load("native:sif-small", device="cpu")
    components = probes.decompose(model, prompts, {"a": 20, "b": 21}, progress=False)
    heads = probes.head_activation(model, prompts, progress=False)
    points = pd.DataFrame(
        {"layer": [0, 1] * 4, "value": np.arange(8.0), "task": list("aabb") * 2, "seed": [0] * 8}
    ).assign(x=range(8), y=range(8), condition=list("abcdefgh"), block=[0] * 8, head=range(8))
    shown = {"title": "t", "caption": "c"}
    quick = {"permutations": 3}
    work = {"model": model, "prompts": prompts}
    said = {"tokenizer": tokenizer}

    def moves(source: str, target: str) -> list[probes.Intervention]:
        return [probes.shift(means, source, target)]

    source = tasks.natural(tokenizer, tasks=["opposite", "plural"], inputs=6)
    known: dict[Any, dict[str, Any]] = {
        probes.add_direction: {"vectors": np.ones(32)},
        probes.attention_ratio: work | {"draws": 2},
        probes.bag_of_tokens: {"prompts": prompts},
        probes.calibrate: {"components": components},
        probes.change: {"series": [(0, heads), (1, heads)]},
        probes.change_points: {"curves": np.random.default_rng(0).normal(size=(12, 2))},
        probes.cka: {"acts": acts} | quick,
        probes.cluster: {"acts": acts, "jobs": 1, "n_init": 1} | quick,
        probes.cluster_map: {"acts": acts},
        probes.combined: {"hypotheses": [np.eye(3), np.eye(3)]},
        probes.dealt: {"acts": acts},
        probes.decode: {
            **{"without": acts, "with_demonstrations": acts, "target": "input"},
            **{"groups": "template", "folds": 2, "resamples": 3},
        },
        probes.decompose: work | {"choices": {"a": 20, "b": 21}},
        probes.erase: {"acts": acts},
        probes.erase_random: {"acts": acts},
        probes.erase_reassigned: {"acts": acts},
        probes.function_vector: work | {"shuffled": prompts},
        probes.head_activation: work,
        probes.hypothesis: {"rows": acts, "name": "task"},
        probes.interchange: work | {"moves": moves, "sites": "resid 1"},
        probes.label_word_flow: work | {"draws": 2, "choices": {"a": 20, "b": 21}},
        probes.linear_transport: {"acts": acts, "source": "a", "target": "b"},
        probes.mean_states: {"acts": acts},
        probes.membership: {"acts": acts, "known": acts},
        probes.nearest_neighbour: {"acts": acts} | quick,
        probes.patch: {
            **{"model": model, "base": prompts, "source": some_prompts(6), "sites": "resid 1"},
            "resamples": 3,
        },
        probes.probe: {"acts": acts, "folds": 2, "jobs": 1} | quick,
        probes.project: {"centroids": means, "source": "a", "target": "b"},
        probes.rank: {"model": model, "base": prompts, "source": some_prompts(6), "sites": "resid"},
        probes.replace: {"centroids": means, "target": "b"},
        probes.reweight: {"components": components},
        probes.rsa: {"acts": acts, "hypotheses": "task", "nuisance": ["length"]} | quick,
        probes.sample_attention: work,
        probes.shift: {"centroids": means, "source": "a", "target": "b"},
        probes.silhouettes: {"acts": acts} | quick,
        probes.transport: {
            **{"centroids": probes.mean_states(acts, given="input")},
            **{"source": "a", "target": "b"},
        },
        probes.with_nuisances: {"acts": acts, "prompts": prompts.take([i % 8 for i in range(N)])},
        lc.extract: work | {"sites": "resid"},
        lc.finetune: {"model": native, "prompts": prompts, "steps": 1, "checkpoints": 1},
        lc.load: {"source": "native:sif-small"},
        lc.open_activations: {"path": "nowhere"},
        lc.plan_prefixes: work,
        lc.pooled: work | {"sites": "resid", "span": "relevant"},
        lc.train: {"config": "sif-small", "prompts": prompts, "steps": 1, "batch_size": 2},
        lc.Prompts.from_token_lists: {"ids": [[1, 2], [3]], "rows": {"task": ["a", "b"]}},
        lc.Prompts.from_texts: {
            **{"texts": ["a b", "c"], "rows": {"task": ["a", "b"]}, "tokenizer": tokenizer},
        },
        lc.Site: {"kind": "head", "layer": 1, "head": 0},
        lc.Site.parse: {"text": "head 1.0"},
        prompts.position: {"name": "answer"},
        prompts.take: {"indices": [0]},
        tasks.arithmetic: said | {"inputs": 4, "test_inputs": 2},
        tasks.composed: {"strings_per_regex": 8, "test_strings": 2},
        tasks.composed_words: said | {"inputs": 4},
        tasks.from_name: {"name": "sif"},
        tasks.icl: {"source": source, "tokenizer": tokenizer, "shots": 1, "queries": 2},
        tasks.linear_regression: said | {"slopes": 3, "intercepts": 3, "shots": 1},
        tasks.natural: said | {"inputs": 2},
        tasks.prompt_injection: said | {"names": 3, "activities": 3, "shots": 1},
        tasks.reading_comprehension: said | {"names": 3, "activities": 3, "shots": 1},
        tasks.sif: {"n_tasks": 2, "strings_per_regex": 8},
        figures.bars: {"frame": points} | shown,
        figures.curves: {"frame": points, "band": None, "color": "task"} | shown,
        figures.head_map: {"frame": points} | shown,
        figures.scatter: {"frame": points, "facet": None} | shown,
    }
    more: dict[Any, dict[str, list[Any]]] = {
        lc.Prompts.from_token_lists: {
            "ids": [[], [[]], [[1.5]], [[1.0]], [[-1]], [[2**70]], [["1"]], [[None]], [1, 2]],
            "rows": [{}, {"task": []}, {"task": ["a"]}, {"task": ["\udc80", "b"]}],
            "answers": [[], [1], [[1.5], [2]], [[], []], [-1, 2]],
            "spans": [{"x": []}, {"x": [(0, 9)] * 2}, {"": [(0.5, 1)] * 2}, {"x": [(1, 0)] * 2}],
            "texts": [[], ["\udc80", "b"], ["a"]],
        },
        lc.Prompts.from_texts: {
            "texts": [[], [""], ["", ""], ["\udc80", "a"], ["\0", "\0"]],
            "answers": [[], [""], ["", ""], ["\udc80", "a"]],
            "spans": [{"x": [(0, 99)] * 2}, {"x": [(-1, 1)] * 2}, {"x": []}],
        },
        lc.train: {"config": TEXTS},
        prompts.take: {"indices": [[], [99], [-99], [0.5], [float("nan")], ["a"], [[0]], [True]]},
        probes.change_points: {"curves": [np.zeros((0, 1)), np.full((9, 1), np.nan)]},
        probes.combined: {"hypotheses": [[], [np.eye(2), np.eye(3)]]},
        probes.add_direction: {"vectors": [np.zeros(0), np.full(3, np.nan), np.ones((2, 2)), {}]},
        probes.interchange: {"sites": LISTS, "rounds": [0, -1]},
        probes.patch: {"sites": LISTS},
        probes.rank: {"sites": LISTS},
        lc.extract: {"sites": LISTS},
        lc.pooled: {"sites": LISTS},
        lc.Site.parse: {"text": ["resid -1", "head 1", "head 1.x", "resid 1e9", "mlp_out nan"]},
        tasks.sif: {"lengths": [(0, 0), (5, 2), (-1, 3), (1, 10**6)]},
        tasks.composed: {"pairs": [(), ((0, 99),), ((-1, 0),), ((0, 0), (0, 0))]},
    }
    return tuple(Call(f, good, options(f, good) | more.get(f, {})) for f, good in known.items())


def options(function: Callable[..., Any], good: dict[str, Any]) -> dict[str, list[Any]]:
    """Wrong values of each option: wrong texts and numbers, and other kinds of values."""
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in LEFT_OUT and name not in ("self", "cls"):
            found[name] = KINDS
        given = good.get(name, "")
        if not isinstance(given, (str, int, float)) and name not in ("nuisance", "tasks"):
            continue
        kind = str(parameter.annotation)
        values: list[Any] = []
        if "Sequence[str]" in kind:
            values += LISTS
        if "str" in kind and "Dataset" not in kind:
            values += TEXTS
        if "int" in kind and "Mapping" not in kind and not re.search("tuple|Sequence.float", kind):
            values += SMALL if name in COSTLY else COUNTS
        if "float" in kind and "Sequence" not in kind and "Float" not in kind:
            values += NUMBERS
        if "Sequence[float" in kind:
            values += [[], [float("nan")], [-1.0], [0.0], [float("inf"), 1.0], [1.0, 1.0]]
        if "Sequence[int]" in kind:
            values += [[], [0, 0], [-1], [2.5]]
        if name == "seed":
            values = [-1, 2**32, 2**64, 2.5, float("nan"), 10**30]
        if values and name not in LEFT_OUT:
            found[name] = values + KINDS
    return found


def drawn() -> st.SearchStrategy[tuple[Call, dict[str, Any]]]:
    """A call, and its arguments with one or two of them wrong."""

    def arguments(call: Call) -> st.SearchStrategy[tuple[Call, dict[str, Any]]]:
        one = st.sampled_from(sorted(call.wrong)).flatmap(
            lambda name: st.tuples(st.just(name), st.sampled_from(call.wrong[name]))
        )
        return st.lists(one, min_size=1, max_size=2).map(
            lambda made: (call, call.good | dict(made))
        )

    return st.sampled_from([call for call in calls() if call.wrong]).flatmap(arguments)


def attack(tries: int, *, seed: int = 0) -> Report:
    """Draw calls and make them; nothing escapes but what the report tells."""
    report = Report()
    signal.signal(signal.SIGALRM, _late)

    def make(chosen: tuple[Call, dict[str, Any]]) -> None:
        call, arguments = chosen
        parameters = inspect.signature(call.function).parameters
        if "progress" in parameters:
            arguments = arguments | {"progress": False}
        name = getattr(call.function, "__qualname__", str(call.function))
        changed = {
            key: value for key, value in arguments.items() if call.good.get(key, _NONE) is not value
        }
        report.tries += 1
        report.functions[name] += 1
        signal.alarm(SECONDS)
        try:
            with redirect_stderr(StringIO()):
                call.function(**arguments)
            report.results += 1
        except lc.InputError as error:
            report.refused += 1
            if len(str(error).splitlines()) != 1:
                report.foreign.append(f"{name}({changed!r:.200}): lines: {error!r:.200}")
        except TookLong as error:
            report.long.append(f"{name}({changed!r:.200}) ({_where(error)})")
            print("long:", report.long[-1], flush=True)
        except Exception as error:
            said = f"{type(error).__name__}: {error!s:.120} ({_where(error)})"
            report.foreign.append(f"{name}({changed!r:.200}): {said}")
            print("foreign:", report.foreign[-1], flush=True)
        finally:
            signal.alarm(0)

    give_many(drawn(), make, tries=tries, seed=seed)
    return report


_NONE = object()


def main() -> int:
    options = tries_and_seed(__doc__)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    report = attack(**options)
    print(report)
    return 1 if report.foreign or report.long else 0


if __name__ == "__main__":
    sys.exit(main())
