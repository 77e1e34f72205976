# Arithmetic of one and two steps, asked in words about the same three numbers
from .arithmetic import AFTER as AFTER

# Instruction Induction (Honovich et al. 2022, arXiv 2205.10782), read from its folder
from .instruction_induction import read_folder as read_folder

# Our own natural-language tasks: 12 word tasks, 6 paraphrases each, 24 words shared by all
from .natural import lay_out as lay_out
from .natural import task_names as task_names
from .natural import words as words
