# Prompt x prompt dissimilarities: those that a hypothesis says, and those of a site's states
from .dissimilarity import combine_hypotheses as combine_hypotheses
from .dissimilarity import combined as combined
from .dissimilarity import hypothesis as hypothesis
from .dissimilarity import standardised as standardised
from .dissimilarity import with_nuisances as with_nuisances

# Linear CKA: do two sites, of one model, two models or two checkpoints, hold the same geometry?
from .kernel_alignment import CKA as CKA
from .kernel_alignment import cka as cka

# Similarity of states: are a prompt's neighbours, and the states near it, those of its task?
from .neighbours import nearest_neighbour as nearest_neighbour
from .neighbours import silhouettes as silhouettes

# Where does a curve over layers change: least squares in pieces, as few as will do
from .piecewise_fits import PiecewiseFit as PiecewiseFit
from .piecewise_fits import change_points as change_points

# Representational similarity: does a site lay prompts apart as a hypothesis says it should?
from .representational import RSA as RSA
from .representational import rsa as rsa
