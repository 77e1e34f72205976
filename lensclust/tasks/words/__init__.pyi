# Arithmetic of one and two steps in words
from .arithmetic import AFTER as AFTER

# Instruction Induction (Honovich et al. 2022, arXiv 2205.10782), read from a folder
from .instruction_induction import read_folder as read_folder

# Natural-language tasks: 12 word tasks, 6 paraphrases each, 24 shared words
from .natural import lay_out as lay_out, task_names as task_names, words as words
