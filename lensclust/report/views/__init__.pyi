# A view of clusters: the prompts as points, by layer and by training step
from .clusters import ClusterView as ClusterView
from .heads import MOST_TOKENS as MOST_TOKENS

# A view of heads: scores of all, and of those that open their clusters and their attention
from .heads import AttentionSample as AttentionSample
from .heads import HeadView as HeadView

# What a page lets its reader explore: data of a picture that the browser draws
from .kinds import check_view as check_view
