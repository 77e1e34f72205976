# Baselines that use as many labels as reweighting: calibration and prompt selection
from .calibration import calibrate as calibrate
from .calibration import calibrate_many as calibrate_many
from .calibration import select_prompt as select_prompt
from .component_logits import WRITERS as WRITERS

# Label logits by component: how right, how biased and how alike components are
from .component_logits import ComponentLogits as ComponentLogits

# What every component of a model would answer alone: label logits as an exact sum
from .decomposition import decompose as decompose

# A norm as it acts on one state: linear, once its scale is that of the state
from .frozen_norms import exact as exact

# Labels as single tokens: what a classifier made of a language model may answer
from .label_tokens import Choices as Choices

# Weigh components anew from a few labelled prompts, so that the good ones are heard
from .reweighting import Reweighting as Reweighting
from .reweighting import reweight as reweight
from .reweighting import reweight_many as reweight_many
