"""Server of a run directory: progress while it works, then its page.

Serves two paths on the loopback interface only; no part of a request names a file. Requests with
another host name are refused, so that no website can read it by DNS rebinding.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lensclust.errors import InputError
from lensclust.runs.directory import PAGE, check
from lensclust.storage import read_json

HOST = "127.0.0.1"
# Maximum number of concurrent clients, and of seconds for a request with its answer.
MAX_CLIENTS, SECONDS = 64, 10.0
# Files of a run that are shown.
_SHOWN = ("config.json", "claims.json", PAGE)
_WAITING = Path(__file__).parent / "waiting.html"
# The page contains its policy; this one only forbids framing.
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def state(run: Path) -> dict[str, Any]:
    """Progress of a run.

    Returns:
        ``study, preset, fields``; ``done`` and ``underway``, names of parts; ``finished``;
        ``claims``, verdict and statement of each, if there are any; ``quiet``, seconds since the
        last change.

    Raises:
        InputError: if the folder holds no run.
    """
    check(run, f"serve: {run}: resume the run to have it written again", {*_SHOWN}.__contains__)
    config = read_json(run / "config.json", what="serve: ")
    if not isinstance(config, dict):
        raise InputError(f"serve: {run / 'config.json'} is not the configuration of a run")
    parts = sorted(path for path in (run / "parts").glob("*") if path.is_dir())
    finished = (run / "claims.json").exists() and (run / PAGE).exists()
    claims = read_json(run / "claims.json", what="serve: ") if finished else []
    if not isinstance(claims, list):
        raise InputError(f"serve: {run / 'claims.json'} holds no list of claims")
    changed = max((path.stat().st_mtime for path in (run, *parts)), default=time.time())
    return {
        "study": str(config.get("study", run.name)),
        "preset": str(config.get("preset", "")),
        "done": [path.name for path in parts if (path / "frames").exists()],
        "underway": [path.name for path in parts if not (path / "frames").exists()],
        "finished": finished,
        "claims": [
            {name: str(claim.get(name)) for name in ("verdict", "statement")}
            for claim in claims
            if isinstance(claim, dict)
        ],
        "quiet": round(max(0.0, time.time() - changed)),
    }


@contextmanager
def served(run: Path, port: int = 0) -> Iterator[ThreadingHTTPServer]:
    """A server of one run directory; call ``serve_forever`` inside the block.

    Args:
        run: a run directory, finished or not.
        port: port to listen on; 0 for any free one.

    Raises:
        InputError: if the folder holds no run, or the port is taken.
    """
    if not (run / "config.json").is_file():
        what = "a directory" if run.is_dir() else "no directory"
        raise InputError(f"serve: {run} is {what} without config.json: expected a run directory")
    state(run)
    try:
        server = _Server((HOST, port), partial(_Handler, run))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"serve: cannot listen on port {port}: {reason}") from error
    with server:
        yield server


class _Server(ThreadingHTTPServer):
    """One thread per client; refuses further clients immediately."""

    request_queue_size = 2 * MAX_CLIENTS

    def __init__(self, *arguments: Any) -> None:
        self.free = threading.Semaphore(MAX_CLIENTS)
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.free.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        with suppress(OSError):
            request.sendall(b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\n\r\n")
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        # A limit for slow clients, both in sending and in reading.
        end = threading.Timer(SECONDS, _shut, [request])
        end.daemon = True
        end.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            end.cancel()
            self.free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that disconnected is no error
            super().handle_error(request, client_address)


def _shut(request: Any) -> None:
    with suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    """Answers ``/`` and ``/state.json``."""

    server_version, sys_version = "lensclust", ""

    def __init__(self, run: Path, *arguments: Any) -> None:
        self.run = run
        super().__init__(*arguments)

    def do_GET(self) -> None:
        port = self.connection.getsockname()[1]
        if self.headers.get("Host") not in {f"{name}:{port}" for name in (HOST, "localhost")}:
            self.send_error(HTTPStatus.FORBIDDEN, "by this address only")
            return
        if self.path not in ("/", "/state.json"):
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            found, kind = state(self.run), "application/json"
            content = json.dumps(found).encode()
            if self.path == "/":
                page = self.run / PAGE if found["finished"] else _WAITING
                content, kind = page.read_bytes(), "text/html; charset=utf-8"
        except (InputError, OSError) as error:
            # The file may be being written: the next request finds it.
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, explain=str(error))
        else:
            self._answer(content, kind)

    def _answer(self, content: bytes, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Do not log requests to the terminal."""
