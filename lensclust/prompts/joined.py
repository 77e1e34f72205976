"""Concatenation of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import pandas as pd

import lensclust as lc


def joined(parts: Sequence[lc.Prompts]) -> lc.Prompts:
    """Concatenate prompts, with answers and texts if all parts have them.

    >>> prompts = lc.tasks.sif(n_tasks=2, n_inputs=3, mappings_per_task=2)
    >>> both = joined([prompts.where(task=1), prompts.where(task=0)])
    >>> len(both) == len(prompts), int(both.rows["task"][0])
    (True, 1)
    """
    ids = [
        row[:length].tolist()
        for part in parts
        for row, length in zip(part.tokens, part.lengths.tolist(), strict=True)
    ]
    texts = [part.texts for part in parts if part.texts is not None]
    answers = [part.answers for part in parts if part.answers is not None]
    return lc.Prompts.from_token_lists(
        ids,
        pd.concat([part.rows for part in parts], ignore_index=True),
        answers=list(chain(*answers)) if len(answers) == len(parts) else None,
        texts=list(chain(*texts)) if len(texts) == len(parts) else None,
        tokenizer=parts[0].tokenizer,
        pad_id=parts[0].pad_id,
    )
