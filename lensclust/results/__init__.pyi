# Claims of a study, and the rules that decide them from measured values
from .claims import (
    LEVEL as LEVEL,
    Claim as Claim,
    Origin as Origin,
    Verdict as Verdict,
    corrected as corrected,
    decide as decide,
    decide_over_all as decide_over_all,
    shown_by as shown_by,
)
from .statistics import (
    REAL as REAL,
    ROUNDING as ROUNDING,
    Mean as Mean,
    Scale as Scale,
    agreement as agreement,
    correlation as correlation,
    estimate_of as estimate_of,
    holm as holm,
    mean_interval as mean_interval,
    mean_of as mean_of,
    permutation_p as permutation_p,
    q_values as q_values,
    share as share,
)
