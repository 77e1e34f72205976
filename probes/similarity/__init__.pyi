# Representational dissimilarity matrices (RDMs) of hypotheses and of states
from .dissimilarity import combine_hypotheses as combine_hypotheses
from .dissimilarity import combined as combined
from .dissimilarity import hypothesis as hypothesis
from .dissimilarity import standardised as standardised
from .dissimilarity import with_nuisances as with_nuisances

# Linear CKA: similarity of geometry between sites of one or two models or checkpoints
from .kernel_alignment import CKA as CKA
from .kernel_alignment import cka as cka

# Nearest-neighbour accuracy and silhouettes of labels at every site
from .neighbours import nearest_neighbour as nearest_neighbour
from .neighbours import silhouettes as silhouettes

# Change points of curves over layers: piecewise least squares, selected by BIC
from .piecewise_fits import PiecewiseFit as PiecewiseFit
from .piecewise_fits import change_points as change_points

# Representational similarity analysis (RSA): fit of hypotheses to the RDMs of sites
from .representational import RSA as RSA
from .representational import rsa as rsa
