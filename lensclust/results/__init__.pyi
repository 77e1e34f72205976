# Claims of a study, and the rules that decide them from measured values
from .claims import LEVEL as LEVEL
from .claims import Claim as Claim
from .claims import Origin as Origin
from .claims import Verdict as Verdict
from .claims import corrected as corrected
from .claims import decide as decide
from .claims import decide_over_all as decide_over_all
from .claims import shown_by as shown_by
from .statistics import REAL as REAL
from .statistics import ROUNDING as ROUNDING

# Confidence intervals of means and permutation p-values, computed with scipy
from .statistics import Mean as Mean
from .statistics import Scale as Scale
from .statistics import agreement as agreement
from .statistics import correlation as correlation
from .statistics import estimate_of as estimate_of
from .statistics import holm as holm
from .statistics import mean_interval as mean_interval
from .statistics import mean_of as mean_of
from .statistics import permutation_p as permutation_p
from .statistics import q_values as q_values
from .statistics import share as share
