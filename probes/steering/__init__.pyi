# Moves along one direction: of two means, of a probe, or any vector of one's own
from .directions import add_direction as add_direction
from .directions import project as project

# Erase what a linear classifier could tell of a label, and the controls of doing so
from .erasure import erase as erase
from .erasure import erase_random as erase_random
from .erasure import erase_reassigned as erase_reassigned

# Function vectors: what a few heads add to the residual stream, enough to name a task
from .function_vectors import FunctionVector as FunctionVector
from .function_vectors import function_vector as function_vector

# Interventions that act on some states only: those that lie in the cluster they are meant for
from .gating import only_members as only_members
from .gating import only_near as only_near

# Cluster interchange: move states from one task's cluster to another's and count the answers
from .interchanges import Interchange as Interchange
from .interchanges import Moves as Moves
from .interchanges import first_token as first_token
from .interchanges import interchange as interchange

# Ways to move a state from one task's cluster to another's, and their controls
from .interventions import Edit as Edit
from .interventions import Intervention as Intervention
from .interventions import Label as Label
from .interventions import dealt as dealt
from .interventions import replace as replace
from .interventions import shift as shift
from .interventions import states_at as states_at
from .interventions import transport as transport
from .interventions import with_shuffled_labels as with_shuffled_labels

# Linear maps from one label's cluster to another's: moves that depend on where a state lies
from .linear_maps import linear_transport as linear_transport

# Interventions on a running model, as context managers that leave no hook behind
from .steering import Indices as Indices
from .steering import Positions as Positions
from .steering import steer as steer

# Choosing where and how strongly to intervene, on prompts kept for that
from .tuning import Tuning as Tuning
from .tuning import tune as tune
