"""Chat templates, rendered in a process that the system bounds in time and memory.

A template comes with a model and is a program. transformers gives it access to nothing, but all
the time and memory there is: a loop may never end, and one power of a number cannot be interrupted
from Python. The process is started for the first chat and ends with this one.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

from lensclust.errors import InputError

# What rendering one chat may take (seconds, bytes), and how many characters it may have.
SECONDS, MEMORY, CHARACTERS = 10, 2**29, 10_000_000
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from lensclust.chat_templates import serve; serve()"
)


def render(template: Any, text: str, names: dict[str, Any]) -> str:
    """A user's message in a chat template, ready for the reply.

    Args:
        template: the template's source.
        text: the message.
        names: what else the template may use, such as ``bos_token``.

    Raises:
        InputError: with the template's own reason, or with what it takes too much of.

    >>> render("{{ bos_token }}{{ messages[0].content | upper }}", "hello", {"bos_token": "<s>"})
    '<s>HELLO'
    """
    order = json.dumps({"template": template, "text": text, "names": names}, default=str)
    answer = _RENDERER.ask(order)
    if "error" in answer:
        raise InputError(answer["error"])
    return answer["chat"]


class _Renderer:
    """The process, asked for one chat at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: Any = None
        self.owner = 0

    def ask(self, order: str) -> dict[str, str]:
        with self.lock:
            if self.owner != os.getpid():  # after a fork it is another's
                self.process, self.owner = _start(), os.getpid()
            try:
                self.process.stdin.write(order + "\n")
                self.process.stdin.flush()
                answer = self.process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            except BaseException:  # interrupted: the answer must not be taken for the next one's
                self.end()
                raise
            if answer:
                return json.loads(answer)
            status = self.process.wait()
            self.end()
        if status == -signal.SIGALRM:
            return {"error": f"it takes more than {SECONDS} seconds"}
        return {"error": f"it ends its process (status {status})"}

    def end(self) -> None:
        if self.owner == os.getpid():
            self.owner = 0
            self.process.kill()
            with suppress(OSError):
                self.process.communicate()


_RENDERER = _Renderer()
atexit.register(_RENDERER.end)


def _start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, json.dumps(sys.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # ctrl-C is for the process that waits
    )


def serve() -> None:
    """What the process does: a line in, a line out, until there is no one to ask."""
    from transformers.utils.chat_template_utils import render_jinja_template

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with suppress(OSError, ValueError):  # not every system bounds it
        with open("/proc/self/statm") as file:
            begun = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (begun + MEMORY, begun + MEMORY))
    for line in sys.stdin:
        signal.alarm(SECONDS)
        try:
            order = json.loads(line)
            message = [{"role": "user", "content": order["text"]}]
            (chat,), _ = render_jinja_template(
                conversations=[message],
                chat_template=order["template"],
                add_generation_prompt=True,
                **order["names"],
            )
            answer = {"chat": chat}
            if len(chat) > CHARACTERS:
                answer = {"error": f"it makes {len(chat):,} characters, more than {CHARACTERS:,}"}
        except MemoryError:
            answer = {"error": f"it takes more than {MEMORY // 2**20} MiB"}
        except Exception as error:  # whatever a template raises
            reason = str(error)[:300].splitlines()
            answer = {"error": reason[0] if reason else type(error).__name__}
        print(json.dumps(answer), flush=True)
        signal.alarm(0)
        del answer
