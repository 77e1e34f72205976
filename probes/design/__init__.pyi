# Mean states by label, computed site by site so that activations can stay on disk
from .centroids import Centroids as Centroids, mean_states as mean_states

# Sign-flip test by unit: does a mean change differ from 0, with dependent rows in a unit?
from .flips import flipped_p as flipped_p, smallest_flip_p as smallest_flip_p

# Folds of a probe, and the labellings of its null and control tasks
from .folds import Design as Design, deal as deal, design as design

# Groups of prompts that are scored together, their labels, and means over groups
from .groups import (
    Group as Group,
    against_null as against_null,
    label_groups as label_groups,
    only_renamed as only_renamed,
    require_two_values as require_two_values,
)

# Targets, target answers and donor prompts of interchange interventions
from .pairs import (
    answer_table as answer_table,
    draw_members as draw_members,
    draw_targets as draw_targets,
    first_answers as first_answers,
    prompt_strings as prompt_strings,
)

# Exchangeable units: which rows may exchange labels under the null, from their columns
from .units import (
    COARSE as COARSE,
    INPUT as INPUT,
    ROWS as ROWS,
    TASK as TASK,
    UNEQUAL_ROWS as UNEQUAL_ROWS,
    Exchange as Exchange,
    Units as Units,
    exchangeable as exchangeable,
    nested as nested,
    row_columns as row_columns,
)
