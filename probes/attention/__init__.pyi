# Keep the question from looking at some of what came before it, and read the answer
from .knockout import answers_cut_off as answers_cut_off

# Label words as anchors: what flows into the demonstrations' labels, and from them to the answer
from .label_words import LabelWordFlow as LabelWordFlow
from .label_words import label_word_flow as label_word_flow

# Attention ratio: how much more of a model's attention relevant tokens get than irrelevant ones
from .ratio import AttentionRatio as AttentionRatio
from .ratio import attention_ratio as attention_ratio

# Attention patterns of some heads on a few prompts, to be looked at
from .samples import AttentionSamples as AttentionSamples
from .samples import sample_attention as sample_attention
