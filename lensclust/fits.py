"""Whether prompts fit a model: checked once, at the door of whatever runs them."""

from __future__ import annotations

from transformer_lens.model_protocol import TransformerLensModel

from lensclust.errors import InputError
from lensclust.prompts import Prompts, require_prompts
from lensclust.sites import model_name
from lensclust.tokenization import same_tokenizer, tokenizer_fingerprint


def require_fits(model: TransformerLensModel, prompts: Prompts, *, caller: str) -> None:
    """Refuse a model in training mode and prompts that it cannot read.

    Raises:
        InputError: in the name of ``caller``, if the model is in training mode, or the prompts
            were made with another tokenizer, or are longer than its context.
    """
    require_prompts(caller, prompts)
    name = model_name(model)
    if getattr(model, "training", False):
        raise InputError(f"{caller}: {name} is in training mode; call model.eval()")
    tokenizer = getattr(model, "tokenizer", None)
    known = tokenizer is not None and prompts.tokenizer != "none"
    if known and not same_tokenizer(prompts.tokenizer, tokenizer_fingerprint(tokenizer)):
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
    vocabulary = model.cfg.d_vocab
    largest = int(prompts.tokens.max())
    if vocabulary and largest >= vocabulary:
        raise InputError(
            f"{caller}: token id {largest} given, but {name} has a vocabulary of {vocabulary}; "
            "were the prompts made with another tokenizer?"
        )


def require_answers(model: TransformerLensModel, prompts: Prompts, *, caller: str) -> None:
    """Refuse prompts without answers, and answers that a model cannot read.

    Raises:
        InputError: in the name of ``caller``, if a prompt has no answer, or an answer does not
            fit the model's vocabulary or, behind its prompt, the model's context.
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
    # The last token of an answer is predicted, never read.
    if model.cfg.n_ctx and int(lengths.max()) - 1 > model.cfg.n_ctx:
        row = int(lengths.argmax())
        raise InputError(
            f"{caller}: prompt {row} and its answer have {int(lengths.max())} tokens, but {name} "
            f"has a context of {model.cfg.n_ctx}"
        )
