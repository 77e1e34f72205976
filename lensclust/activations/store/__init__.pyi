# What a store says about itself, and the digests by which it notices that it was changed
from .attributes import DONE as DONE
from .attributes import ROW_KEYS as ROW_KEYS

# Reading a store: only what is finished, and nothing that does not match its checksum
from .reading import open_activations as open_activations

# Activations on disk: a zarr group written shard by shard, resumable, appendable, verifiable
from .writing import Destination as Destination
