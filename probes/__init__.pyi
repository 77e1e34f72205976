# Means of clusters
from .design import mean_states as mean_states

# Clusters
from .clustering import (
    ClusterMap as ClusterMap,
    Clustering as Clustering,
    bag_of_tokens as bag_of_tokens,
    cluster as cluster,
    cluster_map as cluster_map,
    membership as membership,
)

# Linear probes
from .linear import (
    PairedDecoding as PairedDecoding,
    ProbeSweep as ProbeSweep,
    decode as decode,
    decodability as decodability,
    probe as probe,
)

# Geometry: neighbours, RSA, CKA
from .similarity import (
    CKA as CKA,
    RSA as RSA,
    PiecewiseFit as PiecewiseFit,
    change_points as change_points,
    cka as cka,
    combined as combined,
    combine_hypotheses as combine_hypotheses,
    hypothesis as hypothesis,
    nearest_neighbour as nearest_neighbour,
    rsa as rsa,
    silhouettes as silhouettes,
    with_nuisances as with_nuisances,
)

# Activation patching
from .patching import (
    AttributionCheck as AttributionCheck,
    Patching as Patching,
    patch as patch,
    rank as rank,
    rank_sites as rank_sites,
)

# Interventions
from .steering import (
    FunctionVector as FunctionVector,
    Interchange as Interchange,
    Intervention as Intervention,
    Tuning as Tuning,
    add_direction as add_direction,
    dealt as dealt,
    with_shuffled_labels as with_shuffled_labels,
    erase as erase,
    erase_random as erase_random,
    erase_reassigned as erase_reassigned,
    function_vector as function_vector,
    interchange as interchange,
    linear_transport as linear_transport,
    project as project,
    replace as replace,
    shift as shift,
    steer as steer,
    transport as transport,
    tune as tune,
)

# Component decomposition
from .components import (
    ComponentLogits as ComponentLogits,
    Reweighting as Reweighting,
    calibrate as calibrate,
    decompose as decompose,
    reweight as reweight,
    reweight_many as reweight_many,
    select_prompt as select_prompt,
)

# Attention
from .attention import (
    AttentionRatio as AttentionRatio,
    AttentionSamples as AttentionSamples,
    LabelWordFlow as LabelWordFlow,
    attention_ratio as attention_ratio,
    label_word_flow as label_word_flow,
    sample_attention as sample_attention,
)

# Activation patterns of heads
from .heads import (
    Composition as Composition,
    HeadActivation as HeadActivation,
    PatternChange as PatternChange,
    change as change,
    pattern_change as pattern_change,
    compose as compose,
    compose_patterns as compose_patterns,
    head_activation as head_activation,
    head_view as head_view,
)
