# Forwards over sequences that hold several continuations of one past, side by side
from .forwards import Hooks as Hooks
from .forwards import PackedForwards as PackedForwards
from .forwards import visible as visible

# A trie's groups as tensors that a forward can take, several groups to a forward
from .packing import PackedBatch as PackedBatch

# Which tokens of many prompts have to be computed, in which forwards, and whether that pays
from .plan import Packing as Packing

# A self-check of shared prefixes: prompts that branch, against each of them run alone
from .self_check import FAILURES as FAILURES
from .self_check import States as States
from .self_check import named as named
from .self_check import ordinary_ids as ordinary_ids

# Whether a model can share prefixes, and running prompts that way where it pays
from .sharing import Forward as Forward
from .sharing import PrefixSharing as PrefixSharing
from .sharing import callers_hooks as callers_hooks
from .sharing import log_refusal as log_refusal
from .sharing import obstacle as obstacle
from .sharing import plan_prefixes as plan_prefixes
from .sharing import refusal as refusal
from .sharing import refuse as refuse
from .sharing import summary as summary
