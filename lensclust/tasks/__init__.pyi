# Synthetic tasks
from .synthetic.composed import composed as composed
from .synthetic.sif import sif as sif

# Tasks in words
from .words.arithmetic import arithmetic as arithmetic
from .words.composed_words import composed_words as composed_words
from .words.instruction_induction import instruction_induction as instruction_induction
from .words.natural import natural as natural

# Demonstrations in context
from .in_context.icl import icl as icl
from .in_context.linear_regression import linear_regression as linear_regression
from .in_context.prompt_injection import prompt_injection as prompt_injection
from .in_context.questions import Question as Question, few_shot as few_shot
from .in_context.reading_comprehension import reading_comprehension as reading_comprehension

# Labelled texts
from .labelled.classification import classification as classification
from .labelled.label_words import choices as choices
from .labelled.labelled_texts import data_names as data_names, labelled_texts as labelled_texts

# Task sets by name
from .registry import from_name as from_name
