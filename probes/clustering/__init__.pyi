# Agreement of partitions with a labelling, and its permutation null
from .agreement import (
    SCALES as SCALES,
    counted_agreement as counted_agreement,
    label_silhouettes as label_silhouettes,
)

# Bag-of-tokens baseline: prompts' words in the shape of activations
from .baselines import bag_of_tokens as bag_of_tokens

# k-means by site: do states at a layer or head cluster by task?
from .clustering import Clustering as Clustering, cluster as cluster

# Two-dimensional maps of states over layers and training steps
from .maps import ClusterMap as ClusterMap, cluster_map as cluster_map, plane_of as plane_of

# Nearest-centroid classification of new prompts' states by known labels
from .nearest_clusters import membership as membership
