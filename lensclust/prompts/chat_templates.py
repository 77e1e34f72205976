"""Chat templates, rendered in a process that the system bounds (`lensclust.bounded`).

A template comes with a model and is a program. transformers gives it access to nothing, but all
the time and memory there is.
"""

from __future__ import annotations

from typing import Any

from lensclust.bounded import Bounded
from lensclust.errors import InputError

_CHARACTERS = 10_000_000


def render_here(template: Any, text: str, names: dict[str, Any]) -> str:
    """A user's message in a chat template, ready for the reply.

    Args:
        template: the template's source.
        text: the message.
        names: what else the template may use, such as ``bos_token``.

    >>> render("{{ bos_token }}{{ messages[0].content | upper }}", "hello", {"bos_token": "<s>"})
    '<s>HELLO'
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    (chat,), _ = render_jinja_template(
        conversations=[[{"role": "user", "content": text}]],
        chat_template=template,
        add_generation_prompt=True,
        **names,
    )
    if len(chat) > _CHARACTERS:
        raise InputError(f"it makes {len(chat):,} characters, more than {_CHARACTERS:,}")
    return chat


# As `render_here`; raises an InputError of the template's reason, or of what it takes too much of.
render = Bounded(
    __name__,
    "render_here",
    seconds=10,
    memory=2**29,
    needs=["transformers.utils.chat_template_utils"],
)
