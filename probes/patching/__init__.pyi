# Rank sites by attribution patching, and check the ranking against exact patches
from .attribution import (
    AttributionCheck as AttributionCheck,
    rank as rank,
    rank_sites as rank_sites,
)

# Metrics of patching: one number per pair of prompts, from the last token's logits
from .metrics import METRICS as METRICS

# Activation patching: replace a prompt's state by another's and measure the answer
from .patching import Patching as Patching, patch as patch
