"""A run directory in the browser while it is being made: what is done, then its page.

Served on the loopback interface alone, two addresses and no others: nothing in the request names
a file. A request that came by another host name is refused, so that no page of the internet can
read it through a name of its own (DNS rebinding).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lensclust.disk import read_json
from lensclust.errors import InputError

HOST = "127.0.0.1"
_WAITING = Path(__file__).parent / "report" / "waiting.html"
# The page has its own policy inside; this one only adds that nobody may frame it.
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def state(run: Path) -> dict[str, Any]:
    """How far a run is.

    Returns:
        ``study, preset, fields``; ``done`` and ``underway``, names of parts; ``finished``;
        ``claims``, verdict and statement of each once there are any; ``quiet``, seconds since
        anything changed.

    Raises:
        InputError: if the folder holds no run.
    """
    config = read_json(run / "config.json", what="serve: ")
    if not isinstance(config, dict):
        raise InputError(f"serve: {run / 'config.json'} is not the configuration of a run")
    parts = sorted(path for path in (run / "parts").glob("*") if path.is_dir())
    finished = (run / "claims.json").exists() and (run / "report.html").exists()
    claims = read_json(run / "claims.json", what="serve: ") if finished else []
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
    """A server of one run directory; inside the block it can be asked to ``serve_forever``.

    Args:
        run: a run directory, finished or not.
        port: where to listen; 0 takes any that is free.

    Raises:
        InputError: if the folder holds no run, or the port is taken.
    """
    if not (run / "config.json").is_file():
        what = "a directory" if run.is_dir() else "no directory"
        raise InputError(f"serve: {run} is {what} without config.json: expected a run directory")
    state(run)
    try:
        server = ThreadingHTTPServer((HOST, port), partial(_Handler, run))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"serve: cannot listen on port {port}: {reason}") from error
    server.daemon_threads = True
    with server:
        yield server


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
        try:
            if self.path == "/state.json":
                self._answer(json.dumps(state(self.run)).encode(), "application/json")
            elif self.path == "/":
                page = self.run / "report.html" if state(self.run)["finished"] else _WAITING
                self._answer(page.read_bytes(), "text/html; charset=utf-8")
            else:
                self.send_error(HTTPStatus.NOT_FOUND)
        except (InputError, OSError) as error:
            # It may be written just now: the next question finds it.
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, explain=str(error))

    def _answer(self, content: bytes, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: the terminal is its owner's."""
