# Linear regression: points on two lines, and one more point to predict
from .linear_regression import TEMPLATES as TEMPLATES, decoded as decoded

# Few-shot prompts of questions whose text consists of named pieces
from .questions import Question as Question, few_shot as few_shot

# Reading comprehension: who does what, with distractor sentences
from .reading_comprehension import data as data
