"""From text to token ids: chat templates, BOS exactly once, answers, spans of characters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from lensclust.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenSpan = tuple[int, int]

# Spelling out a vocabulary takes a third of a second, and tokenizers only ever grow.
_FINGERPRINTS: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, str]] = WeakKeyDictionary()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over a tokenizer's vocabulary, first 16 hex digits."""
    size, fingerprint = _FINGERPRINTS.get(tokenizer, (-1, ""))
    if size != len(tokenizer):
        content = json.dumps(tokenizer.get_vocab(), sort_keys=True)
        fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
        _FINGERPRINTS[tokenizer] = len(tokenizer), fingerprint
    return fingerprint


def render_chat(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    message = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def added_bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """The BOS that the tokenizer puts before every text, or nothing."""
    first = tokenizer("a")["input_ids"][:1]
    adds = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if adds else ""


def without_eos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Some tokenizers close every text; a prompt stays open for its answer."""
    eos = tokenizer.eos_token_id
    return ids[:-1] if len(ids) > 1 and eos is not None and ids[-1] == eos else ids


def continuation(
    tokenizer: PreTrainedTokenizerBase, text: str, prompt: list[int], answer: str
) -> list[int]:
    """Ids of ``answer`` after ``text``: from the joint text, so that a leading space counts."""
    joint = without_eos(tokenizer, tokenizer(text + answer)["input_ids"])
    if len(joint) > len(prompt) and joint[: len(prompt)] == prompt:
        return joint[len(prompt) :]
    return tokenizer(answer, add_special_tokens=False)["input_ids"]


def place_of(text: str, rendered: str) -> int:
    """Characters by which a template moved a text (templates may trim it)."""
    place = rendered.find(text.strip())
    if place < 0:
        raise InputError(f"Prompts: the chat template does not hold the text {text!r} as it is")
    return place - (len(text) - len(text.lstrip()))


def token_span(offsets: Sequence[tuple[int, int]], start: int, stop: int) -> TokenSpan:
    """Tokens that overlap a range of characters; an empty range gives an empty span."""
    overlapping = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start]
    if overlapping and start < stop:
        return overlapping[0], overlapping[-1] + 1
    before = sum(b <= start for _, b in offsets)
    return before, before
