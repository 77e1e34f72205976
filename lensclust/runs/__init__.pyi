# The run directory: what a study leaves behind, and the contract everything else reads
from .directory import FILES as FILES
from .directory import PAGE as PAGE
from .directory import View as View
from .directory import check as check
from .directory import machine as machine
from .directory import require_place as require_place
from .directory import seal as seal

# A run directory in the browser while it is being made: what is done, then its page
from .server import HOST as HOST
from .server import served as served
