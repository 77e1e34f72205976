"""Whether a model generates the same with its key/value cache as without.

transformers and TransformerLens pass the cache by argument name. If a name is lost, every step
sees a single token and the generation is wrong without any error: this happens in transformers
5.24 with TransformerLens 4.3. One short generation detects it. A long generation is also wrong
where frequencies change with the length, which is read from the configuration.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import transformers
from transformer_lens.model_protocol import TransformerLensModel
from transformers import PreTrainedModel

from lensclust.errors import InputError
from lensclust.models.agreement import agrees, forget_outdated, relative_error, remembered
from lensclust.models.batching import few_tokens, without_cache
from lensclust.models.blocks import unhooked
from lensclust.models.frequencies import cached_up_to
from lensclust.models.sites import model_name

log = logging.getLogger(__name__)

# The first release whose caches TransformerLens 4.3 loses; the bound in pyproject.toml.
FIRST_BAD = (5, 24)
ROWS, PROMPT, STEPS = 2, 5, 3
UNBOUNDED = 2**62
# The test generation runs beyond windows of up to this length.
LONGEST_WINDOW = 32


@dataclass(frozen=True)
class Verdict:
    """Result of the check of cached generation.

    Attributes:
        right: whether both computations agree; None if they could not be compared.
        why: one line.
    """

    right: bool | None
    why: str


def require_right_library(model: TransformerLensModel) -> None:
    """Refuse a model whose cached generation the installed libraries break; warn of others.

    Raises:
        InputError: with the versions found and what to install.
    """
    verdict, name, lens = cached_generation(model), model_name(model), version("transformer-lens")
    if verdict.right is not False:
        if (most := cached_up_to(model, 1, UNBOUNDED)) is not None:
            log.warning(
                "load: %s generates wrongly with a key/value cache beyond %s tokens, where its "
                "frequencies change; %s",
                name,
                f"{most:,}",
                uncached(model),
            )
        return
    if tuple(map(int, transformers.__version__.split(".")[:2])) >= FIRST_BAD:
        raise InputError(
            f"load: {name} generates wrongly with a key/value cache under transformers "
            f"{transformers.__version__} and transformer-lens {lens} ({verdict.why}): "
            f"pip install 'transformers<{FIRST_BAD[0]}.{FIRST_BAD[1]}'"
        )
    log.warning(
        "load: %s generates wrongly with a key/value cache (%s); %s",
        name,
        verdict.why,
        uncached(model),
    )


def uncached(model: TransformerLensModel) -> str:
    """How to generate with this model without a cache.

    If TransformerLens creates the states of recurrent layers itself, ``use_past_kv_cache=False``
    makes it call the generation of transformers, which uses the cache of transformers.

    >>> import lensclust as lc
    >>> uncached(lc.load("native:sif-small"))
    'generate with use_past_kv_cache=False'
    """
    if getattr(model.cfg, "is_stateful", False):
        return "generate with model.original_model.generate(tokens, use_cache=False)"
    return "generate with use_past_kv_cache=False"


def wrong_with_cache(model: TransformerLensModel, start: int, stop: int) -> str | None:
    """Why a generation with a cache would be wrong; None if it is right or cannot be checked.

    Args:
        start: tokens in the first forward.
        stop: tokens that are run in total, without the last one generated.

    >>> import lensclust as lc
    >>> wrong_with_cache(lc.load("native:sif-small"), 8, 20) is None
    True
    """
    verdict = cached_generation(model)
    if verdict.right is False:
        return verdict.why
    most = cached_up_to(model, start, stop)
    return None if most is None else f"its frequencies change beyond {most:,} tokens"


def described(model: TransformerLensModel) -> str:
    """A short description of `cached_generation` and the length up to which it is right."""
    verdict, most = cached_generation(model), cached_up_to(model, 1, UNBOUNDED)
    if verdict.right is False or most is None:
        return verdict.why
    return f"{verdict.why}; wrong beyond {most:,} tokens, where frequencies change"


def cached_generation(model: TransformerLensModel) -> Verdict:
    """Check that the logits of a cached generation equal those of one forward, once per model.

    A batch of two prompts is continued by several tokens, and beyond the model's window if that
    is short; the last step depends on every earlier one.

    >>> import lensclust as lc
    >>> cached_generation(lc.load("native:sif-small"))
    Verdict(right=None, why='no key/value cache in NativeModel')
    """
    network: Any = getattr(model, "original_model", None)
    if not isinstance(network, PreTrainedModel):
        return Verdict(None, f"no key/value cache in {type(network or model).__name__}")
    if any(parameter.is_meta for parameter in network.parameters()):
        return Verdict(None, "not tried: weights lie off the devices")
    forget_outdated(model)
    return remembered(model, "cached generation", lambda: _tried(model, network))


def _tried(model: Any, network: Any) -> Verdict:
    most = model.cfg.n_ctx or LONGEST_WINDOW
    window = getattr(network.config.get_text_config(), "sliding_window", None) or 0
    prompt = PROMPT + (window if window <= LONGEST_WINDOW else 0)
    while (step := cached_up_to(model, prompt, prompt + STEPS)) is not None:
        prompt = step + 1
    prompt = max(1, min(prompt, most - STEPS))
    tokens = few_tokens(model, prompt, rows=ROWS)
    steps: list[tuple[int, int | None]] = []

    def notice(network: Any, args: Any, given: Any, output: Any) -> None:
        ids = args[0] if args else given["input_ids"]
        cache: Any = getattr(output, "past_key_values", None)
        try:
            steps.append((ids.shape[1], int(cache.get_seq_length())))
        except (AttributeError, ValueError):  # no cache, or a recurrent one without a length
            steps.append((ids.shape[1], None))

    handle = network.register_forward_hook(notice, with_kwargs=True)
    try:
        with torch.no_grad(), unhooked(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = model.generate(
                tokens,
                max_new_tokens=STEPS,
                do_sample=False,
                stop_at_eos=False,
                output_logits=True,
                return_type="tokens",
                verbose=False,
            )
            handle.remove()
            # The last token is predicted, but never an input.
            plain = model(made.sequences[:, :-1], return_type="logits", **without_cache(model))
    except Exception as error:  # whatever a network's own code raises
        return Verdict(None, f"not tried: {type(error).__name__}: {error}".partition("\n")[0])
    finally:
        handle.remove()
    read, held = steps[-1]
    if read > 1:
        return Verdict(None, "every step runs the whole sequence")
    found, expected = torch.stack(made.logits, 1), plain[:, -STEPS:]
    if not agrees(found, expected, dtype=network.dtype):
        return Verdict(False, f"relative error {relative_error(found, expected):.2g}")
    # In half precision a lost cache can be within rounding; a cache that is too short shows.
    if held not in (None, prompt + STEPS - 1):
        return Verdict(False, f"its cache holds {held} of {prompt + STEPS - 1} tokens")
    return Verdict(True, "equals a forward of the whole sequence")
