"""Sources of prompts whose task is known, one function a source, each returning ``Prompts``.

Each function has the name of its module and takes its place here: ``tasks.natural`` is the
function, ``from lensclust.tasks.natural import ...`` still reaches the module.
"""

from lensclust.tasks.in_context.icl import icl
from lensclust.tasks.in_context.linear_regression import linear_regression
from lensclust.tasks.in_context.prompt_injection import prompt_injection
from lensclust.tasks.in_context.questions import Question, few_shot
from lensclust.tasks.in_context.reading_comprehension import reading_comprehension
from lensclust.tasks.labelled.classification import classification
from lensclust.tasks.labelled.label_words import choices
from lensclust.tasks.labelled.labelled_texts import data_names, labelled_texts
from lensclust.tasks.registry import from_name
from lensclust.tasks.synthetic.composed import composed
from lensclust.tasks.synthetic.sif import sif
from lensclust.tasks.words.arithmetic import arithmetic
from lensclust.tasks.words.composed_words import composed_words
from lensclust.tasks.words.instruction_induction import instruction_induction
from lensclust.tasks.words.natural import natural

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
