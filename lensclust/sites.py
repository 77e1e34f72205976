"""Sites: places in a model where activations are read, their names and their hooks."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge.generalized_components.base import align_offloaded_subtree
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.batching import model_device
from lensclust.errors import InputError

BLOCK_HOOKS = {
    "resid_mid": "blocks.{}.hook_resid_mid",
    "z": "blocks.{}.attn.hook_z",
    "head": "blocks.{}.attn.hook_z",
    "attn_out": "blocks.{}.hook_attn_out",
    "mlp_out": "blocks.{}.hook_mlp_out",
}
KINDS = ("resid", *BLOCK_HOOKS)
EXPECTED = (
    f"expected one of {', '.join(KINDS)}, alone (all of them) or with a place, such as 'resid 5', "
    "'head 3.12' or 'mlp_out 3'"
)

# A head's `z @ W_O` must rebuild the attention output to this relative error (float32 rounding
# stays near 1e-6; a norm between the heads and the residual stream gives errors near 1).
ADDITIVITY_TOLERANCE = 1e-2


@dataclass(frozen=True, order=True)
class Site:
    """One place in a model: a residual-stream layer, a head, or a block's output.

    Attributes:
        kind: ``resid`` (residual stream: layer 0 = embeddings, layer l = after block l-1),
            ``head`` (a head's contribution to the residual stream), ``z`` (a head's output
            before ``W_O``), ``attn_out``, ``mlp_out`` or ``resid_mid`` (of a block).
        layer: the layer for ``resid``, else the block.
        head: the head for ``head`` and ``z``, else None.

    >>> Site.parse("head 3.12")
    Site(kind='head', layer=3, head=12)
    >>> str(Site("resid", 5))
    'resid 5'
    """

    kind: str
    layer: int
    head: int | None = None

    def __post_init__(self) -> None:
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
        match = re.fullmatch(r"(\w+) (\d+)(?:\.(\d+))?", text.strip())
        if match is None:
            raise InputError(f"site {text!r} is not known: {EXPECTED}")
        return cls(match[1], int(match[2]), None if match[3] is None else int(match[3]))


SiteSelector = str | Site | Sequence[str | Site]


def resolve(model: TransformerLensModel, selectors: SiteSelector) -> list[Site]:
    """The sites a selector names, checked against what the model really has.

    A kind alone (``"resid"``, ``"head"``) means all sites of that kind.

    Raises:
        InputError: if a site does not exist in this model; names the model and what it has.

    >>> import lensclust as lc
    >>> resolve(lc.load("native:sif-small"), ["resid 0", "mlp_out 5"])
    [Site(kind='resid', layer=0, head=None), Site(kind='mlp_out', layer=5, head=None)]
    """
    given = [selectors] if isinstance(selectors, (str, Site)) else list(selectors)
    if not given:
        raise InputError(f"sites: none given, expected some of {', '.join(KINDS)}")
    # Asked for once: a bridge puts it together anew each time.
    hooks: Any = getattr(model, "hook_dict")  # noqa: B009 - outside the protocol
    chosen = dict.fromkeys(site for item in given for site in _expand(model, item, hooks))
    if any(site.kind == "head" for site in chosen):
        _require_additive_heads(model)
    return list(chosen)


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
    """What to call the model in messages and provenance."""
    return str(getattr(model.cfg, "model_name", None) or type(model).__name__)


@torch.no_grad()
def additivity_error(model: TransformerLensModel) -> float:
    """Worst relative difference over blocks between ``sum_h z_h W_O + b_O`` and ``attn_out``.

    Near 0 where heads write to the residual stream directly; large for post-norm models
    (Gemma-2, OLMo-2), whose heads pass through a norm first. One forward of four tokens.
    """
    blocks = range(model.cfg.n_layers)
    wanted = [BLOCK_HOOKS[kind].format(b) for kind in ("z", "attn_out") for b in blocks]
    tokens = torch.arange(4, device=model.cfg.device)[None] % max(model.cfg.d_vocab, 1)
    _, cache = model.run_with_cache(tokens, names_filter=wanted)
    errors = []
    for block in blocks:
        z, out = (cache[BLOCK_HOOKS[kind].format(block)] for kind in ("z", "attn_out"))
        weight, bias = output_weights(model, block)
        # In single precision: what half precision rounds off is not the heads' error.
        rebuilt = torch.einsum("bphd,hdm->bpm", z.float(), weight.to(z.device))
        rebuilt = rebuilt + (0 if bias is None else bias.to(z.device))
        errors.append((rebuilt - out.float()).norm() / out.float().norm().clamp_min(1e-12))
    # Asked for when all are queued; a NaN must come through.
    return float(np.max([float(error) for error in errors], initial=0.0))


def head_frames(
    model: TransformerLensModel, blocks: Iterable[int]
) -> Float[Tensor, "block head d_head rank"]:
    """For each head a matrix F such that ``z @ F`` has the geometry of ``z @ W_O``.

    With ``W_Oᵀ = Q R`` (Q orthonormal columns) a head's contribution is ``z Rᵀ Qᵀ``, so
    ``F = Rᵀ`` keeps every distance and angle of the contributions in ``d_head`` numbers
    instead of ``d_model``.
    """
    device = model_device(model)
    w_o = torch.stack([output_weights(model, block)[0].to(device) for block in blocks])
    return torch.linalg.qr(w_o.transpose(-1, -2)).R.transpose(-1, -2)


def output_weights(
    model: TransformerLensModel, block: int
) -> tuple[Float[Tensor, "head d_head d_model"], Float[Tensor, " d_model"] | None]:
    """``W_O`` and ``b_O`` of a block in float32, also of weights that lie off the devices."""
    stacked: Any = model
    attention = stacked.blocks[block].attn
    with align_offloaded_subtree(attention):
        bias = getattr(attention, "b_O", None)
        # Copies: what was brought in is taken away again.
        weight = attention.W_O.detach().to(torch.float32, copy=True)
        return weight, None if bias is None else bias.detach().to(torch.float32, copy=True)


def first_site(kind: str) -> Site:
    """The first place of a kind."""
    return Site(kind, 0, 0 if _per_head(kind) else None)


def heads_add_up(error: float) -> bool:
    """Whether an `additivity_error` is that of rounding (a NaN is not)."""
    return error <= ADDITIVITY_TOLERANCE


def _per_head(kind: str) -> bool:
    return kind in ("head", "z")


def _expand(model: TransformerLensModel, item: str | Site, hooks: Container[str]) -> list[Site]:
    cfg = model.cfg
    if isinstance(item, str) and item.strip() in KINDS:
        kind = item.strip()
        layers = range(cfg.n_layers + (kind == "resid"))
        heads: Iterable[int | None] = range(cfg.n_heads) if _per_head(kind) else [None]
        sites = [Site(kind, layer, head) for layer in layers for head in heads]
        # Blocks without attention have no heads.
        sites = [site for site in sites if hook_name(model, site) in hooks] or sites[:1]
    else:
        sites = [Site.parse(item) if isinstance(item, str) else item]
    for site in sites:
        _require_exists(model, site, hooks)
    return sites


def _require_exists(model: TransformerLensModel, site: Site, hooks: Container[str]) -> None:
    cfg, name = model.cfg, model_name(model)
    last = cfg.n_layers if site.kind == "resid" else cfg.n_layers - 1
    if not 0 <= site.layer <= last or not 0 <= (site.head or 0) < cfg.n_heads:
        raise InputError(
            f"site {str(site)!r} does not exist: {name} has residual layers 0..{cfg.n_layers}, "
            f"blocks 0..{cfg.n_layers - 1}, heads 0..{cfg.n_heads - 1}"
        )
    if hook_name(model, site) not in hooks:
        has = [kind for kind in KINDS if hook_name(model, first_site(kind)) in hooks]
        raise InputError(f"site {str(site)!r} does not exist: {name} has only {', '.join(has)}")


def _require_additive_heads(model: TransformerLensModel) -> None:
    error = additivity_error(model)
    if not heads_add_up(error):
        raise InputError(
            f"site 'head' does not exist in {model_name(model)}: its heads pass through a norm "
            f"before the residual stream and do not add up (relative error {error:.2g}); "
            "read 'z' or 'attn_out' instead"
        )
