# Cluster view: prompts as points, by layer and training step
from .clusters import ClusterView as ClusterView
from .heads import MOST_TOKENS as MOST_TOKENS

# Head view: scores of all heads, clusters and attention of selected ones
from .heads import AttentionSample as AttentionSample
from .heads import HeadView as HeadView

# Kinds of interactive views
from .kinds import check_view as check_view
