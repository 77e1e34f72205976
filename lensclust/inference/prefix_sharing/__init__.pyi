# Forwards over sequences that pack several continuations of one cached prefix
from .forwards import Hooks as Hooks
from .forwards import PackedForwards as PackedForwards
from .forwards import visible as visible

# Packing of a trie's groups into batches of tensors
from .packing import PackedBatch as PackedBatch

# Plans: which tokens are computed in which forwards, and whether that is cheaper
from .plan import Packing as Packing

# Self-check: branching reference prompts with shared prefixes, against each run alone
from .self_check import FAILURES as FAILURES
from .self_check import States as States
from .self_check import named as named
from .self_check import ordinary_ids as ordinary_ids

# Whether a model can share prefixes, and running prompts that way where it is cheaper
from .sharing import Forward as Forward
from .sharing import PrefixSharing as PrefixSharing
from .sharing import callers_hooks as callers_hooks
from .sharing import log_refusal as log_refusal
from .sharing import obstacle as obstacle
from .sharing import plan_prefixes as plan_prefixes
from .sharing import refusal as refusal
from .sharing import refuse as refuse
from .sharing import summary as summary
