# Forwards over sequences that pack several continuations of one cached prefix
from .forwards import Hooks as Hooks, PackedForwards as PackedForwards, visible as visible

# Packing of a trie's groups into batches of tensors
from .packing import PackedBatch as PackedBatch

# Plans: which tokens are computed in which forwards, and whether that is cheaper
from .plan import Packing as Packing

# Self-check: branching reference prompts with shared prefixes, against each run alone
from .self_check import (
    FAILURES as FAILURES,
    States as States,
    named as named,
    ordinary_ids as ordinary_ids,
)

# Whether a model can share prefixes, and running prompts that way where it is cheaper
from .sharing import (
    Forward as Forward,
    PrefixSharing as PrefixSharing,
    callers_hooks as callers_hooks,
    log_refusal as log_refusal,
    obstacle as obstacle,
    plan_prefixes as plan_prefixes,
    refusal as refusal,
    refuse as refuse,
    summary as summary,
)
