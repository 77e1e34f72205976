# Attributes of a store: provenance, progress and digests
from .attributes import DONE as DONE, ROW_KEYS as ROW_KEYS

# Reading a store: finished rows only, verified by checksum
from .reading import open_activations as open_activations

# Writing a store: shard by shard, with resume, append and checksums
from .writing import Destination as Destination
