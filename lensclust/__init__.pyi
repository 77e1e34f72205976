from . import figures as figures
from . import report as report
from . import tasks as tasks

# Activations
from .activations import (
    extract as extract,
)
from .activations import (
    extract_with_ray as extract_with_ray,
)
from .activations import (
    head_residual as head_residual,
)
from .activations import (
    open_activations as open_activations,
)
from .activations import (
    pooled as pooled,
)

# Claims and errors
from .errors import InputError as InputError
from .inference.prefix_sharing import plan_prefixes as plan_prefixes

# Models
from .models import Site as Site
from .models import fingerprint as fingerprint
from .models import load as load
from .models import release as release

# Prompts with known tasks
from .prompts import Prompts as Prompts
from .results import Claim as Claim

# Training
from .training import Lora as Lora
from .training import finetune as finetune
from .training import train as train
