"""Functions that run in a separate process with limited time and memory.

For programs that come with data, such as a chat template or a figure's specification: no limit
inside Python can stop a single operation that takes all time or memory.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from lensclust.errors import InputError

_LATE = getattr(signal, "SIGALRM", None)
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from lensclust.bounded import serve; serve(*json.loads(sys.argv[2]))"
)


class Bounded:
    """A function in a process that starts with the first call and ends with this process.

    Args:
        module, name: location of the function. Its arguments and result must be JSON values.
        seconds: time limit of a call.
        memory: memory limit of a call in bytes, beyond the process's initial memory; only on
            systems that support it (Linux).
        needs: modules that the function imports, which do not count against the limits.

    >>> Bounded("posixpath", "join", seconds=10, memory=2**29)("a", "b")
    'a/b'
    """

    def __init__(
        self, module: str, name: str, *, seconds: int, memory: int, needs: Sequence[str] = ()
    ) -> None:
        self.module, self.name, self.needs = module, name, needs
        self.seconds, self.memory = seconds, memory
        self.lock = threading.Lock()
        self.process: Any = None
        self.owner = 0
        atexit.register(self.end)

    def __call__(self, *arguments: Any) -> Any:
        """Call the function and return its result.

        Raises:
            InputError: with the first line of the function's error, or the exceeded limit.
        """
        order = json.dumps(arguments, default=str)
        with self.lock:
            if self.owner != os.getpid():  # after a fork it belongs to another process
                self.process, self.owner = self._start(), os.getpid()
            try:
                self.process.stdin.write(order + "\n")
                self.process.stdin.flush()
                answer = self.process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            except BaseException:  # interrupted: a late answer must not go to the next call
                self.end()
                raise
            if not answer:
                status = self.process.wait()
                self.end()
                if _LATE and status == -_LATE:
                    raise InputError(f"it takes more than {self.seconds} seconds")
                raise InputError(f"it ends its process ({status})")
        found, reason = json.loads(answer)
        if reason is not None:
            raise InputError(reason)
        return found

    def end(self) -> None:
        """End the process; the next call starts another."""
        if self.owner == os.getpid():
            self.owner = 0
            self.process.kill()
            with suppress(OSError):
                self.process.communicate()

    def _start(self) -> subprocess.Popen[str]:
        bounds = [self.module, self.name, self.seconds, self.memory, *self.needs]
        return subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), json.dumps(bounds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # ctrl-C is for the waiting process
        )


def serve(module: str, name: str, seconds: int, memory: int, *needs: str) -> None:
    """Main loop of the process: one line in, one line out, until its input is closed."""
    function = getattr(import_module(module), name)
    for need in needs:
        import_module(need)
    alarm = signal.alarm if _LATE else lambda seconds: 0
    if _LATE:
        signal.signal(_LATE, signal.SIG_DFL)
    with suppress(ImportError, OSError, ValueError, TypeError):  # not every system supports it
        import resource

        begun = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
        most = 1024 * int(begun[1]) + memory if begun else memory
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    for line in sys.stdin:
        alarm(seconds)
        found, reason = None, None
        try:
            found = function(*json.loads(line))
        except MemoryError:
            reason = f"it takes more than {memory // 2**20} MiB"
        except Exception as error:  # the program may raise anything
            reason = (str(error)[:300].splitlines() or [type(error).__name__])[0]
        print(json.dumps([found, reason]), flush=True)
        alarm(0)
        del found, reason
