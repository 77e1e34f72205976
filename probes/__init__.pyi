# Means of clusters
# Attention
from .attention import (
    AttentionRatio as AttentionRatio,
)
from .attention import (
    AttentionSamples as AttentionSamples,
)
from .attention import (
    LabelWordFlow as LabelWordFlow,
)
from .attention import (
    attention_ratio as attention_ratio,
)
from .attention import (
    label_word_flow as label_word_flow,
)
from .attention import (
    sample_attention as sample_attention,
)
from .clustering import (
    Clustering as Clustering,
)

# Clusters
from .clustering import (
    ClusterMap as ClusterMap,
)
from .clustering import (
    bag_of_tokens as bag_of_tokens,
)
from .clustering import (
    cluster as cluster,
)
from .clustering import (
    cluster_map as cluster_map,
)
from .clustering import (
    membership as membership,
)

# Component decomposition
from .components import (
    ComponentLogits as ComponentLogits,
)
from .components import (
    Reweighting as Reweighting,
)
from .components import (
    calibrate as calibrate,
)
from .components import (
    decompose as decompose,
)
from .components import (
    reweight as reweight,
)
from .components import (
    reweight_many as reweight_many,
)
from .components import (
    select_prompt as select_prompt,
)
from .design import mean_states as mean_states

# Activation patterns of heads
from .heads import (
    Composition as Composition,
)
from .heads import (
    HeadActivation as HeadActivation,
)
from .heads import (
    PatternChange as PatternChange,
)
from .heads import (
    change as change,
)
from .heads import (
    compose as compose,
)
from .heads import (
    compose_patterns as compose_patterns,
)
from .heads import (
    head_activation as head_activation,
)
from .heads import (
    head_view as head_view,
)
from .heads import (
    pattern_change as pattern_change,
)

# Linear probes
from .linear import (
    PairedDecoding as PairedDecoding,
)
from .linear import (
    ProbeSweep as ProbeSweep,
)
from .linear import (
    decodability as decodability,
)
from .linear import (
    decode as decode,
)
from .linear import (
    probe as probe,
)

# Activation patching
from .patching import (
    AttributionCheck as AttributionCheck,
)
from .patching import (
    Patching as Patching,
)
from .patching import (
    patch as patch,
)
from .patching import (
    rank as rank,
)
from .patching import (
    rank_sites as rank_sites,
)

# Geometry: neighbours, RSA, CKA
from .similarity import (
    CKA as CKA,
)
from .similarity import (
    RSA as RSA,
)
from .similarity import (
    PiecewiseFit as PiecewiseFit,
)
from .similarity import (
    change_points as change_points,
)
from .similarity import (
    cka as cka,
)
from .similarity import (
    combine_hypotheses as combine_hypotheses,
)
from .similarity import (
    combined as combined,
)
from .similarity import (
    hypothesis as hypothesis,
)
from .similarity import (
    nearest_neighbour as nearest_neighbour,
)
from .similarity import (
    rsa as rsa,
)
from .similarity import (
    silhouettes as silhouettes,
)
from .similarity import (
    with_nuisances as with_nuisances,
)

# Interventions
from .steering import (
    FunctionVector as FunctionVector,
)
from .steering import (
    Interchange as Interchange,
)
from .steering import (
    Intervention as Intervention,
)
from .steering import (
    Tuning as Tuning,
)
from .steering import (
    add_direction as add_direction,
)
from .steering import (
    dealt as dealt,
)
from .steering import (
    erase as erase,
)
from .steering import (
    erase_random as erase_random,
)
from .steering import (
    erase_reassigned as erase_reassigned,
)
from .steering import (
    function_vector as function_vector,
)
from .steering import (
    interchange as interchange,
)
from .steering import (
    linear_transport as linear_transport,
)
from .steering import (
    project as project,
)
from .steering import (
    replace as replace,
)
from .steering import (
    shift as shift,
)
from .steering import (
    steer as steer,
)
from .steering import (
    transport as transport,
)
from .steering import (
    tune as tune,
)
from .steering import (
    with_shuffled_labels as with_shuffled_labels,
)
