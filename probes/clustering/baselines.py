"""Bag-of-tokens baseline: prompts' words in the shape of activations."""

from __future__ import annotations

import numpy as np
import xarray as xr
from scipy import sparse
from sklearn.feature_extraction.text import TfidfTransformer

from lensclust.arguments import checked_arguments
from lensclust.prompts import Prompts


@checked_arguments
def bag_of_tokens(prompts: Prompts) -> xr.Dataset:
    """Tf-idf weighted, unit-norm bags of tokens, in the shape of activations of one layer.

    Every probe of activations accepts it, so that the scores of a model and of its prompts'
    wording use one protocol.

    Returns:
        ``resid (prompt, position=1, layer=[0], d_model=distinct tokens)``, labels as in `extract`.

    >>> import pandas as pd
    >>> prompts = Prompts.from_token_lists([[7, 7, 9], [5]], pd.DataFrame({"task": ["a", "b"]}))
    >>> bag_of_tokens(prompts).resid.shape
    (2, 1, 1, 3)
    """
    real = np.arange(prompts.tokens.shape[1]) < prompts.lengths.numpy()[:, None]
    row, _ = np.nonzero(real)
    kinds, column = np.unique(prompts.tokens.numpy()[real], return_inverse=True)
    counts = sparse.csr_matrix((np.ones(len(row)), (row, column)), shape=(len(prompts), len(kinds)))
    bag = TfidfTransformer().fit_transform(counts).toarray().astype(np.float32)
    labels = {str(name): ("prompt", values) for name, values in prompts.label_arrays().items()}
    return xr.Dataset(
        {"resid": (("prompt", "position", "layer", "d_model"), bag[:, None, None])},
        {"layer": [0], "position": ["answer"], **labels},
        {"model": "bag of tokens", "tokenizer": prompts.tokenizer, "prompts": prompts.digest()},
    )
