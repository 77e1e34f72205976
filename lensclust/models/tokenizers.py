"""Tokenizer fingerprints, and whether two are of the same tokenizer."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Serialising a vocabulary takes a third of a second, and tokenizers only grow.
_FINGERPRINTS: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, str]] = WeakKeyDictionary()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of a tokenizer's vocabulary and, after a dot, of its segmentation rules.

    16 hex digits each. The second part (merges or scores, normaliser, pre-tokenizer) exists for
    fast tokenizers only. Special tokens around a text (BOS, EOS, padding, chat template) are in
    the ids themselves and not included.
    """
    size, fingerprint = _FINGERPRINTS.get(tokenizer, (-1, ""))
    if size != len(tokenizer):
        content = json.dumps(tokenizer.get_vocab(), sort_keys=True)
        fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
        if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
            rules = hashlib.sha256()
            for part in (backend.model, backend.normalizer, backend.pre_tokenizer):
                rules.update(b"\0" if part is None else part.__getstate__())
            fingerprint += f".{rules.hexdigest()[:16]}"
        _FINGERPRINTS[tokenizer] = len(tokenizer), fingerprint
    return fingerprint


def same_tokenizer(one: str, other: str) -> bool:
    """Whether two fingerprints agree in the parts that both have.

    >>> same_tokenizer("aa.bb", "aa"), same_tokenizer("aa.bb", "aa.cc")
    (True, False)
    """
    return all(a == b for a, b in zip(one.split("."), other.split("."), strict=False))
