"""Options of the study `icl_representations`, and the names in its tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from studies.study import Study

if TYPE_CHECKING:
    pass


QUESTIONS, WORDS = "questions", "words"
# The tasks of the questions.
READING, LINES, PERSONA = "reading_comprehension", "linear_regression", "prompt_injection"
# Before a query: nothing, demonstrations, or demonstrations with shuffled answers.
NONE, SHOWN, WRONG = "none", "shown", "wrong"


@dataclass(frozen=True)
class Options(Study):
    """Query with and without demonstrations; compare states, attention and answers.

    Three tasks whose answer follows from one part of the text, beside an irrelevant part: who
    does what, points on lines, and the first after a persona that may order to lie. And word
    tasks by instruction, by demonstrations or both.

    Attributes:
        model: anything `lensclust.load` takes, with a tokenizer.
        shots: demonstrations in a prompt that has some.
        names: people in the questions, each with every activity.
        activities: in the questions.
        slopes: of the lines, each with every intercept.
        intercepts: of the lines.
        persona_names: people in the questions with a persona.
        persona_activities: in the questions with a persona.
        templates: number of wordings of a question, from the first.
        word_tasks: tasks over words, by name.
        word_shots: numbers of demonstrations of a word task.
        word_queries: query words of each task.
        vector_shots: demonstrations that task and function vectors are made from.
        top_heads: heads in a function vector.
        layer_stride: stride of the patched layers.
        permutations: permutations of labels or items per score.
    """

    title: ClassVar[str] = "changes of states, attention and answers by demonstrations"
    paper: ClassVar[str] = "Yousefi et al. 2310.00313 (reconstruction and extension)"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {
            "shots": 2,
            "names": 3,
            "activities": 2,
            "slopes": 3,
            "intercepts": 2,
            "persona_names": 2,
            "persona_activities": 2,
            "templates": 1,
            "word_tasks": ("plural", "past", "opposite"),
            "word_shots": (1, 3),
            "word_queries": 3,
            "vector_shots": 3,
            "layer_stride": 10,
            "permutations": 20,
        },
        "default": {},
        "paper": {
            "shots": 4,
            "names": 12,
            "activities": 10,
            "slopes": 8,
            "intercepts": 8,
            "persona_names": 10,
            "persona_activities": 8,
            "templates": 3,
            "word_tasks": (
                *("opposite", "plural", "past", "rhyme", "doer", "french", "spanish", "german"),
                *("russian", "first_letter", "upper_case", "length"),
            ),
            "layer_stride": 1,
            "permutations": 1000,
        },
    }
    cost: ClassVar[Mapping[str, str]] = {
        "smoke": "a minute, after a download of 93 MB",
        "default": "twenty minutes on two cores, after the same download",
        "paper": "hours on a GPU; --model names a model of the source's size",
    }
    default_seeds: ClassVar[int] = 4

    model: str = "smollm2-135m-instruct"
    shots: int = 2
    names: int = 4
    activities: int = 3
    slopes: int = 3
    intercepts: int = 3
    persona_names: int = 2
    persona_activities: int = 2
    templates: int = 2
    word_tasks: tuple[str, ...] = (
        "opposite",
        "plural",
        "past",
        "french",
        "spanish",
        "first_letter",
    )
    word_shots: tuple[int, ...] = (1, 2, 4, 8)
    word_queries: int = 6
    vector_shots: int = 8
    top_heads: int = 10
    layer_stride: int = 3
    permutations: int = 200
