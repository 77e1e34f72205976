# Interventions along one direction: between two means, of a probe, or a given vector
from .directions import add_direction as add_direction
from .directions import project as project

# Linear concept erasure of a label (LEACE), and its controls
from .erasure import erase as erase
from .erasure import erase_random as erase_random
from .erasure import erase_reassigned as erase_reassigned

# Function vectors: the summed outputs of a few heads that encode a task
from .function_vectors import FunctionVector as FunctionVector
from .function_vectors import function_vector as function_vector

# Gated interventions: edit only the states that lie in the source task's cluster
from .gating import only_members as only_members
from .gating import only_near as only_near

# Cluster interchange: move states between tasks' clusters and count the answers
from .interchanges import Interchange as Interchange
from .interchanges import Moves as Moves
from .interchanges import first_token as first_token
from .interchanges import interchange as interchange

# Interventions that move states from one task's cluster to another's, with controls
from .interventions import Edit as Edit
from .interventions import Intervention as Intervention
from .interventions import Label as Label
from .interventions import dealt as dealt
from .interventions import replace as replace
from .interventions import shift as shift
from .interventions import states_at as states_at
from .interventions import transport as transport
from .interventions import with_shuffled_labels as with_shuffled_labels

# Linear maps from one label's cluster to another's: state-dependent moves
from .linear_maps import linear_transport as linear_transport

# Apply interventions to a running model, as context managers that remove their hooks
from .steering import Indices as Indices
from .steering import Positions as Positions
from .steering import steer as steer

# Choose the site and strength of an intervention on validation prompts
from .tuning import Tuning as Tuning
from .tuning import tune as tune
