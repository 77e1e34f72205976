# Cluster view: prompts as points, by layer and training step
from .clusters import ClusterView as ClusterView
from .heads import (
    MOST_TOKENS as MOST_TOKENS,
    AttentionSample as AttentionSample,
    HeadView as HeadView,
)

# Kinds of interactive views
from .kinds import check_view as check_view
