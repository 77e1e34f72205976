# Simplified instruction following: regular expressions as instructions, tables as tasks
from .sif import vocabulary as vocabulary
