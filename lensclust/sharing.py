"""Whether a model can share prefixes, and running prompts that way where it pays.

Nothing is taken on trust: of the first prompts that a model runs with shared prefixes, the one
that stands farthest from the start of the longest sequence is run in full too, and what was read
has to agree; so again whenever sequences get longer. A model that fails, or that is known to be
unable, runs every prompt in full, and one line in the log says so.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_protocol import TransformerLensModel
from transformers import PreTrainedModel

from lensclust.batching import default_budget
from lensclust.costs import Cost, forward_cost, most_cached
from lensclust.fits import require_given
from lensclust.packed_batches import Layout
from lensclust.packed_forwards import Hooks, PackedForwards
from lensclust.prefix import Packing, PrefixPlan, pack
from lensclust.prompts import Prompts
from lensclust.sites import model_name
from lensclust.store import shard_ranges
from lensclust.tries import alphabetical

log = logging.getLogger(__name__)

# How far two exact ways may lie apart, in rounding errors.
ROUNDING = 500

# Keys up to which a model was seen to agree. How it attends does not change with its weights.
_PROVEN: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

Forward = Callable[[Hooks], Any]
Read = Callable[[Int[Tensor, "read 4"], Forward], None]


class PrefixSharing:
    """Runs prompts with every distinct token computed once.

    Args:
        model: any; those that cannot share refuse every plan.
        caller: in whose name the log speaks.
        batch_tokens: upper bound of a forward's tokens.
        dtype: in which what is read is kept and compared.
    """

    def __init__(
        self,
        model: TransformerLensModel,
        *,
        caller: str,
        batch_tokens: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model: Any = model
        self.caller = caller
        self.dtype = dtype
        self.budget = batch_tokens or default_budget(model)
        # Sequences of so many keys and more are known not to agree.
        self.refused = math.inf
        if (reason := obstacle(model)) is not None:
            self._refuse(0, reason, logging.INFO)

    def plan(
        self,
        tokens: Int[Tensor, "prompt token"],
        lengths: Int[Tensor, " prompt"],
        positions: Int[Tensor, "prompt slot"],
    ) -> Packing | None:
        """How to run right-padded prompts, of which some tokens are wanted; None if in full."""
        if self.refused == 0:
            return None
        packing = pack(
            tokens,
            lengths,
            positions,
            budget=self.budget,
            most_cached=most_cached(self.model),
            cost=forward_cost(self.model),
        )
        if not packing.batches or packing.widest.keys >= self.refused:
            return None
        return packing

    def run(self, packing: Packing, read: Read, error: Callable[[], float]) -> bool:
        """Whether the plan was carried out; if not, nothing that was read may be used.

        Args:
            read: called for every batch with what is wanted of it (group, place, prompt and
                slot) and with its forward, which takes hooks; some batches want nothing.
            error: called at the end, if need be; how far what was read of the packing's witness
                lies from a run in full, relative to the latter.
        """
        keys = packing.widest.keys
        try:
            forwards = PackedForwards(self.model)
            for batch in packing.batches:
                read(batch.wanted, lambda hooks, batch=batch: forwards.run(batch, hooks))
            found = error() if keys > _PROVEN.get(self.model, 0) else 0.0
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as failure:
            self._refuse(0, f"{type(failure).__name__}: {failure}", logging.WARNING)
            return False
        kinds = (self.dtype, self.model.original_model.dtype)
        if found > max(map(rounding_tolerance, kinds)):
            # A model whose windows count places fails in long sequences only.
            general = trial(self.model)
            reason = general or f"relative error {found:.2g} over {keys} keys"
            self._refuse(keys if general is None else 0, reason, logging.WARNING)
            return False
        _PROVEN[self.model] = max(keys, _PROVEN.get(self.model, 0))
        return True

    def _refuse(self, keys: int, reason: str, level: int) -> None:
        self.refused = min(keys, self.refused)
        log.log(
            level,
            "%s: %s cannot share prefixes (%s); every prompt is run in full",
            self.caller,
            model_name(self.model),
            reason,
        )


def plan_prefixes(
    model: TransformerLensModel,
    prompts: Prompts,
    *,
    at: str | Sequence[str] = "answer",
    batch_tokens: int | None = None,
    shard: int = 512,
) -> PrefixPlan:
    """What `extract` would gain from prefixes that prompts share; nothing is run.

    Args:
        at, batch_tokens, shard: as in `extract`; prefixes are shared inside a shard.

    Raises:
        InputError: if a position does not exist.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> import lensclust as lc, pandas as pd
    >>> config = GPT2Config(vocab_size=99, n_embd=8, n_layer=1, n_head=1, bos_token_id=0,
    ...                     eos_token_id=0)
    >>> model = lc.load(GPT2LMHeadModel(config))
    >>> shots = list(range(20)) * 5
    >>> prompts = lc.Prompts.from_token_lists(
    ...     [[*shots, query, 7] for query in range(50)], pd.DataFrame({"n": range(50)}))
    >>> print(plan_prefixes(model, prompts))
    50 prompts, 5,100 tokens
    must be computed  200 (limit: 25.5 times fewer)
    are computed      ..., padding included, in ... groups and 2 forwards
    share a prefix    50 prompts
    estimated cost    ... of running all in full
    """
    require_given(model, prompts, caller="plan_prefixes")
    names = [at] if isinstance(at, str) else list(at)
    positions = torch.stack([prompts.position(name) for name in names], dim=1)
    allowed = obstacle(model) is None
    plans = [
        pack(
            prompts.tokens[rows.start : rows.stop],
            prompts.lengths[rows.start : rows.stop],
            positions[rows.start : rows.stop],
            budget=batch_tokens or default_budget(model),
            most_cached=most_cached(model),
            cost=forward_cost(model),
            allowed=allowed,
        ).plan
        for rows in shard_ranges(0, len(prompts), shard)
    ]
    stops = positions.max(1).values.numpy() + 1
    order, common = alphabetical(prompts.tokens.numpy(), stops)
    # What must be computed does not depend on the shards.
    return replace(reduce(add, plans), distinct=int((stops[order] - common).sum()))


def obstacle(model: TransformerLensModel) -> str | None:
    """Why a model cannot share prefixes, as far as can be said without running it."""
    network: Any = getattr(model, "original_model", None)
    if not isinstance(network, PreTrainedModel):
        return f"no key/value cache in {type(network or model).__name__}"
    if getattr(network.config, "is_encoder_decoder", False):
        return "an encoder sees what follows"
    if _callers_hooks(network):
        return "it has hooks, which may count on a prompt's own rows and places"
    return None


def _callers_hooks(network: torch.nn.Module) -> bool:
    """Whether there are hooks other than those that the libraries themselves work with."""
    hooks: list[Any] = []
    for module in network.modules():
        hooks += [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if isinstance(module, HookPoint):
            hooks += [handle.user_hook for handle in module.fwd_hooks]
    homes = {str(getattr(hook, "__module__", "")) for hook in hooks} - {"lensclust.wrapping"}
    libraries = {"transformer_lens", "transformers", "accelerate"}
    return not {home.partition(".")[0] for home in homes} <= libraries


@torch.no_grad()
def trial(model: TransformerLensModel) -> str | None:
    """Why a model cannot share prefixes, found by three prompts of a few tokens; None if it can.

    >>> import lensclust as lc
    >>> trial(lc.load("native:sif-small"))
    'no key/value cache in NativeModel'
    """
    if (reason := obstacle(model)) is not None:
        return reason
    bridge: Any = model
    tokens = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 5, 6], [0, 1, 7, 0, 0]])
    # Not the first ids: those are often special, and states after special tokens alone are so
    # large that rounding decides.
    tokens = (tokens + bridge.cfg.d_vocab // 3) % bridge.cfg.d_vocab
    lengths = torch.tensor([5, 5, 3])
    layout = Layout(
        tokens=tokens.numpy(),
        positions=lengths.numpy()[:, None] - 1,
        stops=lengths.numpy(),
        budget=100,
        most_cached=100,
        cost=Cost(forward=0.0, key=0.0),
        group_tokens=2,
    )
    name = f"blocks.{bridge.cfg.n_layers - 1}.hook_resid_post"
    found, expected = {}, {}
    states: list[Tensor] = []
    try:
        forwards = PackedForwards(bridge)
        for batch in layout.batches(*alphabetical(layout.tokens, layout.stops)):
            forwards.run(batch, [(name, lambda state, hook: states.append(state))])
            group, place, prompt, _ = batch.wanted.unbind(1)
            found |= dict(zip(prompt.tolist(), states.pop()[group, place].float(), strict=True))
        for prompt, length in enumerate(lengths.tolist()):
            _, cache = bridge.run_with_cache(tokens[prompt, :length][None], names_filter=name)
            expected[prompt] = cache[name][0, -1].float()
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as failure:
        return f"{type(failure).__name__}: {failure}"
    worst = max(float((found[p] - x).norm() / x.norm()) for p, x in expected.items())
    exact = worst <= rounding_tolerance(bridge.original_model.dtype)
    return None if exact else f"relative error {worst:.2g}"


def rounding_tolerance(dtype: torch.dtype) -> float:
    """The relative difference that rounding explains between two exact ways.

    >>> round(rounding_tolerance(torch.float32), 6), rounding_tolerance(torch.bfloat16)
    (6e-05, 0.1)
    """
    epsilon = torch.finfo(dtype).eps
    if torch.get_float32_matmul_precision() != "highest":
        epsilon = max(epsilon, 2**-10)
    return min(ROUNDING * epsilon, 0.1)
