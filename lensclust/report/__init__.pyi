# Attention patterns in a notebook, drawn by CircuitsVis without network access
from .attention import attention_frame as attention_frame

# Pages inside a notebook: a sandboxed frame without network access
from .embed import view_frame as view_frame

# Run directories -> one self-contained page: claims first, then figures, scores, provenance
from .page import write_page as write_page
