# Few-shot prompts from any task set: the task is shown by examples, not told
from .in_context.icl import icl as icl

# Points on two lines, and one more point of one of them to complete
from .in_context.linear_regression import linear_regression as linear_regression

# A persona before the question: none, truthful, truthful and then deceitful, or deceitful
from .in_context.prompt_injection import prompt_injection as prompt_injection

# Questions whose text is made of named pieces, asked behind none or more worked ones
from .in_context.questions import Question as Question
from .in_context.questions import few_shot as few_shot

# Who does what: the answer stands in the text, beside a sentence about somebody else
from .in_context.reading_comprehension import reading_comprehension as reading_comprehension

# Few-shot classification: labelled texts shown, one text to be labelled by one token
from .labelled.classification import classification as classification

# Label words: one token each where the answer is read, no two the same
from .labelled.label_words import choices as choices

# Texts with a class each: known sets from a pinned package, others by way of `datasets`
from .labelled.labelled_texts import data_names as data_names
from .labelled.labelled_texts import labelled_texts as labelled_texts

# Names of task sets, for the command line, which lists them without importing what makes them
from .names import spelt_names as spelt_names

# Task sets by name, as the command line writes them
from .registry import from_name as from_name

# Tasks of known composition: moves and maps of short sequences, and maps after moves
from .synthetic.composed import composed as composed

# Simplified instruction following: regular expressions as instructions, tables as tasks
from .synthetic.sif import sif as sif

# Arithmetic of one and two steps, asked in words about the same three numbers
from .words.arithmetic import arithmetic as arithmetic

# Word tasks in a row: the plural in upper case, the first letter of the opposite,
from .words.composed_words import composed_words as composed_words

# Instruction Induction (Honovich et al. 2022, arXiv 2205.10782), read from its folder
from .words.instruction_induction import instruction_induction as instruction_induction

# Our own natural-language tasks: 12 word tasks, 6 paraphrases each, 24 words shared by all
from .words.natural import natural as natural
