"""Sources of prompts whose task is known, one function a source, each returning ``Prompts``.

Each function has the name of its module and takes its place here: ``tasks.natural`` is the
function, ``from lensclust.tasks.natural import ...`` still reaches the module.
"""

from lensclust.tasks.arithmetic import arithmetic
from lensclust.tasks.classification import classification
from lensclust.tasks.composed import composed
from lensclust.tasks.composed_words import composed_words
from lensclust.tasks.icl import icl
from lensclust.tasks.instruction_induction import instruction_induction
from lensclust.tasks.label_words import choices
from lensclust.tasks.labelled_texts import data_names, labelled_texts
from lensclust.tasks.linear_regression import linear_regression
from lensclust.tasks.names import from_name
from lensclust.tasks.natural import natural
from lensclust.tasks.prompt_injection import prompt_injection
from lensclust.tasks.questions import Question, few_shot
from lensclust.tasks.reading_comprehension import reading_comprehension
from lensclust.tasks.sif import sif

__all__ = [
    "Question",
    "arithmetic",
    "choices",
    "classification",
    "composed",
    "composed_words",
    "data_names",
    "few_shot",
    "from_name",
    "icl",
    "instruction_induction",
    "labelled_texts",
    "linear_regression",
    "natural",
    "prompt_injection",
    "reading_comprehension",
    "sif",
]
