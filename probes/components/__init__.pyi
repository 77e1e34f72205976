# Baselines with as many labels as reweighting: calibration and prompt selection
from .calibration import (
    calibrate as calibrate,
    calibrate_many as calibrate_many,
    select_prompt as select_prompt,
)
from .component_logits import WRITERS as WRITERS, ComponentLogits as ComponentLogits

# Exact decomposition of label logits over a model's components (direct effects)
from .decomposition import decompose as decompose

# Norms with a frozen scale, which makes them linear
from .frozen_norms import exact as exact

# Labels as single tokens: the answers of a language model used as a classifier
from .label_tokens import Choices as Choices

# Reweight a model's components from a few labelled prompts
from .reweighting import (
    Reweighting as Reweighting,
    reweight as reweight,
    reweight_many as reweight_many,
)
