# Points on two lines, and one more point of one of them to complete
from .linear_regression import TEMPLATES as TEMPLATES
from .linear_regression import decoded as decoded

# Questions whose text is made of named pieces, asked behind none or more worked ones
from .questions import Question as Question
from .questions import few_shot as few_shot

# Who does what: the answer stands in the text, beside a sentence about somebody else
from .reading_comprehension import data as data
