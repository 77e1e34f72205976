"""Chat templates, rendered in a process with limited time and memory (`lensclust.bounded`).

A template comes with a model and is a program. transformers sandboxes it, but does not limit its
time and memory.
"""

from __future__ import annotations

from typing import Any

from lensclust.bounded import Bounded
from lensclust.errors import InputError

_CHARACTERS = 10_000_000


def render_here(template: Any, text: str, names: dict[str, Any]) -> str:
    """Render a user's message in a chat template, up to the reply.

    Args:
        template: the template's source.
        text: the message.
        names: further variables of the template, such as ``bos_token``.

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


# As `render_here`; raises an InputError with the template's reason, or the limit it exceeds.
render = Bounded(
    __name__,
    "render_here",
    seconds=10,
    memory=2**29,
    needs=["transformers.utils.chat_template_utils"],
)
