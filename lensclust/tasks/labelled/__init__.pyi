# Few-shot classification of labelled texts with one-token labels
from .classification import balanced_order as balanced_order

# Label words: distinct single tokens
from .label_words import choices as choices

# Labelled texts: known sets from a pinned package, others with `datasets`
from .labelled_texts import (
    LabelledTexts as LabelledTexts,
    class_names as class_names,
    data_names as data_names,
)
