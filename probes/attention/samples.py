"""Attention patterns of some heads on a few prompts, for inspection.

The attention of a head on one prompt is an example, not evidence: weights are not explanations
(`probes.attention_ratio` compares them over many prompts, with controls).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.inference import require_fits
from lensclust.models import (
    Site,
    SiteSelector,
    batches,
    default_budget,
    model_device,
    model_name,
    resolve,
)
from lensclust.prompts import Prompts
from probes.attention.patterns import Lengths, Pattern, PatternReader

# Heads side by side in a notebook.
MOST_SHOWN = 16


@dataclass(frozen=True, repr=False)
class AttentionSamples:
    """The attention patterns of some heads on some prompts.

    Attributes:
        heads: the heads, in the order of the patterns.
        tokens: the tokens of each prompt as text.
        patterns: for each prompt ``(head, query, key)``, rows that sum to 1 over the keys up to
            the query.
    """

    heads: tuple[Site, ...]
    tokens: tuple[tuple[str, ...], ...]
    patterns: tuple[Float[np.ndarray, "head _ _"], ...]

    @property
    def frame(self) -> pd.DataFrame:
        """One row per prompt, head, query and earlier key: ``weight`` between positions and tokens.

        Columns: ``prompt, site, block, head, query, key, query_token, key_token, weight``.
        """
        parts = []
        for prompt, (tokens, pattern) in enumerate(zip(self.tokens, self.patterns, strict=True)):
            query, key = np.tril_indices(len(tokens))
            names = np.array(tokens, dtype=object)
            for site, weights in zip(self.heads, pattern, strict=True):
                place = {"site": str(site), "block": site.layer, "head": site.head}
                row = {"query": query, "key": key, "weight": weights[query, key]}
                words = {"query_token": names[query], "key_token": names[key]}
                parts.append(pd.DataFrame({"prompt": prompt, **place, **row, **words}))
        order = ["prompt", "site", "block", "head", "query", "key", "query_token", "key_token"]
        return pd.concat(parts, ignore_index=True)[[*order, "weight"]]

    def of(self, head: str | Site) -> tuple[Float[np.ndarray, "_ _"], ...]:
        """One head's pattern on each prompt.

        Raises:
            InputError: if the head is not among them.
        """
        place = self._place(head if isinstance(head, Site) else Site.parse(head))
        return tuple(pattern[place] for pattern in self.patterns)

    def only(
        self, *, heads: SiteSelector | None = None, prompts: Sequence[int] | None = None
    ) -> AttentionSamples:
        """Select heads and prompts.

        Raises:
            InputError: if a head or prompt is not among them.
        """
        given = list(self.heads) if heads is None else heads
        names = [given] if isinstance(given, (str, Site)) else list(given)
        sites = [item if isinstance(item, Site) else Site.parse(item) for item in names]
        rows = list(range(len(self.tokens)) if prompts is None else prompts)
        if outside := [row for row in rows if not 0 <= row < len(self.tokens)]:
            raise InputError(f"prompt {outside[0]} is not among the {len(self.tokens)} read")
        places = [self._place(site) for site in sites]
        if not places or not rows:
            raise InputError("only: no head or no prompt given, expected at least one of each")
        return AttentionSamples(
            tuple(sites),
            tuple(self.tokens[row] for row in rows),
            tuple(self.patterns[row][places] for row in rows),
        )

    def _place(self, site: Site) -> int:
        if site not in self.heads:
            raise InputError(f"{str(site)!r} is not among the {len(self.heads)} heads read")
        return self.heads.index(site)

    def _repr_html_(self) -> str:
        """The first prompt, by CircuitsVis."""
        from lensclust.report import attention_frame

        heads = self.heads[:MOST_SHOWN]
        names = [f"{site.layer}.{site.head}" for site in heads]
        hidden = [f"{len(self.heads) - len(heads)} more heads"] if self.heads[MOST_SHOWN:] else []
        hidden += [f"{len(self.tokens) - 1} more prompts"] if self.tokens[1:] else []
        note = f"; {' and '.join(hidden)}: see <code>only</code>" if hidden else ""
        frame = attention_frame(self.tokens[0], self.patterns[0][: len(heads)], names)
        return f"<p>{self!r}, prompt 0{note}</p>{frame}"

    def __repr__(self) -> str:
        lengths = [len(tokens) for tokens in self.tokens]
        return (
            f"AttentionSamples({len(self.heads)} heads, {len(lengths)} prompts of "
            f"{min(lengths)} to {max(lengths)} tokens)"
        )


@checked_arguments
def sample_attention(
    model: TransformerLensModel,
    prompts: Prompts,
    *,
    heads: SiteSelector = "head",
    names: Sequence[str] | None = None,
    batch_tokens: int | None = None,
) -> AttentionSamples:
    """Read the attention patterns of heads on a few prompts.

    A pattern takes ``tokens²`` numbers per head and prompt: meant for a handful of prompts.

    Args:
        model: a hooked model, in eval mode, with eager attention.
        prompts: prompts to run.
        heads: ``"head"`` for all, ``"head 3.12"`` or a list of such.
        names: the text of every token id, for models without a tokenizer; by default a token is
            shown as the model's tokenizer decodes it alone, and without one as its number.
        batch_tokens: upper bound of the tokens that one forward runs; default that of `extract`.

    Returns:
        The patterns in single precision, on the CPU.

    Raises:
        InputError: if a site is no head of this model, a token has no name, a block shows no
            pattern, or the prompts do not fit the model.

    >>> import lensclust as lc
    >>> from lensclust.tasks.synthetic import vocabulary
    >>> prompts = lc.tasks.sif().where(split="new_string").take([0, 40])
    >>> model = lc.load("native:sif-small")
    >>> found = sample_attention(model, prompts, heads=["head 0.1", "head 5.3"], names=vocabulary())
    >>> found.tokens[0][0], found.patterns[0].shape[0]
    ('<bos>', 2)
    >>> bool(abs(found.of("head 5.3")[1].sum(-1) - 1).max() < 1e-5)
    True
    """
    require_fits(model, prompts, caller="sample_attention")
    wanted = _heads(model, heads)
    reader = PatternReader(model, values=False, caller="sample_attention")
    device = model_device(model)
    lengths = prompts.lengths.tolist()
    patterns = [np.zeros((len(wanted), n, n), dtype=np.float32) for n in lengths]
    places: dict[int, list[int]] = {}
    for place, site in enumerate(wanted):
        places.setdefault(site.layer, []).append(place)

    for rows in batches(model, prompts.lengths, batch_tokens or default_budget(model)):
        last = prompts.lengths[rows] - 1
        tokens = prompts.tokens[rows, : int(last.max()) + 1].to(device)

        def show(
            index: int, pattern: Pattern, _: Lengths | None, rows: torch.Tensor = rows
        ) -> None:
            here = places.get(reader.blocks[index], [])
            numbers = [wanted[place].head for place in here]
            for row, prompt in enumerate(rows.tolist() if here else []):
                n = lengths[prompt]
                patterns[prompt][here] = pattern[row, numbers, :n, :n].float().cpu().numpy()

        reader.run(tokens, last.to(device), show)
    return AttentionSamples(tuple(wanted), _tokens(model, prompts, names), tuple(patterns))


def _heads(model: TransformerLensModel, heads: SiteSelector) -> list[Site]:
    # Patterns exist also where heads' outputs do not add up: then only `z` resolves.
    every = resolve(model, "z")
    known = {(site.layer, site.head): Site("head", site.layer, site.head) for site in every}
    if isinstance(heads, str) and heads.strip() == "head":
        return list(known.values())
    given = [heads] if isinstance(heads, (str, Site)) else list(heads)
    sites = [item if isinstance(item, Site) else Site.parse(item) for item in given]
    if not sites:
        raise InputError("sample_attention: no head given, expected at least one")
    for site in sites:
        if site.kind != "head" or (site.layer, site.head) not in known:
            blocks, numbers = (sorted({place[axis] or 0 for place in known}) for axis in (0, 1))
            raise InputError(
                f"sample_attention: {str(site)!r} is no head of {model_name(model)}: it has heads "
                f"{numbers[0]}..{numbers[-1]} in blocks {blocks}"
            )
    return list(dict.fromkeys(sites))


def _tokens(
    model: Any, prompts: Prompts, names: Sequence[str] | None
) -> tuple[tuple[str, ...], ...]:
    tokenizer = getattr(model, "tokenizer", None)
    lists = [
        row[:n].tolist() for row, n in zip(prompts.tokens, prompts.lengths.tolist(), strict=True)
    ]
    if names is not None:
        largest = max(map(max, lists))
        if largest >= len(names):
            raise InputError(
                f"sample_attention: token id {largest} has no name: {len(names)} names given"
            )
        return tuple(tuple(str(names[i]) for i in ids) for ids in lists)
    if tokenizer is None:
        return tuple(tuple(map(str, ids)) for ids in lists)
    return tuple(
        tuple(str(tokenizer.decode([i], clean_up_tokenization_spaces=False)) for i in ids)
        for ids in lists
    )
