"""Checks that prompts are compatible with a model."""

from __future__ import annotations

from typing import Any

from jaxtyping import Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.arguments import require_hooked, require_prompts
from lensclust.errors import InputError
from lensclust.models import (
    default_budget,
    forget_outdated,
    keep_up,
    length_steps,
    model_name,
    modules_of,
    require_faithful,
    require_own_code_right,
    same_tokenizer,
    tokenizer_fingerprint,
)
from lensclust.prompts import Prompts


def require_model(model: Any, *, caller: str) -> None:
    """Refuse an object that is not a hooked model in eval mode, or one that must be reloaded.

    Cached results of self-checks with outdated weights are dropped.

    Args:
        model: the argument that was given as model.
        caller: function name used in error messages.

    Raises:
        InputError: says what was given and what to do.
    """
    require_hooked(model, caller=caller)
    keep_up(model)
    name = model_name(model)
    if getattr(model, "training", False):
        raise InputError(f"{caller}: {name} is in training mode; call model.eval()")
    modules = modules_of(model)
    # Dropout is active in a module in training mode, whatever the mode of its parent.
    training = [module for module in modules if module.training and not _quantised(module)]
    if training:
        kinds = sorted({type(module).__name__ for module in training})
        raise InputError(
            f"{caller}: {name} is in training mode in part ({', '.join(kinds[:3])}); call eval() "
            "of the network that was loaded, and model.eval()"
        )
    forget_outdated(model)
    if isinstance(model, TransformerBridge):
        require_faithful(model, caller=caller)


def _quantised(module: nn.Module) -> bool:
    """Whether a module is quantised by torch: these are always marked as training."""
    return type(module).__module__.startswith("torch.ao.")


def require_fits(model: TransformerLensModel, prompts: Prompts, *, caller: str) -> None:
    """Check that prompts are compatible with a model.

    Args:
        caller: function name used in error messages.

    Raises:
        InputError: if the model is unusable (`require_model`), or the prompts are of another
            type, were made with another tokenizer, or are longer than the model's context.
    """
    require_model(model, caller=caller)
    require_prompts(caller, prompts)
    name = model_name(model)
    tokenizer: Any = getattr(model, "tokenizer", None)
    made_with = prompts.tokenizer
    if tokenizer is None or made_with == "none":
        same = True  # nothing to compare
    else:
        same = same_tokenizer(made_with, tokenizer_fingerprint(tokenizer))
    if not same:
        raise InputError(
            f"{caller}: these prompts were made with another tokenizer than that of {name}"
        )
    context = model.cfg.n_ctx
    longest = int(prompts.lengths.max())
    if context and longest > context:
        row = int(prompts.lengths.argmax())
        raise InputError(
            f"{caller}: prompt {row} has {longest} tokens, but {name} has a context of {context}"
        )
    if isinstance(model, TransformerBridge):
        longest += max(map(len, prompts.answers), default=0) if prompts.answers else 0
        longest = min(longest, context or longest)
        tokens = min(default_budget(model), longest * len(prompts))
        require_own_code_right(model, longest=longest, tokens=tokens, caller=caller)
    vocabulary = model.cfg.d_vocab
    largest = int(prompts.tokens.max())
    if vocabulary and largest >= vocabulary:
        raise InputError(
            f"{caller}: token id {largest} given, but {name} has a vocabulary of {vocabulary}; "
            "were the prompts made with another tokenizer?"
        )


def require_one_side(
    model: TransformerLensModel, lengths: Int[Tensor, " row"], *, caller: str
) -> None:
    """Refuse rows that cannot be run as one padded batch: the longest would change the others.

    Args:
        lengths: number of tokens of each row that are run.
        caller: function name used in error messages.

    Raises:
        InputError: if they are on two sides of one of the model's `length_steps`.
    """
    shortest, longest = int(lengths.min()), int(lengths.max())
    for step in length_steps(model):
        if shortest <= step < longest:
            raise InputError(
                f"{caller}: prompts of {shortest} and of {longest} tokens given, but "
                f"{model_name(model)} has other frequencies beyond {step} tokens: expected prompts "
                "of one kind, shorter or longer"
            )


def require_answers(model: TransformerLensModel, prompts: Prompts, *, caller: str) -> None:
    """Refuse prompts without answers, and answers that are not compatible with a model.

    Args:
        caller: function name used in error messages.

    Raises:
        InputError: if a prompt has no answer, or an answer exceeds the model's vocabulary or,
            after its prompt, the model's context.
    """
    if prompts.answers is None or not all(prompts.answers):
        raise InputError(f"{caller}: expected prompts with an answer each, given some without")
    name = model_name(model)
    largest = max(map(max, prompts.answers))
    if model.cfg.d_vocab and largest >= model.cfg.d_vocab:
        raise InputError(
            f"{caller}: answer id {largest} given, but {name} has a vocabulary of "
            f"{model.cfg.d_vocab}"
        )
    _, lengths, _ = prompts.with_answers()
    # The last token of an answer is predicted, never an input.
    if model.cfg.n_ctx and int(lengths.max()) - 1 > model.cfg.n_ctx:
        row = int(lengths.argmax())
        raise InputError(
            f"{caller}: prompt {row} and its answer have {int(lengths.max())} tokens, but {name} "
            f"has a context of {model.cfg.n_ctx}"
        )
