# Ranking sites by attribution patching, checked against exact patches in every run
from .attribution import AttributionCheck as AttributionCheck
from .attribution import rank as rank
from .attribution import rank_sites as rank_sites

# What a patch is measured by: a number read from the logits that answer each pair of prompts
from .metrics import METRICS as METRICS

# Activation patching: put one prompt's state into another prompt and see what the answer does
from .patching import Patching as Patching
from .patching import patch as patch
