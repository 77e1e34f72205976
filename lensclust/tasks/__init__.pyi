# Few-shot prompts from any task set, without instruction
from .in_context.icl import icl as icl

# Linear regression: points on two lines, and one more point to predict
from .in_context.linear_regression import linear_regression as linear_regression

# Prompt injection: a persona before the question, truthful or deceitful
from .in_context.prompt_injection import prompt_injection as prompt_injection

# Few-shot prompts of questions whose text consists of named pieces
from .in_context.questions import Question as Question, few_shot as few_shot

# Reading comprehension: who does what, with distractor sentences
from .in_context.reading_comprehension import reading_comprehension as reading_comprehension

# Few-shot classification of labelled texts with one-token labels
from .labelled.classification import classification as classification

# Label words: distinct single tokens
from .labelled.label_words import choices as choices

# Labelled texts: known sets from a pinned package, others with `datasets`
from .labelled.labelled_texts import data_names as data_names, labelled_texts as labelled_texts

# Names of task sets, for the command line, without importing the sets
from .names import spelt_names as spelt_names

# Task sets by their names on the command line
from .registry import from_name as from_name

# Tasks of known composition: permutations and maps of short sequences
from .synthetic.composed import composed as composed

# Simplified instruction following: regular expressions as instructions, tables as tasks
from .synthetic.sif import sif as sif

# Arithmetic of one and two steps in words
from .words.arithmetic import arithmetic as arithmetic

# Word tasks in a row: the plural in upper case, the first letter of the opposite,
from .words.composed_words import composed_words as composed_words

# Instruction Induction (Honovich et al. 2022, arXiv 2205.10782), read from a folder
from .words.instruction_induction import instruction_induction as instruction_induction

# Natural-language tasks: 12 word tasks, 6 paraphrases each, 24 shared words
from .words.natural import natural as natural
