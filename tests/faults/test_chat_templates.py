"""A chat template comes from elsewhere: whatever it does ends soon, in a chat or in one line."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import lensclust as lc
from lensclust.prompts.chat_templates import render
from lensclust.prompts.tokenization import ChatPlaces
from tests.tiny import byte_tokenizer

ROWS = {"task": ["a"]}
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}"
END = "{% endfor %}{% endfor %}"
DOUBLED = (
    "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}{{ ns.x }}"
)
HOSTILE = {
    "it never ends": (LOOP + END, "more than 2 seconds"),
    "it never ends in one operation": ("{{ (7 ** 7) ** (7 ** 9) % 10 }}", "more than 2 seconds"),
    "a gigabyte at once": ("{{ 'a' * 10**10 }}", "more than 512 MiB"),
    "a gigabyte by a filter": ("{{ 'a' | center(10**10) }}", "more than 512 MiB"),
    "a gigabyte by a format": ("{{ '%10000000000d' | format(1) }}", "more than 512 MiB"),
    "a gigabyte by doubling": (DOUBLED, "more than 512 MiB"),
    "twenty million characters": ("{{ 'a' * 20000000 }}", "20,000,000 characters, more than"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "depth": ("{{ " + "(" * 100_000 + ")" * 100_000 + " }}", "the chat template refuses"),
    "a sign without end": ("{{ messages", "unexpected end"),
    "of no such name": ("{{ nothing.at.all }}", "is undefined"),
    "its own reason": ("{{ raise_exception('no\nsuch role') }}", "refuses the text 'hi': no"),
    "a long reason": ("{{ raise_exception('a' * 10**7) }}", ": a{300}$"),
    "reaches out": ("{{ ''.__class__.__mro__ }}", "refuses the text"),
    "a list": ([1], "the chat template refuses"),
    "several, none of them usual": ({"tool": "x"}, "multiple chat templates"),
}


def chat(template: Any, text: str = "hi", **options: Any) -> lc.Prompts:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return lc.Prompts.from_texts([text], ROWS, tokenizer, chat=True, **options)


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two seconds are enough to see that there is an end."""
    render.end()
    monkeypatch.setattr(render, "seconds", 2)
    yield
    render.end()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_one_line(name: str) -> None:
    template, message = HOSTILE[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(lc.InputError, match=message) as caught:
        chat(template)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kB
    assert chat("{{ messages[0].content }}!").text(0) == "hi!"  # the next one is not its victim


def test_templates_are_bounded_on_every_thread_at_a_time() -> None:
    said: dict[str, str] = {}

    def ask(name: str, template: str) -> None:
        try:
            said[name] = chat(template, name).text(0)
        except lc.InputError as error:
            said[name] = str(error)

    texts = {"endless": LOOP + END, "a": "{{ messages[0].content }}1", "b": "{{ 2 }}", "c": "{"}
    threads = [threading.Thread(target=ask, args=item) for item in texts.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert "more than 2 seconds" in said.pop("endless")
    assert said == {"a": "a1", "b": "2", "c": "{"}


@pytest.mark.parametrize("copies", [3, 2000])
def test_a_message_that_comes_many_times_is_found_in_time(copies: int) -> None:
    """Each copy longer than the message: a search that goes back would take for ever."""
    piece = "{{ messages[0].content | replace('a', 'aab') }}a"
    began = time.perf_counter()
    prompts = chat(piece * copies, "aaa", spans={"x": [(0, 3)]})
    assert time.perf_counter() - began < 30
    assert prompts.spans is not None
    first, last = prompts.spans["x"][0].tolist()
    assert prompts.text(0).encode()[first:last] == b"aabaabaab"
    assert last == len(prompts.text(0)) - 1


@pytest.mark.slow
def test_an_interrupted_question_gets_no_other_ones_answer() -> None:
    program = f"""
        import signal, threading, os
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
        import lensclust as lc
        from tests.tiny import byte_tokenizer
        tokenizer = byte_tokenizer()
        ask = lambda: lc.Prompts.from_texts(["hi"], {ROWS}, tokenizer, chat=True).text(0)
        ask()
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
        tokenizer.chat_template = {LOOP + END!r}
        try:
            ask()
        except KeyboardInterrupt:
            pass
        tokenizer.chat_template = "{{{{ 5 }}}}"
        print(ask())
    """
    lines = [line.removeprefix(" " * 8) for line in program.splitlines()]
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", "\n".join(lines)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout, done.returncode) == ("5\n", 0), done.stderr
    assert "ResourceWarning" not in done.stderr


def test_the_process_ends_with_its_parent() -> None:
    program = (
        "import os, signal; from lensclust.prompts.chat_templates import render; "
        "render('a', 'b', {}); print(render.process.pid, flush=True); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    for _ in range(100):
        try:
            os.kill(int(done.stdout), 0)
        except ProcessLookupError:
            return
        status = Path(f"/proc/{int(done.stdout)}/stat")
        if status.exists() and status.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("it lives")


def test_places_of_a_message_are_the_only_ones() -> None:
    places = ChatPlaces(lambda text: f"<{text}|{text}>", ["abc"])
    assert places.range_of("abc", "<abc|abc>", 1, 2) == (6, 7)
    shouted = ChatPlaces(lambda text: f"<{text.upper() * 2}>", ["abc"])
    assert shouted.range_of("abc", "<ABCABC>", 0, 2) == (4, 6)
