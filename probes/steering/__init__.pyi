# Interventions along one direction: between two means, of a probe, or a given vector
from .directions import add_direction as add_direction, project as project

# Linear concept erasure of a label (LEACE), and its controls
from .erasure import (
    erase as erase,
    erase_random as erase_random,
    erase_reassigned as erase_reassigned,
)

# Function vectors: the summed outputs of a few heads that encode a task
from .function_vectors import FunctionVector as FunctionVector, function_vector as function_vector

# Gated interventions: edit only the states that lie in the source task's cluster
from .gating import only_members as only_members, only_near as only_near

# Cluster interchange: move states between tasks' clusters and count the answers
from .interchanges import (
    Interchange as Interchange,
    Moves as Moves,
    first_token as first_token,
    interchange as interchange,
)

# Interventions that move states from one task's cluster to another's, with controls
from .interventions import (
    Edit as Edit,
    Intervention as Intervention,
    Label as Label,
    dealt as dealt,
    replace as replace,
    shift as shift,
    states_at as states_at,
    transport as transport,
    with_shuffled_labels as with_shuffled_labels,
)

# Linear maps from one label's cluster to another's: state-dependent moves
from .linear_maps import linear_transport as linear_transport

# Apply interventions to a running model, as context managers that remove their hooks
from .steering import Indices as Indices, Positions as Positions, steer as steer

# Choose the site and strength of an intervention on validation prompts
from .tuning import Tuning as Tuning, tune as tune
