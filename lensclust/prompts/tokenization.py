"""Tokenization: chat templates, BOS exactly once, answers, character spans."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lensclust.errors import InputError
from lensclust.prompts.chat_templates import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenSpan = tuple[int, int]

# Private-use characters, which have no meaning in texts, templates or tokenizers.
_MARKS = [chr(code) for code in range(0xE000, 0xF900)]
# Prefixes after which an answer is tokenized as inside a text: hardly anything merges with them.
_BEFORE = (_MARKS[0], *".\nqz7")


@dataclass(frozen=True)
class Encoded:
    """A text's token ids, without an end token.

    Attributes:
        text: the text for which the tokenizer gives these ids (except for an end token, and for
            the BOS that a tokenizer adds and a chat template omits).
        ids: the tokens.
        offsets: character range of each token in the given text; empty for added tokens. None
            unless requested.
    """

    text: str
    ids: list[int]
    offsets: list[TokenSpan] | None


def encoded(
    tokenizer: PreTrainedTokenizerBase, text: str, *, offsets: bool = False, chat: bool = False
) -> Encoded:
    """Tokenise a text that an answer will continue, with at most one BOS.

    Nothing is added to a rendered chat, as in ``apply_chat_template``.

    What the tokenizer adds at the end (an end token, ``[SEP]``) is dropped; what is in the text
    stays. If the text begins with the BOS that the tokenizer adds, it is not added again.
    """
    options: dict[str, Any] = {"return_offsets_mapping": True} if offsets else {}
    options |= {"add_special_tokens": False} if chat else {"return_special_tokens_mask": True}
    found = tokenizer(text, **options)
    ids = list(found["input_ids"])
    places = [tuple(place) for place in found["offset_mapping"]] if offsets else None
    if chat:
        without = text.removeprefix(str(tokenizer.bos_token))
        added_again = without != text and list(tokenizer(without)["input_ids"]) == ids
        return Encoded(without if added_again else text, ids, places)
    before, after = _added(tokenizer, text, ids, found["special_tokens_mask"])
    stop = max(1, len(ids) - after)
    start = 0
    bos = tokenizer.bos_token_id
    if before == 1 < len(ids) - after and bos is not None and ids[:2] == [bos, bos]:
        start = before  # the second one is in the text
        without = text.removeprefix(str(tokenizer.bos_token))
        if list(tokenizer(without)["input_ids"])[: stop - start] == ids[start:stop]:
            text = without
    return Encoded(text, ids[start:stop], places and places[start:stop])


def _added(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], mask: list[int]
) -> tuple[int, int]:
    """Number of tokens that a tokenizer added before and after those of the text."""
    if not tokenizer.is_fast:  # only fast tokenizers mark exactly the tokens they added
        spelt = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        extra = len(ids) - len(spelt)
        fitting = [n for n in range(extra + 1) if ids[n : n + len(spelt)] == spelt]
        before = fitting[0] if fitting else 0
        mask = [1] * before + [0] * len(spelt) + [1] * (extra - before if fitting else 0)
    before = next((i for i, added in enumerate(mask) if not added), 0)
    after = next((i for i, added in enumerate(reversed(mask)) if not added), len(mask))
    return before, after


def continuation(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    prompt: list[int],
    answer: str,
    *,
    chat: bool = False,
) -> list[int]:
    """Ids of ``answer`` after ``text``: those of the joint text, so that a leading space counts.

    If a token of the joint text crosses the border, the answer is tokenized as inside a text,
    since many tokenizers prepend a space to a text that stands alone. Prompt and answer decode to
    the joint text. If a tokenizer splits at white space and drops it, the answer is the next word.

    Raises:
        InputError: if no such tokens are found.
    """
    joint = encoded(tokenizer, text + answer, chat=chat).ids
    if len(joint) > len(prompt) and joint[: len(prompt)] == prompt:
        return joint[len(prompt) :]
    if not tokenizer(" ", add_special_tokens=False)["input_ids"]:
        # No token contains spaces, so adjacent texts are consecutive words.
        joint = encoded(tokenizer, f"{text} {answer}", chat=chat).ids
        if joint[: len(prompt)] == prompt:
            return joint[len(prompt) :]
    whole = _spelt(tokenizer, joint)
    for before in ("", *_BEFORE):
        lead = list(tokenizer(before, add_special_tokens=False)["input_ids"]) if before else []
        found = list(tokenizer(before + answer, add_special_tokens=False)["input_ids"])
        ids = found[len(lead) :]
        if found[: len(lead)] == lead and _spelt(tokenizer, prompt + ids) == whole:
            return ids
    raise InputError(
        f"Prompts: no tokens spell the answer {answer!r:.60} after the text that ends in "
        f"{text[-30:]!r}, as its tokens cross the border; expected a border between words, "
        "with the space at the answer's beginning"
    )


def _spelt(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def token_span(offsets: Sequence[tuple[int, int]], start: int, stop: int) -> TokenSpan:
    """Tokens that overlap a range of characters; an empty range gives an empty span."""
    overlapping = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start]
    if overlapping and start < stop:
        return overlapping[0], overlapping[-1] + 1
    before = sum(b <= start for _, b in offsets)
    return before, before


def render_chat(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A user's message in the tokenizer's chat template, up to the reply."""
    from transformers import PreTrainedTokenizerBase

    try:
        # Code, not a template: the user's, or allowed by trust_remote_code.
        if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
            message = [{"role": "user", "content": text}]
            return str(
                tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            )
        template = tokenizer.get_chat_template()
        return render(template, text, dict(tokenizer.special_tokens_map))
    except Exception as error:  # a tokenizer or its template may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"Prompts: the chat template refuses the text {text!r:.60}: {reason}"
        ) from error


class ChatPlaces:
    """Positions of a message's characters in a rendered chat template.

    The template is rendered again with a marker in place of the message, or of one of its
    characters, and the marker is searched, never the message. So the message may also occur
    elsewhere in the template, and a template may trim, escape or upper-case it. If a template
    repeats the message, the last copy counts.

    Args:
        render: text of the user's message -> the rendered chat.
        texts: all messages to be located, and their rendered chats.
    """

    def __init__(self, render: Callable[[str], str], texts: Sequence[str]) -> None:
        self.render = render
        used = {character for text in texts for character in set(text)}
        self.mark = next(mark for mark in _MARKS if mark not in used)
        self.pattern = render(self.mark)

    def range_of(self, text: str, rendered: str, start: int, stop: int) -> TokenSpan:
        """The range of the rendered chat that contains the characters ``start`` to ``stop``.

        Characters that the template omits are skipped.

        Raises:
            InputError: if it omits all of them, or changes the message so that its characters
                cannot be located.
        """
        if self.mark in self.pattern and self.pattern.replace(self.mark, text) == rendered:
            first = len(self.pattern[: self.pattern.rindex(self.mark)].replace(self.mark, text))
            return first + start, first + stop
        shown = range(start, stop) if start < stop else range(start, len(text))
        begin = self._first(text, rendered, shown)
        if start < stop and begin is None:
            raise InputError(
                f"Prompts: the chat template omits characters {start} to {stop} of the "
                f"text {text!r:.60}, so that their span cannot be located"
            )
        if start >= stop or begin is None:
            place = begin[0] if begin else len(rendered)
            return place, place
        end = self._first(text, rendered, reversed(shown)) or begin
        if end < begin:
            raise _changed(text)
        return begin[0], end[1]

    def _first(self, text: str, rendered: str, characters: Iterable[int]) -> TokenSpan | None:
        """The range of the first of some characters that the template does not omit."""
        for index in characters:
            marked = self.render(text[:index] + self.mark + text[index + 1 :])
            found = self._image(marked, rendered)
            if found is not None:
                return found
            if not text[index].isspace() and marked != rendered:
                raise _changed(text)
        return None

    def _image(self, marked: str, rendered: str) -> TokenSpan | None:
        """The range of one character: what a marker in its place replaces in the rendered chat."""
        *copies, after = marked.split(self.mark)
        if not copies:
            return None
        # Each copy renders the character at the same length, as `&lt;` for `<`; or else there is
        # only one way to divide the chat among the copies.
        size = max(0, (len(rendered) - len(marked)) // len(copies) + 1)
        end = len(rendered) - len(after)
        if not (rendered.startswith(copies[0]) and rendered.endswith(after)):
            return None
        if size and _evenly(copies, rendered, size) == end - size:
            return end - size, end
        places = {_leftmost(copies, rendered, end), _rightmost(copies, rendered, end)}
        place = places.pop()
        if places or place is None:
            return None
        return place, end


# Start of the last gap between pieces of a text, which begins with the first piece; no gap is
# empty, and the last ends at `end`. The search does not backtrack, which could take forever.


def _evenly(pieces: list[str], text: str, size: int) -> int | None:
    """The last gap's start if all gaps have one size."""
    place = -size
    for piece in pieces:
        place += size
        if not text.startswith(piece, place):
            return None
        place += len(piece)
    return place


def _leftmost(pieces: list[str], text: str, end: int) -> int | None:
    """The last gap's start with each piece as early as possible.

    >>> _leftmost(["a", "b"], "axbxbx", 6), _rightmost(["a", "b"], "axbxbx", 6)
    (3, 5)
    """
    place = len(pieces[0])
    for piece in pieces[1:]:
        found = text.find(piece, place + 1, end)
        if found < 0:
            return None
        place = found + len(piece)
    return place if place < end else None


def _rightmost(pieces: list[str], text: str, end: int) -> int | None:
    """The last gap's start with each piece as late as possible."""
    last, limit = None, end
    for piece in reversed(pieces[1:]):
        found = text.rfind(piece, 0, max(0, limit - 1))
        if found < 0:
            return None
        last = found + len(piece) if last is None else last
        limit = found
    place = len(pieces[0])
    return (place if last is None else last) if place < limit else None


def _changed(text: str) -> InputError:
    return InputError(
        f"Prompts: the chat template changes the text {text!r}, so that its characters cannot be "
        "located; give spans without chat=True, or another template"
    )
