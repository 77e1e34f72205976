# Activation of attention heads by a task: attention times its gradient
from .activation import CONCENTRATION as CONCENTRATION
from .activation import HeadActivation as HeadActivation
from .activation import head_activation as head_activation

# Regress the change of one task's activation pattern on the changes of other tasks
from .composition import Composition as Composition
from .composition import compose as compose
from .composition import compose_patterns as compose_patterns

# Distance of the activation pattern to its first and last, over training steps
from .pattern_changes import PatternChange as PatternChange
from .pattern_changes import change as change
from .pattern_changes import pattern_change as pattern_change

# Interactive view of heads: scores of all, clusters and attention of the best
from .view import head_view as head_view
