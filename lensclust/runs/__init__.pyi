# The run directory: layout, locking and checksums of a study's results
from .directory import FILES as FILES
from .directory import PAGE as PAGE
from .directory import View as View
from .directory import check as check
from .directory import machine as machine
from .directory import require_place as require_place
from .directory import seal as seal

# Server of a run directory: progress while it works, then its page
from .server import HOST as HOST
from .server import served as served
