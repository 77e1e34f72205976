# Mean states by label, computed site by site so that activations can stay on disk
from .centroids import Centroids as Centroids
from .centroids import mean_states as mean_states

# Sign-flip test by unit: does a mean change differ from 0, with dependent rows in a unit?
from .flips import flipped_p as flipped_p
from .flips import smallest_flip_p as smallest_flip_p

# Folds of a probe, and the labellings of its null and control tasks
from .folds import Design as Design
from .folds import deal as deal
from .folds import design as design

# Groups of prompts that are scored together, their labels, and means over groups
from .groups import Group as Group
from .groups import against_null as against_null
from .groups import label_groups as label_groups
from .groups import only_renamed as only_renamed
from .groups import require_two_values as require_two_values

# Targets, target answers and donor prompts of interchange interventions
from .pairs import answer_table as answer_table
from .pairs import draw_members as draw_members
from .pairs import draw_targets as draw_targets
from .pairs import first_answers as first_answers
from .pairs import prompt_strings as prompt_strings

# Exchangeable units: which rows may exchange labels under the null, from their columns
from .units import COARSE as COARSE
from .units import INPUT as INPUT
from .units import ROWS as ROWS
from .units import TASK as TASK
from .units import UNEQUAL_ROWS as UNEQUAL_ROWS
from .units import Exchange as Exchange
from .units import Units as Units
from .units import exchangeable as exchangeable
from .units import nested as nested
from .units import row_columns as row_columns
