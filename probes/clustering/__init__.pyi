# Agreement of the partitions of one matrix with a labelling, beside its null
from .agreement import SCALES as SCALES
from .agreement import counted_agreement as counted_agreement
from .agreement import label_silhouettes as label_silhouettes

# What the words alone give away: prompts as bags of tokens, in the shape of activations
from .baselines import bag_of_tokens as bag_of_tokens

# k-means by site: do the states at a layer or head fall into clusters, one for each task?
from .clustering import Clustering as Clustering
from .clustering import cluster as cluster

# States in two dimensions, layer after layer, so that the eye can follow the clusters
from .maps import ClusterMap as ClusterMap
from .maps import cluster_map as cluster_map
from .maps import plane_of as plane_of

# Nearest cluster: to which label's training centroid is a new prompt's state closest?
from .nearest_clusters import membership as membership
