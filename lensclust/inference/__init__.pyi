# Accuracy and loss of a model on the answers of prompts, by split
from .answer_scores import (
    LogitsAt as LogitsAt,
    greedy_texts as greedy_texts,
    score_answers as score_answers,
    split_names as split_names,
)

# Checks that prompts are compatible with a model
from .checks import (
    require_answers as require_answers,
    require_fits as require_fits,
    require_model as require_model,
    require_one_side as require_one_side,
)

# Functions that compute gradients even if the caller has disabled them
from .gradients import with_gradients as with_gradients

# Edits of the state between attention and MLP that reach the residual stream
from .middle_states import require_editable as require_editable

# Partial forwards: changed blocks and requested logits only
from .partial_forwards import FrozenBlocks as FrozenBlocks, scored_logits as scored_logits

# Readouts of the logits at the last token of prompts
from .readouts import (
    Readout as Readout,
    States as States,
    answers as answers,
    answers_with_states as answers_with_states,
    one_a_row as one_a_row,
)

# Asynchronous copies between host and device
from .transfers import HostCopy as HostCopy, arrived as arrived, upload as upload
