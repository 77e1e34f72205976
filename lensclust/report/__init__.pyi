# Attention patterns in a notebook, by CircuitsVis: nothing is asked of anybody
from .attention import attention_frame as attention_frame

# Pages inside a notebook: a frame that runs our scripts and can fetch nothing
from .embed import view_frame as view_frame

# Run directories -> one self-contained page: claims first, then figures, scores, provenance
from .page import write_page as write_page
