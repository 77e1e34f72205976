"""Sites: places in a model where activations are read, their names and their hooks."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.errors import InputError, check_counts
from lensclust.models.blocks import BLOCK_HOOKS, blocks_of, output_weights
from lensclust.models.devices import model_device

__all__ = [
    "BLOCK_HOOKS",
    "KINDS",
    "Site",
    "SiteSelector",
    "additivity_error",
    "first_site",
    "head_blocks",
    "head_frames",
    "hook_name",
    "model_name",
    "output_weights",
    "resolve",
]

KINDS = ("resid", *BLOCK_HOOKS)
EXPECTED = (
    f"expected one of {', '.join(KINDS)}, alone (all of them) or with a place, such as 'resid 5', "
    "'head 3.12' or 'mlp_out 3'"
)


@dataclass(frozen=True, order=True)
class Site:
    """One place in a model: a residual-stream layer, a head, or a block's output.

    Attributes:
        kind: ``resid`` (residual stream: layer 0 = embeddings, layer l = after block l-1),
            ``head`` (a head's contribution to the residual stream), ``z`` (a head's output
            before ``W_O``), ``attn_out`` or ``mlp_out`` (what a block's attention or MLP adds),
            or ``resid_mid`` (the state between the two).
        layer: the layer for ``resid``, else the block.
        head: the head for ``head`` and ``z``, else None.

    >>> Site.parse("head 3.12")
    Site(kind='head', layer=3, head=12)
    >>> str(Site("resid", 5))
    'resid 5'
    """

    kind: str
    layer: int = -1
    head: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str):
            raise InputError(f"Site: {type(self.kind).__name__} given as kind, {EXPECTED}")
        if " " in self.kind:
            raise InputError(f"Site: {self.kind!r} given as kind: use Site.parse({self.kind!r})")
        check_counts("Site", least=0, layer=self.layer, head=self.head)
        if self.kind not in KINDS or (self.head is not None) != _per_head(self.kind):
            raise InputError(f"site {str(self)!r} is not known: {EXPECTED}")

    def __str__(self) -> str:
        return f"{self.kind} {self.layer}" + ("" if self.head is None else f".{self.head}")

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read ``"resid 5"`` or ``"head 3.12"``.

        Raises:
            InputError: if the text is not of that form.
        """
        if not isinstance(text, str):
            raise InputError(f"site: given {text!r:.60} ({type(text).__name__}), {EXPECTED}")
        text = str(text)
        match = re.fullmatch(r"(\w+) (\d+)(?:\.(\d+))?", text.strip())
        if match is None:
            raise InputError(f"site {text!r} is not known: {EXPECTED}")
        return cls(match[1], int(match[2]), None if match[3] is None else int(match[3]))


SiteSelector = str | Site | Sequence[str | Site]


def resolve(model: TransformerLensModel, selectors: SiteSelector) -> list[Site]:
    """The sites that a selector names, checked against the model.

    A kind alone (``"resid"``, ``"head"``) means all sites of that kind in the model: a hybrid
    has heads in its attention blocks only.

    Raises:
        InputError: if a site does not exist in this model, or its hook does not hold that
            activation (`lensclust.models.blocks`); names the model and what it has.

    >>> import lensclust as lc
    >>> resolve(lc.load("native:sif-small"), ["resid 0", "mlp_out 5"])
    [Site(kind='resid', layer=0, head=None), Site(kind='mlp_out', layer=5, head=None)]
    """
    given: list[Any] = [selectors]
    if isinstance(selectors, Iterable) and not isinstance(selectors, (str, Site)):
        given = list(selectors)
    if odd := [item for item in given if not isinstance(item, (str, Site))]:
        raise InputError(f"sites: given {odd[0]!r:.60} ({type(odd[0]).__name__}), {EXPECTED}")
    if not given:
        raise InputError(f"sites: none given, expected some of {', '.join(KINDS)}")
    # Read once: a bridge rebuilds this dictionary on every access.
    hooks: Any = getattr(model, "hook_dict")  # noqa: B009 - outside the protocol
    return list(dict.fromkeys(site for item in given for site in _expand(model, item, hooks)))


def hook_name(model: TransformerLensModel, site: Site) -> str:
    """The TransformerLens hook point at which a site is read."""
    if site.kind != "resid":
        return BLOCK_HOOKS[site.kind].format(site.layer)
    if site.layer < model.cfg.n_layers:
        return f"blocks.{site.layer}.hook_resid_pre"
    return f"blocks.{site.layer - 1}.hook_resid_post"


def head_blocks(model: TransformerLensModel) -> list[int]:
    """The blocks of a model that have heads.

    Raises:
        InputError: if none has.

    >>> import lensclust as lc
    >>> head_blocks(lc.load("native:sif-small"))
    [0, 1, 2, 3, 4, 5]
    """
    return list(dict.fromkeys(site.layer for site in resolve(model, "z")))


def model_name(model: TransformerLensModel) -> str:
    """The model's name in messages and provenance."""
    return str(getattr(model.cfg, "model_name", None) or type(model).__name__)


def additivity_error(model: TransformerLensModel) -> float:
    """Worst relative difference over blocks between ``sum_h z_h W_O + b_O`` and ``attn_out``.

    Near 0 where heads write to the residual stream directly; large for post-norm models
    (Gemma-2, OLMo-2), whose heads pass through a norm first.
    """
    return max((block.heads_error for block in blocks_of(model)), default=0.0)


def head_frames(
    model: TransformerLensModel, blocks: Iterable[int]
) -> Float[Tensor, "block head d_head rank"]:
    """For each head a matrix F such that ``z @ F`` has the geometry of the head's contribution.

    The contribution is ``z @ W_O``, times the block's factor (`lensclust.models.output_weights`).
    With ``W_Oᵀ = Q R`` (Q orthonormal columns) that is ``z Rᵀ Qᵀ``, so ``F = Rᵀ`` keeps every
    distance and angle of the contributions in ``d_head`` numbers instead of ``d_model``.
    """
    device = model_device(model)
    w_o = torch.stack([output_weights(model, block)[0].to(device) for block in blocks])
    return torch.linalg.qr(w_o.transpose(-1, -2)).R.transpose(-1, -2)


def first_site(kind: str) -> Site:
    """The first site of a kind."""
    return Site(kind, 0, 0 if _per_head(kind) else None)


def _per_head(kind: str) -> bool:
    return kind in ("head", "z")


def _expand(model: TransformerLensModel, item: str | Site, hooks: Container[str]) -> list[Site]:
    if isinstance(item, str) and item.strip() in KINDS:
        kind, blocks = item.strip(), blocks_of(model)
        layers = [
            layer
            for layer in range(len(blocks) + (kind == "resid"))
            if hook_name(model, Site(kind, layer, 0 if _per_head(kind) else None)) in hooks
        ]
        sites = [
            Site(kind, layer, head)
            for layer in layers
            for head in (range(blocks[layer].heads) if _per_head(kind) else [None])
        ]
        if not sites:
            raise _missing(model, repr(kind), kind, hooks)
    else:
        sites = [Site.parse(item) if isinstance(item, str) else item]
    for site in sites:
        _require_exists(model, site, hooks, given=str(item).strip())
    return sites


def _require_exists(
    model: TransformerLensModel, site: Site, hooks: Container[str], *, given: str
) -> None:
    blocks, name = blocks_of(model), model_name(model)
    last = len(blocks) if site.kind == "resid" else len(blocks) - 1
    if not 0 <= site.layer <= last:
        raise InputError(
            f"site {str(site)!r} does not exist: {name} has residual layers 0..{len(blocks)}, "
            f"blocks 0..{len(blocks) - 1}"
        )
    block = blocks[min(site.layer, len(blocks) - 1)]
    if hook_name(model, site) not in hooks or (_per_head(site.kind) and not block.heads):
        raise _missing(model, repr(str(site)), site.kind, hooks)
    if site.head is not None and not 0 <= site.head < block.heads:
        raise InputError(
            f"site {str(site)!r} does not exist: block {site.layer} of {name} has heads "
            f"0..{block.heads - 1}"
        )
    if site.kind in block.refused:
        others = [f"{kind!r}" for kind in ("z", "attn_out") if kind not in block.refused]
        advice = f"; read {' or '.join(others)} instead" if site.kind == "head" and others else ""
        raise InputError(
            f"site {given!r} does not exist in {name}: {block.refused[site.kind]}{advice}"
        )


def _missing(
    model: TransformerLensModel, given: str, kind: str, hooks: Container[str]
) -> InputError:
    """The error for a missing site: names the blocks that have it, or the existing kinds."""
    name, blocks = model_name(model), blocks_of(model)
    having: dict[str, list[int]] = {}
    for each in KINDS:
        for block in range(len(blocks)):
            site = Site(each, block, 0 if _per_head(each) else None)
            if hook_name(model, site) in hooks and (blocks[block].heads or not _per_head(each)):
                having.setdefault(each, []).append(block)
    if kind in having:
        return InputError(
            f"site {given} does not exist: {name} has {kind!r} in blocks "
            f"{', '.join(map(str, having[kind]))} only"
        )
    return InputError(f"site {given} does not exist: {name} has only {', '.join(having)}")
