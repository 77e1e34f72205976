# Access to a dataset of activations: its sites, one site's values, its labels
from .dataset import VARIABLES as VARIABLES
from .dataset import WITHOUT as WITHOUT
from .dataset import dataset_kinds as dataset_kinds
from .dataset import dataset_sites as dataset_sites
from .dataset import head_frame as head_frame
from .dataset import head_residual as head_residual
from .dataset import label_columns as label_columns
from .dataset import label_names as label_names
from .dataset import labelled as labelled
from .dataset import prompt_labels as prompt_labels
from .dataset import require_axes as require_axes
from .dataset import select as select
from .dataset import site_values as site_values
from .dataset import stored_values as stored_values
from .dataset import with_labels as with_labels

# Extraction of activations at chosen sites and positions into a labelled xarray dataset
from .extraction import extract as extract

# Activations pooled over a span of tokens: one state per prompt
from .pooling import pooled as pooled

# Extraction on a Ray cluster: replicas of a model, each writing shards
from .ray import extract_with_ray as extract_with_ray

# The dataset that `lensclust.extract` fills: dimensions, labels and provenance
from .skeleton import rectangle as rectangle
from .skeleton import template as template

# Reading a store: finished rows only, verified by checksum
from .store.reading import open_activations as open_activations
