# The run directory: layout, locking and checksums of a study's results
from .directory import (
    FILES as FILES,
    PAGE as PAGE,
    View as View,
    check as check,
    machine as machine,
    require_place as require_place,
    seal as seal,
)

# Server of a run directory: progress while it works, then its page
from .server import HOST as HOST, served as served
