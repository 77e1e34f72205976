# Bars: a measurement against its baselines
from .bar_charts import bars as bars

# Preparation of a tidy frame for a figure: checks, means over seeds, thinning, inlining
from .data import inline as inline, over_seeds as over_seeds, require_columns as require_columns

# Display of results in a notebook: a sentence, a small table and a static figure
from .display import Shown as Shown, as_html as as_html

# Encodings of columns: axes, colours, shapes, tooltips
from .encodings import (
    panel_names as panel_names,
    panels as panels,
    seed_tips as seed_tips,
    tip as tip,
)

# Saving of charts, without browser or network
from .files import (
    render_svg as render_svg,
    save as save,
    specification as specification,
    stack as stack,
)

# Heat maps: one cell per head
from .heat_maps import head_map as head_map

# Lines: a metric by layer or by training step
from .line_charts import curves as curves

# Scatter plots: states in two dimensions
from .scatter_plots import scatter as scatter

# Style of figures: colours, shapes, theme, titles and captions
from .style import (
    NULL_LABEL as NULL_LABEL,
    PALETTE as PALETTE,
    SHAPES as SHAPES,
    Picture as Picture,
    finish as finish,
    how_to_read as how_to_read,
)

# Trade-offs: gain against cost of each method
from .trade_offs import trade_off as trade_off
