# Attention knockout: hide tokens from later ones in chosen blocks and read the answer
from .knockout import answers_cut_off as answers_cut_off

# Label words as anchors: saliency into the demonstrations' labels and to the answer
from .label_words import LabelWordFlow as LabelWordFlow, label_word_flow as label_word_flow

# Attention ratio: attention to relevant tokens relative to irrelevant ones
from .ratio import AttentionRatio as AttentionRatio, attention_ratio as attention_ratio

# Attention patterns of some heads on a few prompts, for inspection
from .samples import AttentionSamples as AttentionSamples, sample_attention as sample_attention
