# Canonical text of labels, used in every comparison of labels
from .labels import (
    MISSING as MISSING,
    in_type_of as in_type_of,
    label_text as label_text,
    label_texts as label_texts,
    require_same_prompts as require_same_prompts,
)

# Prompts with known tasks: token ids, one tidy frame of labels, named spans, answers
from .prompts import Prompts as Prompts

# Tokenization: chat templates, BOS exactly once, answers, character spans
from .tokenization import continuation as continuation, encoded as encoded
