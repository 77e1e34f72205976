# Access to a dataset of activations: its sites, one site's values, its labels
from .dataset import (
    VARIABLES as VARIABLES,
    WITHOUT as WITHOUT,
    dataset_kinds as dataset_kinds,
    dataset_sites as dataset_sites,
    head_frame as head_frame,
    head_residual as head_residual,
    label_columns as label_columns,
    label_names as label_names,
    labelled as labelled,
    prompt_labels as prompt_labels,
    require_axes as require_axes,
    select as select,
    site_values as site_values,
    stored_values as stored_values,
    with_labels as with_labels,
)

# Extraction of activations at chosen sites and positions into a labelled xarray dataset
from .extraction import extract as extract

# Activations pooled over a span of tokens: one state per prompt
from .pooling import pooled as pooled

# Extraction on a Ray cluster: replicas of a model, each writing shards
from .ray import extract_with_ray as extract_with_ray

# The dataset that `lensclust.extract` fills: dimensions, labels and provenance
from .skeleton import rectangle as rectangle, template as template

# Reading a store: finished rows only, verified by checksum
from .store.reading import open_activations as open_activations
