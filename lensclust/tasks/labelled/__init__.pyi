# Few-shot classification: labelled texts shown, one text to be labelled by one token
from .classification import balanced_order as balanced_order

# Label words: one token each where the answer is read, no two the same
from .label_words import choices as choices

# Texts with a class each: known sets from a pinned package, others by way of `datasets`
from .labelled_texts import LabelledTexts as LabelledTexts
from .labelled_texts import class_names as class_names
from .labelled_texts import data_names as data_names
