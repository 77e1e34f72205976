"""Whether a model can share prefixes, and running prompts that way where it pays.

Nothing is taken on trust: before a model runs prompts with shared prefixes, reference prompts that
branch are run so and alone, at the length that the prompts have
(`lensclust.inference.prefix_sharing.self_check`); and of the first real ones the one that stands
farthest from its place is run alone too. What was found
belongs to the model and its kind of attention, whoever asks: a model that fails runs every prompt
in full, and one line in the log says so.
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
    shard_ranges,
)
from lensclust.prompts import Prompts

log = logging.getLogger(__name__)

# Prompts of so many tokens are checked in any case.
SHORT = 32
# Windows up to here are looked beyond when nothing is run but checks.
WINDOW = 1024
# Parts of the names under which configs keep lengths beyond which attention changes.
WINDOWS = ("window", "chunk_size", "original_max_position")

Forward = Callable[[Hooks], Any]
Read = Callable[[Int[Tensor, "read 4"], Forward], None]
# What was read with shared prefixes, and the same of a prompt that was run alone.
Compared = Callable[[], Iterable[tuple[Tensor, Tensor]]]


class PrefixSharing:
    """Runs prompts with every distinct token computed once.

    Args:
        model: any; those that cannot share refuse every plan.
        caller: function name used in the log.
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
        # Looked for in every call: hooks come and go.
        self.obstacle = obstacle(model)

    def plan(
        self,
        tokens: Int[Tensor, "prompt token"],
        lengths: Int[Tensor, " prompt"],
        positions: Int[Tensor, "prompt slot"],
    ) -> Packing | None:
        """How to run right-padded prompts, of which some tokens are wanted; None if in full."""
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
        """Whether the plan was carried out; if not, nothing that was read may be used.

        Args:
            read: called for every batch with what is wanted of it (group, place, prompt and
                slot) and with its forward, which takes hooks; some batches want nothing.
            compared: called at the end, if need be; what was read of the prompt
                ``packing.farthest``, and what its run in full gives.
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
    """What `extract` would gain from prefixes that prompts share.

    No prompt is run, but a model of which it is not known whether it can share prefixes runs some
    short ones; one that cannot is said to gain nothing, and why (``refused``).

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
    # What must be computed does not depend on the shards.
    distinct = int((stops[order] - common).sum())
    return replace(reduce(add, plans), distinct=distinct, refused=reason)


def obstacle(model: TransformerLensModel) -> str | None:
    """Why a model cannot share prefixes, as far as can be said without running it."""
    network: Any = getattr(model, "original_model", None)
    if not isinstance(network, PreTrainedModel):
        return f"no key/value cache in {type(network or model).__name__}"
    if getattr(network.config, "is_encoder_decoder", False):
        return "an encoder sees what follows"
    return callers_hooks(model)


def callers_hooks(model: TransformerLensModel) -> str | None:
    """Why hooks stand in the way, if there are others than those that libraries work with."""
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
    return "it has hooks, which may count on a prompt's own rows and places"


def refusal(model: TransformerLensModel, longest: int = 0, keys: int = 0) -> str | None:
    """Why a model cannot share prefixes of prompts of some length; None if it can.

    It is run to find out, once for each length (rounded up) and kind of attention.

    Args:
        longest: tokens of the longest prompt.
        keys: those that one token has scores for, those of other prompts included.

    >>> import lensclust as lc
    >>> refusal(lc.load("native:sif-small"))
    'no key/value cache in NativeModel'
    """
    forget_outdated(model)
    longest = min(longest, model.cfg.n_ctx or longest)
    return obstacle(model) or _failure(model, (longest, max(longest, keys)))


def refuse(model: TransformerLensModel, caller: str, reason: str) -> bool:
    """Remember that a model failed on real prompts: whatever was checked, it is not trusted."""
    _memory(model, "branching").failed.append(((0, 0), reason))
    log_refusal(model, caller, reason)
    return False


def log_refusal(
    model: TransformerLensModel, caller: str, reason: str, *, level: int = logging.WARNING
) -> None:
    """Tell that prompts are run in full, once for each model and reason."""
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
    """Whether a model can share prefixes, in a few words that begin with yes or no.

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
    """The largest number of tokens beyond which a model's config says that attention changes.

    0 if it says nothing of that kind. Only for knowing how long prompts should be that are to
    show what a model does: what it does is found by running them.
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

    # The short prompts first: a model that fails there is not run on long ones.
    short = _larger(model, (0, 0))
    return check.reason(short, larger=short, find=find) or check.reason(
        size, larger=_larger(model, size), find=find
    )


def _memory(model: Any, what: str) -> SizedCheck:
    """What was found about a model, with the precision and the code that it attends with."""
    network = model.original_model
    attention = getattr(network.config, "_attn_implementation", None)
    kind = (network.dtype, attention, model_device(model).type)
    return remembered(model, ("shared prefixes", what, *kind), SizedCheck)


def _larger(model: Any, size: Size) -> Size:
    """A size that holds others too, so that few have to be checked."""
    context = model.cfg.n_ctx or size[0]
    longest = max(size[0], min(power_of_two(max(size[0], SHORT)), context))
    between = max(size[1] - longest, min(longest // 4, TAIL))
    return longest, longest + power_of_two(between)


class _Failed(Exception):
    """Raised where a forward with shared prefixes cannot be run."""
