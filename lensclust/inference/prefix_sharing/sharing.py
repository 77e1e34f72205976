"""Whether a model can share prefixes, and running prompts that way where it is cheaper.

Two checks come first. Branching reference prompts of the prompts' length are run with shared
prefixes and alone (`lensclust.inference.prefix_sharing.self_check`); and of the first real prompts
the one with the largest offset between place and position is run alone too. The result is cached
for the model and its kind of attention: a model that fails runs every prompt in full, and one line
in the log says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_protocol import TransformerLensModel
from transformers import PreTrainedModel

from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.inference.prefix_sharing.cost import forward_cost, most_cached
from lensclust.inference.prefix_sharing.forwards import Hooks, PackedForwards
from lensclust.inference.prefix_sharing.plan import Packing, PrefixPlan, pack
from lensclust.inference.prefix_sharing.self_check import FAILURES, TAIL, branching_failure, named
from lensclust.inference.prefix_sharing.trie import alphabetical
from lensclust.models import (
    OWN_HOOKS,
    Size,
    SizedCheck,
    agrees,
    default_budget,
    forget_outdated,
    model_device,
    model_name,
    power_of_two,
    relative_error,
    remembered,
    sees_whole_prompts,
    shard_ranges,
)
from lensclust.prompts import Prompts

log = logging.getLogger(__name__)

# Minimum length of reference prompts.
SHORT = 32
# Without prompts, reference prompts exceed windows of up to this length.
WINDOW = 1024
# Parts of the names of config fields with lengths beyond which attention changes.
WINDOWS = ("window", "chunk_size", "original_max_position")

Forward = Callable[[Hooks], Any]
Read = Callable[[Int[Tensor, "read 4"], Forward], None]
# Pairs of states read with shared prefixes, and of the same prompt run alone.
Compared = Callable[[], Iterable[tuple[Tensor, Tensor]]]


class PrefixSharing:
    """Runs prompts with every distinct token computed once.

    Args:
        model: any model; if it cannot share prefixes, there is never a plan.
        caller: function name used in the log.
        batch_tokens: upper bound of a forward's tokens.
        dtype: in which states are kept and compared.
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
        # Checked in every call, since hooks may change.
        self.obstacle = obstacle(model)

    def plan(
        self,
        tokens: Int[Tensor, "prompt token"],
        lengths: Int[Tensor, " prompt"],
        positions: Int[Tensor, "prompt slot"],
    ) -> Packing | None:
        """The plan for right-padded prompts with some requested tokens; None to run in full."""
        if self.obstacle is not None:
            log_refusal(self.model, self.caller, self.obstacle, level=logging.INFO)
            return None
        packing = pack(
            tokens,
            lengths,
            positions,
            budget=self.budget,
            most_cached=most_cached(self.model),
            cost=forward_cost(self.model),
        )
        if not packing.batches:
            return None
        if (why_not := _failure(self.model, packing.size)) is not None:
            log_refusal(self.model, self.caller, why_not)
            return None
        return packing

    def run(self, packing: Packing, read: Read, compared: Compared) -> bool:
        """Run a plan; return whether it succeeded. If not, discard everything that was read.

        Args:
            read: called for every batch with its requested tokens (group, place, prompt and slot),
                which may be none, and with its forward, which takes hooks.
            compared: called at the end, if a check is due: the states that were read of the prompt
                ``packing.farthest``, and those of its run in full.
        """
        forwards = PackedForwards(self.model)

        def forward(batch: Any, hooks: Hooks) -> Any:
            try:
                return forwards.run(batch, hooks)
            except FAILURES as failure:
                raise _Failed(named(failure)) from failure

        try:
            for batch in packing.batches:
                read(batch.wanted, lambda hooks, batch=batch: forward(batch, hooks))
        except _Failed as failure:
            return refuse(self.model, self.caller, str(failure))
        check = _memory(self.model, "real prompts")
        why_not = check.reason(
            packing.size,
            larger=_larger(self.model, packing.size),
            find=lambda _: self._differ(compared),
        )
        return why_not is None or refuse(self.model, self.caller, why_not)

    def _differ(self, compared: Compared) -> str | None:
        kinds = (self.dtype, self.model.original_model.dtype)
        coarsest = max(kinds, key=lambda kind: torch.finfo(kind).eps)
        errors = [
            relative_error(found, expected)
            for found, expected in compared()
            if not agrees(found, expected, dtype=coarsest)
        ]
        return f"relative error {max(errors):.2g}" if errors else None


@checked_arguments
def plan_prefixes(
    model: TransformerLensModel,
    prompts: Prompts,
    *,
    at: str | Sequence[str] = "answer",
    batch_tokens: int | None = None,
    shard: int = 512,
) -> PrefixPlan:
    """Estimate the savings of `extract` from common prefixes of prompts.

    The prompts are not run, but a model that has not been checked runs some short reference
    prompts; for one that cannot share prefixes, ``refused`` says why.

    Args:
        at, batch_tokens, shard: as in `extract`; prefixes are shared within a shard.

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
    names = [at] if isinstance(at, str) else list(at)
    if not names:
        raise InputError("plan_prefixes: at names no position, expected such as 'answer'")
    positions = torch.stack([prompts.position(name) for name in names], dim=1)
    forget_outdated(model)
    reason = obstacle(model)
    plans = []
    for rows in shard_ranges(0, len(prompts), shard):
        some = slice(rows.start, rows.stop)

        def packed(allowed: bool, some: slice = some) -> Packing:
            return pack(
                prompts.tokens[some],
                prompts.lengths[some],
                positions[some],
                budget=batch_tokens or default_budget(model),
                most_cached=most_cached(model),
                cost=forward_cost(model),
                allowed=allowed,
            )

        packing = packed(reason is None)
        if packing.batches and (why_not := _failure(model, packing.size)) is not None:
            packing, reason = packed(False), why_not
        plans.append(packing.plan)
    stops = positions.max(1).values.numpy() + 1
    order, common = alphabetical(prompts.tokens.numpy(), stops)
    # The number of distinct tokens does not depend on the shards.
    distinct = int((stops[order] - common).sum())
    return replace(reduce(add, plans), distinct=distinct, refused=reason)


def obstacle(model: TransformerLensModel) -> str | None:
    """Why a model cannot share prefixes, as far as is known without running it."""
    network: Any = getattr(model, "original_model", None)
    if not isinstance(network, PreTrainedModel):
        return f"no key/value cache in {type(network or model).__name__}"
    if getattr(network.config, "is_encoder_decoder", False):
        return "an encoder sees later tokens"
    if (own := sees_whole_prompts(model)) is not None:  # positions or masks may depend on tokens
        return f"{own} is a class of your own that sees whole prompts"
    return callers_hooks(model)


def callers_hooks(model: TransformerLensModel) -> str | None:
    """Why hooks prevent sharing, if there are any besides those of libraries."""
    network: Any = getattr(model, "original_model", model)
    hooks: list[Any] = []
    for module in network.modules():
        hooks += [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if isinstance(module, HookPoint):
            hooks += [handle.user_hook for handle in module.fwd_hooks]
    homes = {str(getattr(hook, "__module__", "")) for hook in hooks}
    homes -= OWN_HOOKS
    libraries = {"transformer_lens", "transformers", "accelerate"}
    if {home.partition(".")[0] for home in homes} <= libraries:
        return None
    return "it has hooks, which may depend on a prompt's rows and positions"


def refusal(model: TransformerLensModel, longest: int = 0, keys: int = 0) -> str | None:
    """Why a model cannot share prefixes of prompts of some length; None if it can.

    Checked by running it, once for each length (rounded up) and kind of attention.

    Args:
        longest: tokens of the longest prompt.
        keys: number of keys for which one token has scores, those of other prompts included.

    >>> import lensclust as lc
    >>> refusal(lc.load("native:sif-small"))
    'no key/value cache in NativeModel'
    """
    forget_outdated(model)
    longest = min(longest, model.cfg.n_ctx or longest)
    return obstacle(model) or _failure(model, (longest, max(longest, keys)))


def refuse(model: TransformerLensModel, caller: str, reason: str) -> bool:
    """Record that a model failed on real prompts, which overrules earlier checks."""
    _memory(model, "branching").failed.append(((0, 0), reason))
    log_refusal(model, caller, reason)
    return False


def log_refusal(
    model: TransformerLensModel, caller: str, reason: str, *, level: int = logging.WARNING
) -> None:
    """Log that prompts are run in full, once for each model and reason."""
    told: set[str] = remembered(model, "refusals of shared prefixes", set, lasting=True)
    if reason not in told:
        told.add(reason)
        log.log(
            level,
            "%s: %s cannot share prefixes (%s); every prompt is run in full",
            caller,
            model_name(model),
            reason,
        )


def summary(model: TransformerLensModel) -> str:
    """A short description that starts with yes or no: whether a model can share prefixes.

    >>> import lensclust as lc
    >>> summary(lc.load("native:sif-small"))
    'no: no key/value cache in NativeModel'
    """
    if (why_not := refusal(model)) is not None:
        return f"no: {why_not}"
    window = _longest_window(model)
    if window > WINDOW:
        return f"yes (prompts of over {window:,} tokens are checked when they are run)"
    if window and (why_not := refusal(model, 2 * window)) is not None:
        return f"no: {why_not}, of over {window:,} tokens"
    return "yes"


def _longest_window(model: TransformerLensModel) -> int:
    """The largest length in a model's config beyond which attention changes; 0 if there is none.

    Only determines the length of reference prompts: the model is checked by running them.
    """
    network: Any = getattr(model, "original_model", None)
    config = getattr(network, "config", None)
    sizes, waiting = [0], [config.to_dict() if config is not None else {}]
    while waiting:
        for name, value in waiting.pop().items():
            if isinstance(value, dict):
                waiting.append(value)
            elif type(value) is int and any(part in str(name) for part in WINDOWS):
                sizes.append(value)
    context = model.cfg.n_ctx
    return max(size for size in sizes if not context or size < context)


def _failure(model: Any, size: Size) -> str | None:
    check = _memory(model, "branching")

    def find(some: Size) -> str | None:
        return branching_failure(model, *some)

    # Short prompts first: a model that fails on them is not run on long ones.
    short = _larger(model, (0, 0))
    return check.reason(short, larger=short, find=find) or check.reason(
        size, larger=_larger(model, size), find=find
    )


def _memory(model: Any, what: str) -> SizedCheck:
    """The checks of a model with its present precision and attention implementation."""
    network = model.original_model
    attention = getattr(network.config, "_attn_implementation", None)
    kind = (network.dtype, attention, model_device(model).type)
    return remembered(model, ("shared prefixes", what, *kind), SizedCheck)


def _larger(model: Any, size: Size) -> Size:
    """A larger size that covers others too, so that few checks are needed."""
    context = model.cfg.n_ctx or size[0]
    longest = max(size[0], min(power_of_two(max(size[0], SHORT)), context))
    between = max(size[1] - longest, min(longest // 4, TAIL))
    return longest, longest + power_of_two(between)


class _Failed(Exception):
    """Raised if a forward with shared prefixes fails."""
