# How much each attention head is engaged by a task: attention times its gradient
from .activation import CONCENTRATION as CONCENTRATION
from .activation import HeadActivation as HeadActivation
from .activation import head_activation as head_activation

# Is the change of one task's pattern a combination of the changes of others?
from .composition import Composition as Composition
from .composition import compose as compose
from .composition import compose_patterns as compose_patterns

# How far the activation pattern is from where it began and from where it ended, step by step
from .pattern_changes import PatternChange as PatternChange
from .pattern_changes import change as change
from .pattern_changes import pattern_change as pattern_change

# Scores of all heads, and of the best their clusters and attention: made to be looked at
from .view import head_view as head_view
