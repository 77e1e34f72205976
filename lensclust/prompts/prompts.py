"""Prompts with known tasks: token ids, one tidy frame of labels, named spans, answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int, UInt64
from torch import Tensor

from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.figures import as_html
from lensclust.models import tokenizer_fingerprint
from lensclust.prompts.indexing import row_numbers
from lensclust.prompts.labels import label_texts, wanted_texts
from lensclust.prompts.tokenization import (
    ChatPlaces,
    TokenSpan,
    continuation,
    encoded,
    render_chat,
    token_span,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False, repr=False)
class Prompts:
    """Right-padded token sequences with one tidy row of labels each.

    A prompt ends at the token that predicts the answer; the answer is stored separately.

    Attributes:
        tokens: token ids, padded on the right with ``pad_id``.
        lengths: number of tokens of each prompt, without padding.
        rows: one row per prompt: ``task``, ``instruction``, ``template``, ``input``, ``output``,
            ``split`` if the source has them, and further labels.
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

    def __post_init__(self) -> None:
        for name in ("tokens", "lengths"):
            if (given := getattr(self, name)).is_inference():
                with torch.inference_mode(False):  # a copy that supports a backward pass
                    object.__setattr__(self, name, given.clone())
        n = len(self.tokens)
        parts = {"rows": self.rows, "answers": self.answers, "texts": self.texts}
        for name, given in {"lengths": self.lengths, **parts, **(self.spans or {})}.items():
            if given is not None and len(given) != n:
                raise InputError(f"Prompts: {n} prompts but {len(given)} of {name!r}")

    # -- construction ---------------------------------------------------------------------

    @classmethod
    @checked_arguments
    def from_token_lists(
        cls,
        ids: Iterable[Any],
        rows: pd.DataFrame | Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        answers: Iterable[Any] | None = None,
        spans: Mapping[str, Iterable[Any]] | None = None,
        texts: Iterable[str] | None = None,
        tokenizer: str | PreTrainedTokenizerBase = "none",
        pad_id: int | None = 0,
    ) -> Prompts:
        """Build from token ids: one list and one row of labels per prompt.

        Everything is in the order of ``ids``; the index of ``rows`` is not used.

        Args:
            ids: one list (array, tensor) of token ids per prompt.
            rows: a frame, a dict of columns, or a list of dicts.
            answers: token ids that continue each prompt; a single id is an answer of one token.
            spans: name -> half-open range of tokens of each prompt, in a list or an array.
            texts: see `Prompts`.
            tokenizer: the tokenizer that made the ids, or its fingerprint.
            pad_id: the id in the padding, which has no effect; None for 0.

        Raises:
            InputError: if there is no prompt, a prompt is empty, lengths disagree, an id or a
                span is invalid, or a label or text is not Unicode.

        >>> rows = pd.DataFrame({"task": ["copy", "add"]})
        >>> prompts = Prompts.from_token_lists([[1, 5], [1, 6, 7]], rows, answers=[[5], [8]])
        >>> prompts.tokens.tolist(), prompts.position("answer").tolist()
        ([[1, 5, 0], [1, 6, 7]], [1, 2])
        """
        pad_id = 0 if pad_id is None else pad_id
        if not 0 <= pad_id < 2**31:
            raise InputError(f"Prompts: pad_id={pad_id}, expected an id in 0..2**31-1")
        rows = _frame(rows)
        ids = [_ids("prompt", i, each) for i, each in enumerate(_listed("prompts", ids, rows))]
        if len(ids) == 0:
            raise InputError("Prompts: no prompt given, expected at least one")
        if len(rows) != len(ids):
            raise InputError(f"Prompts: {len(ids)} prompts but {len(rows)} of 'rows'")
        empty = [i for i, row in enumerate(ids) if len(row) == 0]
        if empty:
            raise InputError(f"Prompts: prompt {empty[0]} has no token")
        if answers is not None:
            answers = [
                _ids("answer of prompt", i, np.atleast_1d(each) if np.ndim(each) == 0 else each)
                for i, each in enumerate(_listed("answers", answers, rows))
            ]
        texts = None if texts is None else _texts("texts", texts, rows)
        _require_unicode(rows, texts or [])
        lengths = [len(row) for row in ids]
        ranges = {
            name: _ranges(name, given, rows, lengths, "tokens")
            for name, given in _named(spans).items()
        }
        tokens, length = _pad(ids, pad_id)
        return cls(
            tokens=tokens,
            lengths=length,
            rows=rows.reset_index(drop=True),
            answers=None if answers is None else tuple(tuple(a) for a in answers),
            spans={name: torch.from_numpy(span) for name, span in ranges.items()},
            texts=None if texts is None else tuple(texts),
            tokenizer=tokenizer if isinstance(tokenizer, str) else tokenizer_fingerprint(tokenizer),
            pad_id=pad_id,
        )

    @classmethod
    @checked_arguments
    def from_texts(
        cls,
        texts: Iterable[str],
        rows: pd.DataFrame | Mapping[str, Any] | Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        answers: Iterable[str] | None = None,
        spans: Mapping[str, Iterable[Any]] | None = None,
        chat: bool = False,
    ) -> Prompts:
        """Tokenise texts; a beginning-of-sequence token is added once, if the tokenizer adds one.

        An end token that the tokenizer adds is dropped, so that the answer can follow; one that
        is in the text stays.

        Args:
            texts: one prompt each; with ``chat`` the user's message.
            rows: one row of labels per prompt, as in `from_token_lists`.
            tokenizer: the model's tokenizer.
            answers: the text that continues each prompt, with its leading space if the prompt
                does not end in one.
            spans: name -> character range of each text; becomes the range of tokens that
                overlap it. Needs a fast tokenizer.
            chat: wrap each text in the tokenizer's chat template, up to the reply; the tokens are
                those of ``apply_chat_template``, which adds nothing to the template. Spans are
                mapped through the template, even if it trims or escapes the message; if it
                repeats the message, they are in the last copy.

        Raises:
            InputError: if ``chat`` is set and the tokenizer has no chat template, a template
                changes a text so that a span cannot be located, or as `from_token_lists`.
        """
        if chat and not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"Prompts: chat=True, but tokenizer {tokenizer.name_or_path!r} has no chat template"
            )
        spans = _named(spans)
        if spans and not tokenizer.is_fast:
            raise InputError(
                f"Prompts: spans need a fast tokenizer, {type(tokenizer).__name__} gives no "
                "character offsets"
            )
        rows = _frame(rows)
        texts = _texts("texts", texts, rows)
        answers = None if answers is None else _texts("answers", answers, rows)
        _require_unicode(rows, texts)
        _require_unicode(rows, answers or [])
        rendered = [render_chat(tokenizer, text) for text in texts] if chat else texts
        prompts = [encoded(tokenizer, text, offsets=bool(spans), chat=chat) for text in rendered]
        lengths = list(map(len, texts))
        places = None
        if chat and spans:
            places = ChatPlaces(partial(render_chat, tokenizer), [*texts, *rendered])
        token_spans: dict[str, list[TokenSpan]] = {}
        for name, given in spans.items():
            ranges = _ranges(name, given, rows, lengths, "characters").tolist()
            if places is not None:
                ranges = [
                    places.range_of(text, chat_text, start, stop)
                    for text, chat_text, (start, stop) in zip(texts, rendered, ranges, strict=True)
                ]
            token_spans[name] = [
                token_span(prompt.offsets or (), start, stop)
                for prompt, (start, stop) in zip(prompts, ranges, strict=True)
            ]
        return cls.from_token_lists(
            [prompt.ids for prompt in prompts],
            rows,
            answers=None
            if answers is None
            else [
                continuation(tokenizer, text, prompt.ids, answer, chat=chat)
                for text, prompt, answer in zip(rendered, prompts, answers, strict=True)
            ],
            spans=token_spans,
            texts=[prompt.text for prompt in prompts],
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

    @checked_arguments
    def position(self, name: str) -> Int[Tensor, " prompt"]:
        """Token index of a named read position in each prompt.

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
        """The columns of ``rows`` as arrays of numbers or strings (missing ones empty).

        Numbers that pandas may leave out (``Int64``, ``double[pyarrow]``) are numbers too; where
        some are missing, they are floats with NaN.
        """
        return {str(name): _label_array(column) for name, column in self.rows.items()}

    def digest(self) -> str:
        """sha256 over tokens, labels, spans and answers, first 16 hex digits.

        Padding is not included: it has no effect.
        """
        content = hashlib.sha256()
        longest = int(self.lengths.max())
        padding = torch.arange(longest) >= self.lengths[:, None]
        for values in (self.tokens[:, :longest].masked_fill(padding, 0), self.lengths):
            content.update(str(list(values.shape)).encode() + values.numpy().tobytes())
        content.update(self.rows.to_csv(index=False).encode())
        for name, span in sorted((self.spans or {}).items()):
            content.update(json.dumps([name, span.tolist()]).encode())
        if self.answers is not None:
            content.update(json.dumps(self.answers).encode())
        return content.hexdigest()[:16]

    def row_digests(self) -> UInt64[np.ndarray, " prompt"]:
        """A hash of each prompt's tokens, labels, spans and answer."""
        labels = [label_texts(column.array).tolist() for _, column in self.rows.items()]
        spans = [span.tolist() for _, span in sorted((self.spans or {}).items())]
        answers = [self.answers] if self.answers is not None else []
        names = [*map(str, self.rows.columns), *sorted(self.spans or {})]
        found = [
            hashlib.blake2b(json.dumps([names, row[:n], *rest]).encode(), digest_size=8).digest()
            for row, n, *rest in zip(
                self.tokens.tolist(), self.lengths.tolist(), *labels, *spans, *answers, strict=True
            )
        ]
        return np.frombuffer(b"".join(found), dtype="<u8")

    # -- selecting ------------------------------------------------------------------------

    def take(self, indices: Any) -> Prompts:
        """The prompts at ``indices``, in that order, as in pandas' ``iloc``.

        Args:
            indices: row numbers (negative ones count from the end), one truth value for each
                prompt, or a slice; in a list, array, tensor or Series.

        Raises:
            InputError: if a number is not whole or out of range, a mask is of another length, or
                nothing is left.

        >>> rows = pd.DataFrame({"task": ["copy", "add"]})
        >>> prompts = Prompts.from_token_lists([[1], [2]], rows)
        >>> [prompts.take(which).tokens.tolist() for which in ([-1], rows.task == "copy")]
        [[[2]], [[1]]]
        """
        order = torch.from_numpy(row_numbers("Prompts.take", indices, len(self)))
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

    def where(self, *given: Any, **labels: Any) -> Prompts:
        """The prompts whose rows have the given labels: one value each, or several in a list.

        A list may be an array, Series, set, range or any iterable. Labels are compared as texts
        (`lensclust.prompts.labels`): ``task=0`` finds ``"0"``, ``task="0"`` finds 0, and None
        finds the prompts without that label.

        Raises:
            InputError: if a column does not exist, no prompt is left, or an argument has no label
                name (`take` is for masks and row numbers).

        >>> rows = pd.DataFrame({"task": ["copy", "add"], "split": ["train", "test"]})
        >>> len(Prompts.from_token_lists([[1], [2]], rows).where(split=["train"]))
        1
        """
        if given:
            raise InputError(
                f"Prompts.where: a {type(given[0]).__name__} given without the name of a label, "
                "expected labels such as where(task='a'); a mask or row numbers go to take(mask)"
            )
        keep = np.ones(len(self), dtype=bool)
        wanted = {name: wanted_texts(name, given) for name, given in labels.items()}
        for column, texts in wanted.items():
            if column not in self.rows:
                raise InputError(f"Prompts: no label {column!r}: rows have {list(self.rows)}")
            keep &= np.isin(label_texts(self.rows[column].array), sorted(texts))
        if not keep.any():
            named = ", ".join(f"{name}={sorted(texts)}" for name, texts in wanted.items())
            raise InputError(f"Prompts: no prompt has {named}")
        return self.take(np.flatnonzero(keep))


def _frame(rows: Any) -> pd.DataFrame:
    if not isinstance(rows, pd.DataFrame):
        given = type(rows).__name__
        if isinstance(rows, Mapping):
            series = {name: s for name, s in rows.items() if isinstance(s, pd.Series)}
            first, *others = series or [None]
            for name in others:
                if not series[name].index.equals(series[first].index):
                    raise InputError(
                        f"Prompts: rows {first!r} and {name!r} have different indices; expected "
                        "all in the order of the prompts (Series.to_numpy() has no index)"
                    )
        try:
            rows = None if rows is None or isinstance(rows, str) else pd.DataFrame(rows)
        except (TypeError, ValueError):
            rows = None
        if rows is None or not all(isinstance(name, str) for name in rows.columns):
            raise InputError(
                f"Prompts: rows given as a {given}, expected one row of labels for each prompt: a "
                "frame, a dictionary of columns, or a list of dictionaries"
            )
    names = [str(name) for name in rows.columns]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"Prompts: rows have the column {twice!r} twice")
    for name, column in rows.items():
        for i, label in enumerate(column if column.dtype == object else ()):
            if not isinstance(label, Hashable):
                raise InputError(
                    f"Prompts: label {name!r} of prompt {i} is {label!r:.40}, expected one text or "
                    "number per prompt"
                )
    return rows


def _listed(name: str, values: Any, rows: pd.DataFrame) -> list[Any]:
    """Values in the order of the prompts, one for each row."""
    if isinstance(values, (str, bytes, Mapping, pd.DataFrame)) or not hasattr(values, "__iter__"):
        raise InputError(
            f"Prompts: {name} given as a {type(values).__name__}, expected one for each prompt"
        )
    if isinstance(values, pd.Series):
        own = values.index
        if not own.equals(rows.index) and own.sort_values().equals(rows.index.sort_values()):
            raise InputError(
                f"Prompts: {name} and rows have the same index in another order; expected both in "
                "the order of the prompts"
            )
    listed = list(values)
    if name != "prompts" and len(listed) != len(rows):
        raise InputError(f"Prompts: {len(rows)} prompts but {len(listed)} of {name!r}")
    return listed


def _texts(name: str, values: Any, rows: pd.DataFrame) -> list[str]:
    listed = _listed(name, values, rows)
    for i, text in enumerate(listed):
        if not isinstance(text, str):
            raise InputError(f"Prompts: {name} {i} is {text!r:.40}, expected a text")
    return [str(text) for text in listed]


def _ids(what: str, index: int, given: Any) -> list[int]:
    """Token ids as Python integers; nothing is rounded or parsed from text."""
    try:
        array = np.asarray(given)
    except (TypeError, ValueError, RuntimeError):
        array = np.empty((0, 0))
    if array.dtype.kind == "O" and {type(each) for each in array.ravel()} <= {int}:
        raise InputError(f"Prompts: {what} {index} holds an id outside 0..2**31-1")
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(
            f"Prompts: {what} {index} is {given!r:.40}, expected a list of token ids "
            "(whole numbers)"
        )
    if array.size and not (array.min() >= 0 and array.max() < 2**31):
        raise InputError(f"Prompts: {what} {index} holds an id outside 0..2**31-1")
    return [int(each) for each in array]


def _named(spans: Any) -> Mapping[str, Any]:
    if spans is None:
        return {}
    if not isinstance(spans, Mapping):
        raise InputError(
            f"Prompts: spans given as a {type(spans).__name__}, expected name -> ranges"
        )
    return spans


def _ranges(
    name: str, given: Any, rows: pd.DataFrame, lengths: Sequence[int], unit: str
) -> Int[np.ndarray, "prompt 2"]:
    """One half-open range within each prompt."""
    values = given.to_numpy() if isinstance(given, pd.DataFrame) else given
    ranges = []
    for i, (each, length) in enumerate(zip(_listed(name, values, rows), lengths, strict=True)):
        try:
            pair = np.asarray(each)
        except (TypeError, ValueError, RuntimeError):
            pair = np.empty(0)
        if pair.shape != (2,) or pair.dtype.kind not in "iu":
            raise InputError(
                f"Prompts: span {name!r} of prompt {i} is {each!r:.40}, expected a range "
                f"(start, stop) of {unit}"
            )
        start, stop = map(int, pair)
        if not 0 <= start <= stop <= length:
            raise InputError(
                f"Prompts: span {name!r} of prompt {i} is {start} to {stop}, expected "
                f"positions within its {length} {unit}"
            )
        ranges.append((start, stop))
    return np.array(ranges, dtype=np.int64).reshape(-1, 2)


def _require_unicode(rows: pd.DataFrame, texts: Sequence[str]) -> None:
    """Refuse lone surrogates, which Python accepts but files and tokenizers do not."""
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


def _label_array(column: pd.Series) -> np.ndarray:
    dtype: Any = column.dtype
    plain = getattr(dtype, "numpy_dtype", dtype)
    if isinstance(plain, np.dtype) and plain.kind in "iufb":
        there = column.dropna()
        if isinstance(dtype, np.dtype) or len(there) == len(column):
            return column.to_numpy(dtype=plain)
        # As pandas does; floats cannot tell larger whole numbers apart.
        if plain.kind == "f" or (plain.kind in "iu" and (there.abs() < 2**53).all()):
            return column.to_numpy(dtype=np.float64, na_value=np.nan)
    return label_texts(column.array).astype(object)
