# Activation of attention heads by a task: attention times its gradient
from .activation import (
    CONCENTRATION as CONCENTRATION,
    HeadActivation as HeadActivation,
    head_activation as head_activation,
)

# Regress the change of one task's activation pattern on the changes of other tasks
from .composition import (
    Composition as Composition,
    compose as compose,
    compose_patterns as compose_patterns,
)

# Distance of the activation pattern to its first and last, over training steps
from .pattern_changes import (
    PatternChange as PatternChange,
    change as change,
    pattern_change as pattern_change,
)

# Interactive view of heads: scores of all, clusters and attention of the best
from .view import head_view as head_view
