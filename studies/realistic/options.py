"""Options of the study `realistic`, and the names in its tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from studies.study import Study

FOLDER_INPUTS = 10


@dataclass(frozen=True)
class Options(Study):
    """Cluster a pretrained model's states by task, against wording and random weights.

    In the project's own set every input occurs with every task, so states are clustered within
    input. In a folder of instruction_induction inputs differ by task, so prompts are clustered
    in folds that hold each instruction once.

    Attributes:
        model: anything `lensclust.load` takes.
        data: a folder in the layout of instruction_induction; default the project's own set.
        chat: wrap prompts in the model's chat template.
        inputs: inputs of the own set (at most and by default 24), or of each task of a folder
            (by default 10).
        control_inputs: how many of them the random-weights model reads too.
        heads: cluster every head as well as every layer.
        k: clusters; default as many as there are tasks.
        permutations: permuted labellings per score.
    """

    title: ClassVar[str] = "task clusters in a pretrained model, against wording and chance"
    paper: ClassVar[str] = "Wu & Varshney 2402.12151 (reconstruction)"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"inputs": 3, "control_inputs": 2, "heads": False, "permutations": 20},
        "default": {},
        "paper": {"inputs": 24, "control_inputs": 24, "permutations": 1000},
    }
    cost: ClassVar[Mapping[str, str]] = {
        "smoke": "a minute, after a download of 93 MB",
        "default": "five minutes on two cores, after a download of 93 MB",
        "paper": "minutes on a GPU",
    }

    model: str = "smollm2-135m-instruct"
    data: Path | None = None
    chat: bool = False
    inputs: int | None = None
    control_inputs: int = 8
    heads: bool = True
    k: int | None = None
    permutations: int = 100
