"""Processes that end by a signal, or with their parent.

``python processes.py PARENT MODULE [argument ...]`` runs a module's command and ends with the
process PARENT.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Seconds between two checks of whether the parent is alive.
_INTERVAL = 0.5


class Terminated(KeyboardInterrupt):
    """Raised at SIGTERM, so that handlers of an interrupt clean up."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Context in which SIGTERM raises `Terminated`, as ctrl-C raises KeyboardInterrupt.

    Python ignores exceptions while it finalizes an object: such a signal is sent again.
    """
    on_main_thread = threading.current_thread() is threading.main_thread()
    if not on_main_thread or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    hook = sys.unraisablehook
    numbers = {KeyboardInterrupt: signal.SIGINT, Terminated: signal.SIGTERM}

    def again(lost: Any) -> None:
        if lost.exc_type in numbers and hasattr(signal, "pthread_kill"):
            # A real signal, which wakes a waiting main thread.
            resent = [threading.main_thread().ident, numbers[lost.exc_type]]
            threading.Timer(0.05, signal.pthread_kill, resent).start()
        else:
            hook(lost)

    signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def end_with(parent: int) -> None:
    """End this process soon after its parent has ended, for whatever reason."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_INTERVAL)
        os._exit(1)

    threading.Thread(target=look, name="end with the parent", daemon=True).start()


def following(module: str) -> list[str]:
    """The start of a command that runs a module and ends with this process."""
    return [sys.executable, __file__, str(os.getpid()), module]


if __name__ == "__main__":
    # Modules in this folder must not be importable by their bare names.
    sys.path = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]
    end_with(int(sys.argv[1]))
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
