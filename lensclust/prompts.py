"""Prompts whose task identity is known: token ids, one tidy frame, named spans, answers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lensclust.errors import InputError
from lensclust.showing import as_html
from lensclust.tokenization import (
    TokenSpan,
    added_bos,
    continuation,
    place_of,
    render_chat,
    token_span,
    tokenizer_fingerprint,
    without_eos,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False, repr=False)
class Prompts:
    """Right-padded token sequences with one tidy row of labels each.

    A prompt ends at the token that predicts the answer; the answer itself is kept apart.

    Attributes:
        tokens: token ids, padded on the right with ``pad_id``.
        lengths: number of real tokens of each prompt.
        rows: one row a prompt: ``task``, ``instruction``, ``template``, ``input``, ``output``,
            ``split`` where the source has them, and whatever else it labels.
        answers: the token ids that continue each prompt, or None.
        spans: name -> half-open token range ``[start, stop)`` of each prompt.
        texts: the text each prompt was tokenised from, or None.
        tokenizer: fingerprint of the tokenizer, ``"none"`` for bare token lists.
        pad_id: the id in the padding.
    """

    tokens: Int[Tensor, "prompt position"]
    lengths: Int[Tensor, " prompt"]
    rows: pd.DataFrame
    answers: tuple[tuple[int, ...], ...] | None = None
    spans: Mapping[str, Int[Tensor, "prompt 2"]] | None = None
    texts: tuple[str, ...] | None = None
    tokenizer: str = "none"
    pad_id: int = 0

    # -- construction ---------------------------------------------------------------------

    @classmethod
    def from_token_lists(
        cls,
        ids: Sequence[Sequence[int]],
        rows: pd.DataFrame,
        *,
        answers: Sequence[Sequence[int]] | None = None,
        spans: Mapping[str, Sequence[TokenSpan]] | None = None,
        texts: Sequence[str] | None = None,
        tokenizer: str = "none",
        pad_id: int = 0,
    ) -> Prompts:
        """Build from token ids: one list and one row of labels a prompt.

        Raises:
            InputError: if there is no prompt, a prompt is empty, lengths disagree, an id or a
                span cannot be one, or a label or text is not Unicode.

        >>> rows = pd.DataFrame({"task": ["copy", "add"]})
        >>> prompts = Prompts.from_token_lists([[1, 5], [1, 6, 7]], rows, answers=[[5], [8]])
        >>> prompts.tokens.tolist(), prompts.position("answer").tolist()
        ([[1, 5, 0], [1, 6, 7]], [1, 2])
        """
        if len(ids) == 0:
            raise InputError("Prompts: no prompt given, expected at least one")
        for name, given in {"rows": rows, "answers": answers, **(spans or {})}.items():
            if given is not None and len(given) != len(ids):
                raise InputError(f"Prompts: {len(ids)} prompts but {len(given)} of {name!r}")
        empty = [i for i, row in enumerate(ids) if len(row) == 0]
        if empty:
            raise InputError(f"Prompts: prompt {empty[0]} has no token")
        _require_ids("prompt", ids)
        _require_ids("answer of prompt", answers or [])
        _require_unicode(rows, texts or [])
        for name, span in (spans or {}).items():
            for i, ((start, stop), row) in enumerate(zip(span, ids, strict=True)):
                if not 0 <= start <= stop <= len(row):
                    raise InputError(
                        f"Prompts: span {name!r} of prompt {i} is {start} to {stop}, expected "
                        f"places within its {len(row)} tokens"
                    )
        tokens, lengths = _pad(ids, pad_id)
        return cls(
            tokens=tokens,
            lengths=lengths,
            rows=rows.reset_index(drop=True),
            answers=None if answers is None else tuple(tuple(map(int, a)) for a in answers),
            spans={name: torch.tensor(list(span)) for name, span in (spans or {}).items()},
            texts=None if texts is None else tuple(texts),
            tokenizer=tokenizer,
            pad_id=pad_id,
        )

    @classmethod
    def from_texts(
        cls,
        texts: Sequence[str],
        rows: pd.DataFrame,
        tokenizer: PreTrainedTokenizerBase,
        *,
        answers: Sequence[str] | None = None,
        spans: Mapping[str, Sequence[TokenSpan]] | None = None,
        chat: bool = False,
    ) -> Prompts:
        """Tokenise texts; a beginning-of-sequence token is added as the tokenizer does, once.

        Args:
            texts: one prompt each; with ``chat`` the user's message.
            answers: the text that continues each prompt, with its leading space where the
                prompt has none.
            spans: name -> character range of each text; becomes the range of tokens that
                overlap it. Needs a fast tokenizer.
            chat: wrap each text in the tokenizer's chat template, ready for the reply.

        Raises:
            InputError: if ``chat`` is asked of a tokenizer without a chat template, or as
                `from_token_lists`.
        """
        if tokenizer is None:
            raise InputError("Prompts: texts need a tokenizer, given None (a model without one?)")
        if chat and not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"Prompts: chat=True, but tokenizer {tokenizer.name_or_path!r} has no chat template"
            )
        _require_unicode(rows, texts)
        _require_unicode(rows, answers or [])
        rendered = [render_chat(tokenizer, text) for text in texts] if chat else list(texts)
        # So that `text()` gives these very ids again, a text never spells the BOS that its
        # tokenizer adds.
        bos = added_bos(tokenizer)
        rendered = [text.removeprefix(bos) for text in rendered]
        encoded = [tokenizer(text, return_offsets_mapping=bool(spans)) for text in rendered]
        ids = [without_eos(tokenizer, row["input_ids"]) for row in encoded]
        token_spans = {}
        for name, ranges in (spans or {}).items():
            shifts = map(place_of, texts, rendered)
            token_spans[name] = [
                token_span(row["offset_mapping"], start + shift, stop + shift)
                for row, (start, stop), shift in zip(encoded, ranges, shifts, strict=True)
            ]
        return cls.from_token_lists(
            ids,
            rows,
            answers=None
            if answers is None
            else [
                continuation(tokenizer, text, prompt, answer)
                for text, prompt, answer in zip(rendered, ids, answers, strict=True)
            ],
            spans=token_spans,
            texts=rendered,
            tokenizer=tokenizer_fingerprint(tokenizer),
            pad_id=pad if isinstance(pad := tokenizer.pad_token_id, int) else 0,
        )

    # -- reading --------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        tasks = f", {self.rows['task'].nunique()} tasks" if "task" in self.rows else ""
        longest = int(self.lengths.max())
        return f"Prompts({len(self)} prompts{tasks}, up to {longest} tokens)"

    def _repr_html_(self) -> str:
        return as_html(repr(self), self.rows)

    def text(self, index: int) -> str:
        """The text of one prompt, special tokens included, without the answer."""
        if self.texts is None:
            raise InputError("Prompts: built from token ids, so there is no text to show")
        return self.texts[index]

    def position(self, name: str) -> Int[Tensor, " prompt"]:
        """Token index of a named read position, resolved for each prompt.

        ``answer`` is the token that predicts the answer (the last of the prompt);
        ``SPAN_start`` and ``SPAN_end`` are the first and last token of a named span.

        Raises:
            InputError: if there is no such position, or a prompt's span is empty.
        """
        if name == "answer":
            return self.lengths - 1
        span, _, side = name.rpartition("_")
        if side not in ("start", "end") or span not in (self.spans or {}):
            known = ["answer", *(f"{s}_{e}" for s in self.spans or {} for e in ("start", "end"))]
            raise InputError(f"position {name!r} does not exist: these prompts have {known}")
        start, stop = (self.spans or {})[span].unbind(-1)
        if bool((stop <= start).any()):
            row = int((stop <= start).nonzero()[0])
            raise InputError(f"position {name!r}: span {span!r} of prompt {row} is empty")
        return start if side == "start" else stop - 1

    def with_answers(
        self,
    ) -> tuple[Int[Tensor, "prompt length"], Int[Tensor, " prompt"], Bool[Tensor, "prompt length"]]:
        """Token ids with the answers appended, their lengths, and a mask of the answer tokens.

        Raises:
            InputError: if the prompts have no answers.
        """
        if self.answers is None:
            raise InputError("Prompts: no answers given, needed to append them")
        ids = [
            row[:length].tolist() + list(answer)
            for row, length, answer in zip(
                self.tokens, self.lengths.tolist(), self.answers, strict=True
            )
        ]
        tokens, lengths = _pad(ids, self.pad_id)
        index = torch.arange(tokens.shape[1])
        mask = (index >= self.lengths[:, None]) & (index < lengths[:, None])
        return tokens, lengths, mask

    def label_arrays(self) -> dict[str, np.ndarray]:
        """The columns of ``rows`` as arrays of numbers or strings (missing ones empty)."""
        return {
            str(name): column.to_numpy()
            if column.dtype.kind in "iufb"
            else np.array(["" if pd.isna(v) else str(v) for v in column], dtype=object)
            for name, column in self.rows.items()
        }

    def digest(self) -> str:
        """sha256 over tokens, lengths and labels, first 16 hex digits."""
        content = hashlib.sha256()
        for values in (self.tokens, self.lengths):
            content.update(str(list(values.shape)).encode() + values.numpy().tobytes())
        content.update(self.rows.to_csv(index=False).encode())
        return content.hexdigest()[:16]

    # -- selecting ------------------------------------------------------------------------

    def take(self, indices: Sequence[int] | np.ndarray) -> Prompts:
        """The prompts at ``indices``, in that order."""
        order = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        if len(order) == 0:
            raise InputError("Prompts: none left after the selection, expected at least one")
        lengths = self.lengths[order]
        longest = int(lengths.max())
        return Prompts(
            tokens=self.tokens[order, :longest],
            lengths=lengths,
            rows=self.rows.iloc[order.numpy()].reset_index(drop=True),
            answers=None if self.answers is None else tuple(self.answers[i] for i in order),
            spans={name: span[order] for name, span in (self.spans or {}).items()},
            texts=None if self.texts is None else tuple(self.texts[i] for i in order),
            tokenizer=self.tokenizer,
            pad_id=self.pad_id,
        )

    def where(self, **labels: Any) -> Prompts:
        """The prompts whose row has the given labels (a value or a list of values each).

        Raises:
            InputError: if a column does not exist or no prompt is left.

        >>> rows = pd.DataFrame({"task": ["copy", "add"], "split": ["train", "test"]})
        >>> len(Prompts.from_token_lists([[1], [2]], rows).where(split=["train"]))
        1
        """
        keep = np.ones(len(self), dtype=bool)
        for column, wanted in labels.items():
            if column not in self.rows:
                raise InputError(f"Prompts: no label {column!r}: rows have {list(self.rows)}")
            values = list(wanted) if isinstance(wanted, (list, tuple, set)) else [wanted]
            keep &= self.rows[column].isin(values).to_numpy()
        if not keep.any():
            raise InputError(f"Prompts: no prompt has {labels}")
        return self.take(np.flatnonzero(keep))


def _require_ids(what: str, lists: Sequence[Sequence[int]]) -> None:
    for i, row in enumerate(lists):
        if len(row) and not (min(row) >= 0 and max(row) < 2**31):
            raise InputError(f"Prompts: {what} {i} holds an id outside 0..2**31-1")


def _require_unicode(rows: pd.DataFrame, texts: Sequence[str]) -> None:
    """Half of a surrogate pair is a character to Python, and to no file or tokenizer."""
    labels = {str(name): column for name, column in rows.items() if column.dtype == object}
    for name, column in {"texts": texts, **labels}.items():
        for i, text in enumerate(column):
            if isinstance(text, str) and not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError:
                    raise InputError(f"Prompts: {name!r} of prompt {i} is not Unicode") from None


def _pad(
    ids: Sequence[Sequence[int]], pad_id: int
) -> tuple[Int[Tensor, "prompt position"], Int[Tensor, " prompt"]]:
    lengths = torch.tensor([len(row) for row in ids])
    tokens = torch.full((len(ids), int(lengths.max())), pad_id)
    for index, row in enumerate(ids):
        tokens[index, : len(row)] = torch.as_tensor(row)
    return tokens, lengths
