from . import figures as figures, report as report, tasks as tasks

# Models
from .models import Site as Site, fingerprint as fingerprint, load as load, release as release

# Prompts whose task is known
from .prompts import Prompts as Prompts

# Activations
from .activations import (
    extract as extract,
    extract_with_ray as extract_with_ray,
    head_residual as head_residual,
    open_activations as open_activations,
    pooled as pooled,
)
from .inference.prefix_sharing import plan_prefixes as plan_prefixes

# Training
from .training import Lora as Lora, finetune as finetune, train as train

# Claims and errors
from .errors import InputError as InputError
from .results import Claim as Claim
