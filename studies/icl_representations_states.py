"""States and answers of prompts, from one forward."""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import lensclust as lc
from lensclust.readouts import Readout, answers_with_states
from lensclust.sites import hook_name, resolve
from lensclust.templates import template


def states_and_answers(
    model: TransformerBridge, prompts: lc.Prompts, readout: Readout
) -> tuple[xr.Dataset, Float[Tensor, "prompt value"]]:
    """The residual stream at the last token, as `extract` gives it, and what ``readout`` reads.

    Args:
        readout: as in `lensclust.readouts.answers`, a row of numbers a prompt.
    """
    sites = resolve(model, "resid")
    names = [hook_name(model, site) for site in sites]
    found = answers_with_states(
        model,
        prompts,
        lambda logits, rows, states: torch.cat(
            [readout(logits, rows), *(states[name].float() for name in names)], dim=1
        ),
        names,
    )
    width = model.cfg.d_model * len(sites)
    read, states = found[:, :-width], found[:, -width:].unflatten(1, (len(sites), -1))
    acts = template(model, prompts, sites, ["answer"], np.dtype(np.float32))
    resid = (acts["resid"].dims, states[:, None].numpy())
    return acts.assign(resid=resid), read
