# Linear probes at every site at once: can a label be read off the activations, by a hyperplane?
from .linear_probe import ProbeSweep as ProbeSweep
from .linear_probe import probe as probe

# Does a component of the prompt become easier to read off the states, with demonstrations?
from .paired_decoding import PairedDecoding as PairedDecoding
from .paired_decoding import decodability as decodability
from .paired_decoding import decode as decode
