"""Track the position in its sequence of each token of a forward, also in generation.

With a key/value cache a sequence is run in several forwards: the prompt in the first (the
prefill), then one token at a time. Without one, every step of a generation runs the whole sequence
again. A hook sees a forward; a user specifies a position in the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.errors import InputError
from lensclust.models import hooks_are_off, uncached

# Names of the arguments that pass caches to networks.
CACHES = ("past_key_values", "cache", "layer_past", "cache_params")
INPUTS = ("input_ids", "inputs_embeds", "input", "tokens")


@dataclass(frozen=True, eq=False)
class Stretch:
    """The tokens of one forward.

    Attributes:
        index: position of each token in its row's sequence ``(row, token)``; -1 at padding that
            the attention mask hides.
        begins: whether this forward is the first of the sequence.
        cached: whether it reads or fills a key/value cache.
        goes_on: whether later forwards can continue the sequence.
        prompt_end: position of the last token of each row's prompt, that is, of the first forward
            of the sequence; None if that was not seen, or the prompt was run in pieces.
    """

    index: Int[Tensor, "row token"]
    begins: bool
    cached: bool
    goes_on: bool
    prompt_end: Int[Tensor, " row"] | None


@dataclass
class _Generation:
    """State shared by the forwards of one generating call."""

    prompt_end: Tensor | None = None
    in_pieces: bool = False


class _Follower:
    """Track the sequences that a network runs."""

    def __init__(self, notice: Callable[[Stretch], None], caller: str, advice: str) -> None:
        self.notice = notice
        self.caller = caller
        self.advice = advice
        self.generation: _Generation | None = None
        # Known state of the sequence of each cache.
        self.prompt_ends: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()
        self.beginning: Tensor | None = None

    def before(self, network: Any, args: tuple[Any, ...], given: Mapping[str, Any]) -> None:
        if hooks_are_off():
            self.beginning = None
            return
        rows, length = self._shape(args, given)
        cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
        past = self._past(cache, given)
        index = self._index(rows, length, past, given)
        end, self.beginning = None, None
        generation = self.generation or _Generation()
        again = past == 0 and generation.prompt_end is not None
        if again:
            end = generation.prompt_end
        elif past == 0:
            end = self.beginning = generation.prompt_end = index.amax(1)
        elif length == 1 and not isinstance(cache, tuple):
            end = self.prompt_ends.get(cache)
        cached = cache is not None or bool(given.get("use_cache"))
        goes_on = cached or self.generation is not None
        end = None if generation.in_pieces else end
        self.notice(Stretch(index, past == 0 and not again, cached, goes_on, end))

    def after(self, network: Any, args: Any, given: Any, output: Any) -> None:
        if self.beginning is not None:
            caches = (getattr(output, name, None) for name in CACHES)
            for cache in caches:
                if cache is not None and not isinstance(cache, tuple):
                    self.prompt_ends[cache] = self.beginning

    @contextmanager
    def during(self, generation: _Generation) -> Iterator[None]:
        outer, self.generation = self.generation, generation
        try:
            yield
        finally:
            self.generation = outer

    def _shape(self, args: tuple[Any, ...], given: Mapping[str, Any]) -> tuple[int, int]:
        inputs = [*args[:1], *(given.get(name) for name in INPUTS)]
        for value in inputs:
            if isinstance(value, Tensor) and value.ndim >= 2:
                return value.shape[0], value.shape[1]
        raise self._lost("it was given neither token ids nor embeddings")

    def _past(self, cache: Any, given: Mapping[str, Any]) -> int:
        """Number of tokens of the sequence that were run before."""
        if (stands := given.get("cache_position")) is not None:
            return int(stands.flatten()[0])
        if cache is None:
            return 0
        if isinstance(cache, tuple):
            return int(cache[0][0].shape[-2])
        try:
            return int(cache.get_seq_length())
        except (AttributeError, ValueError) as error:
            # A recurrent state does not hold its number of tokens.
            raise self._lost(
                f"a {type(cache).__name__} does not say how many came before"
            ) from error

    def _index(
        self, rows: int, length: int, past: int, given: Mapping[str, Any]
    ) -> Int[Tensor, "row token"]:
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            real = mask != 0
            if mask.shape == (rows, past + length):
                return torch.where(real, real.long().cumsum(1) - 1, -1)[:, past:]
            if mask.shape[1] != length or not bool(real.all()):
                raise self._lost(
                    f"its attention mask is {tuple(mask.shape)} for {rows} rows of {past} + "
                    f"{length} tokens"
                )
        elif mask is not None and isinstance(positions, Tensor) and positions.ndim == 2:
            return positions.expand(rows, length)
        return torch.arange(past, past + length).expand(rows, length)

    def _lost(self, why: str) -> InputError:
        return InputError(
            f"{self.caller}: cannot tell where in its sequence a forward stands ({why}); "
            f"{self.advice}, on token ids and a mask of 0 and 1"
        )


@contextmanager
def following(
    model: TransformerLensModel, notice: Callable[[Stretch], None], *, caller: str
) -> Iterator[None]:
    """Call ``notice`` with the positions of the tokens before every forward.

    A forward with a cache continues the cache's sequence. One without starts a sequence, unless
    it is a later step of the same ``generate`` (or ``generate_stream``, ``hf_generate``), which
    runs the whole sequence again.

    Args:
        caller: function name used in error messages.

    Raises:
        InputError: from the forward, if the number of earlier tokens cannot be determined.
    """
    hooked: Any = model
    network: Any = getattr(model, "original_model", model)
    follower = _Follower(notice, caller, uncached(model))
    handles = [
        network.register_forward_pre_hook(follower.before, with_kwargs=True),
        network.register_forward_hook(follower.after, with_kwargs=True),
    ]
    wrapped = []
    try:
        for owner in {id(each): each for each in (hooked, network)}.values():
            for name in ("generate", "generate_stream"):
                if callable(getattr(owner, name, None)):
                    wrapped.append((owner, name, vars(owner).get(name)))
                    wrapper = _generating if name == "generate" else _streaming
                    object.__setattr__(owner, name, wrapper(getattr(owner, name), follower))
        yield
    finally:
        for owner, name, before in reversed(wrapped):
            if before is None:
                object.__delattr__(owner, name)
            else:
                object.__setattr__(owner, name, before)
        for handle in handles:
            handle.remove()


def _generating(generate: Callable[..., Any], follower: _Follower) -> Callable[..., Any]:
    def followed(*args: Any, **options: Any) -> Any:
        config = options.get("generation_config")
        pieces = options.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        with follower.during(_Generation(in_pieces=pieces is not None)):
            return generate(*args, **options)

    return followed


def _streaming(stream: Callable[..., Any], follower: _Follower) -> Callable[..., Any]:
    def followed(*args: Any, **options: Any) -> Iterator[Any]:
        generation, parts = _Generation(), stream(*args, **options)
        while True:
            with follower.during(generation):
                try:
                    part = next(parts)
                except StopIteration:
                    return
            yield part

    return followed
