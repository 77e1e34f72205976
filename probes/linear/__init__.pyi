# Linear probes for a label at every site, with nulls and control tasks
from .linear_probe import ProbeSweep as ProbeSweep, probe as probe

# Change of the decodability of a prompt component by demonstrations
from .paired_decoding import (
    PairedDecoding as PairedDecoding,
    decodability as decodability,
    decode as decode,
)
