# Representational dissimilarity matrices (RDMs) of hypotheses and of states
from .dissimilarity import (
    combine_hypotheses as combine_hypotheses,
    combined as combined,
    hypothesis as hypothesis,
    standardised as standardised,
    with_nuisances as with_nuisances,
)

# Linear CKA: similarity of geometry between sites of one or two models or checkpoints
from .kernel_alignment import CKA as CKA, cka as cka

# Nearest-neighbour accuracy and silhouettes of labels at every site
from .neighbours import nearest_neighbour as nearest_neighbour, silhouettes as silhouettes

# Change points of curves over layers: piecewise least squares, selected by BIC
from .piecewise_fits import PiecewiseFit as PiecewiseFit, change_points as change_points

# Representational similarity analysis (RSA): fit of hypotheses to the RDMs of sites
from .representational import RSA as RSA, rsa as rsa
