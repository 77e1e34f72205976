"""Instruction Induction (Honovich et al. 2022, arXiv 2205.10782), read from a folder.

The instructions of a task were written by different people after seeing examples of it. They
share words ("write the plural", "output the plural"), and most tasks have a distinct kind of
inputs, so wording and input both reveal the task: compare any result on this set with a
bag-of-words clustering of it. `natural` is the set without that confound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.prompts import Prompts
from lensclust.storage import read_json
from lensclust.tasks.words.natural import lay_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAYOUT = "{instruction}\nInput: {input}\nOutput:"
CHAT_LAYOUT = "{instruction}\nInput: {input}"

Pair = tuple[str, str]


@checked_arguments
def instruction_induction(
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str] | None = None,
    instructions: int | None = None,
    inputs: int | None = 4,
    seed: int = 0,
    chat: bool = False,
) -> Prompts:
    """Prompts of every task in a folder: each instruction with a sample of the task's inputs.

    Expected: ``annotations/TASK.json`` with ``{"annotations": [str, ...]}`` and
    ``execute/TASK.json`` with ``{"examples": {"1": {"input": str, "output": str}, ...}}``.
    Two tasks of the original have another format and are read as its authors do:
    ``cause`` and ``effect`` become two numbered sentences in random order, of which the cause
    is to be given; ``items`` become a list whose ``concept`` is to be given.

    All instructions of a task have the same inputs. They are sampled along one random order of
    all inputs, so that tasks over the same words have the same sample.

    Args:
        folder: the folder that holds ``annotations`` and ``execute``.
        tokenizer: a fast tokenizer (spans need character offsets).
        tasks: names of tasks; all in the folder by default.
        instructions: maximum number of instructions of each task, from the first; all by default.
        inputs: maximum number of inputs of each task; None for all.
        seed: of the sample of inputs and of the order of causes and effects.
        chat: wrap each prompt in the tokenizer's chat template.

    Returns:
        Prompts, those of one instruction next to each other, with rows ``task``,
        ``instruction`` (``TASK/2``), ``template`` (``annotation 2``: an index, no shared
        style), ``wording`` (the instruction), ``input``, ``output``, ``split``; spans
        ``instruction`` and ``input``; and the outputs as answers.

    Raises:
        InputError: if the folder or one of a task's two files is missing, a file is not JSON
            (with its line) or not of the expected structure.
    """
    for name, cap in {"instructions": instructions, "inputs": inputs}.items():
        if cap is not None and cap < 1:
            raise InputError(f"instruction_induction: {name}={cap}, expected 1 or more")
    wordings, pairs = read_folder(Path(folder), tasks=tasks, seed=seed)
    rows = pd.DataFrame(
        [
            {
                "task": name,
                "instruction": f"{name}/{index}",
                "template": f"annotation {index}",
                "wording": wording,
                "input": given,
                "output": expected,
                "split": "all",
            }
            for name, sample in _sample(pairs, inputs, np.random.default_rng(seed)).items()
            for index, wording in enumerate(wordings[name][:instructions])
            for given, expected in sample
        ]
    )
    texts, spans = lay_out(
        CHAT_LAYOUT if chat else LAYOUT,
        {"instruction": rows["wording"].tolist(), "input": rows["input"].tolist()},
    )
    answers = [f"{'' if chat else ' '}{output}" for output in rows["output"]]
    return Prompts.from_texts(texts, rows, tokenizer, answers=answers, spans=spans, chat=chat)


def read_folder(
    folder: Path, *, tasks: Sequence[str] | None = None, seed: int = 0
) -> tuple[dict[str, list[str]], dict[str, list[tuple[str, str]]]]:
    """Instructions and (input, output) pairs of every task, before tokenization.

    Raises:
        InputError: as `instruction_induction`.
    """
    names = _task_names(folder, tasks)
    wordings = {name: _annotations(folder / "annotations" / f"{name}.json") for name in names}
    pairs = {
        # Seeded by the name, so that a task does not depend on the other loaded tasks.
        name: _pairs(
            folder / "execute" / f"{name}.json", np.random.default_rng([seed, *name.encode()])
        )
        for name in names
    }
    return wordings, pairs


def _task_names(folder: Path, wanted: Sequence[str] | None) -> list[str]:
    found = {}
    for part in ("annotations", "execute"):
        if not (folder / part).is_dir():
            raise InputError(
                f"instruction_induction: no folder {str(folder / part)!r}, expected "
                f"annotations/TASK.json and execute/TASK.json in {str(folder)!r}"
            )
        found[part] = {path.stem for path in (folder / part).glob("*.json")}
    known = sorted(found["annotations"] | found["execute"])
    if isinstance(wanted, str):
        wanted = [wanted]
    names = known if wanted is None else list(dict.fromkeys(wanted))
    if not names:
        raise InputError(f"instruction_induction: no task in {str(folder)!r}")
    for name in names:
        if name not in known:
            raise InputError(
                f"instruction_induction: no task {name!r} in {str(folder)!r}: "
                f"there are {', '.join(known)}"
            )
        for part, other in (("annotations", "execute"), ("execute", "annotations")):
            if name not in found[part]:
                raise InputError(
                    f"instruction_induction: task {name!r} has {other}/{name}.json but no "
                    f"{part}/{name}.json in {str(folder)!r}, expected both"
                )
    return names


def _annotations(path: Path) -> list[str]:
    annotations = _read(path).get("annotations")
    if not isinstance(annotations, list) or not all(_is_text(text) for text in annotations):
        raise _unexpected(path, '"annotations": a list of texts')
    if not annotations:
        raise _unexpected(path, "at least one annotation")
    return [text.strip() for text in annotations]


def _pairs(path: Path, generator: np.random.Generator) -> list[Pair]:
    """Distinct inputs of a task with their output (the first, if there are several)."""
    examples = _read(path).get("examples")
    if not isinstance(examples, dict) or not examples:
        raise _unexpected(path, '"examples": {"1": {"input": ..., "output": ...}, ...}')
    output_of: dict[str, str] = {}
    for number, example in examples.items():
        reader = _reader(example)
        if reader is None:
            raise _unexpected(path, f'texts "input" and "output" in example {number!r}')
        given, expected = reader(example, generator)
        output_of.setdefault(given, expected)
    return list(output_of.items())


def _plain(example: Mapping[str, Any], _: np.random.Generator) -> Pair:
    return example["input"], example["output"]


def _cause(example: Mapping[str, Any], generator: np.random.Generator) -> Pair:
    sentences = [example["cause"], example["effect"]]
    first, second = generator.permutation(2).tolist()
    return f"Sentence 1: {sentences[first]} Sentence 2: {sentences[second]}", example["cause"]


def _concept(example: Mapping[str, Any], _: np.random.Generator) -> Pair:
    return ", ".join(example["items"]), example["concept"]


_READERS: dict[tuple[str, str], Callable[[Mapping[str, Any], np.random.Generator], Pair]] = {
    ("input", "output"): _plain,
    ("cause", "effect"): _cause,
    ("items", "concept"): _concept,
}


def _reader(
    example: object,
) -> Callable[[Mapping[str, Any], np.random.Generator], Pair] | None:
    if not isinstance(example, dict):
        return None
    for (given, expected), reader in _READERS.items():
        value = example.get(given)
        texts = value if given == "items" and isinstance(value, list) else [value]
        if texts and all(map(_is_text, texts)) and _is_text(example.get(expected)):
            return reader
    return None


def _sample(
    pairs: Mapping[str, list[Pair]], size: int | None, generator: np.random.Generator
) -> dict[str, list[Pair]]:
    if size is None:
        return dict(pairs)
    inputs = sorted({given for of_task in pairs.values() for given, _ in of_task})
    rank = dict(zip(inputs, generator.permutation(len(inputs)).tolist(), strict=True))
    return {
        name: sorted(of_task, key=lambda pair: rank[pair[0]])[:size]
        for name, of_task in pairs.items()
    }


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path, what="instruction_induction: ")
    if not isinstance(content, dict):
        raise _unexpected(path, "an object")
    return content


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _unexpected(path: Path, expected: str) -> InputError:
    return InputError(f"instruction_induction: {path}: expected {expected}")
