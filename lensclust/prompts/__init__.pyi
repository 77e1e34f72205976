# Labels as text, one spelling for each: what every comparison of labels goes by
from .labels import MISSING as MISSING
from .labels import in_type_of as in_type_of
from .labels import label_text as label_text
from .labels import label_texts as label_texts
from .labels import require_same_prompts as require_same_prompts

# Prompts whose task identity is known: token ids, one tidy frame, named spans, answers
from .prompts import Prompts as Prompts

# From text to token ids: chat templates, BOS exactly once, answers, spans of characters
from .tokenization import continuation as continuation
from .tokenization import encoded as encoded
