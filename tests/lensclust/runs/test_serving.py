"""A run is shown while it works, to this machine alone, and nothing else can be had."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lensclust.errors import InputError
from lensclust.report.page import write_page
from lensclust.runs import server as serving
from lensclust.runs.server import served
from tests.browser import Browser
from tests.lensclust.report.test_report import HOSTILE, make_run


@contextmanager
def at_work(run: Path) -> Iterator[int]:
    with served(run) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_address[1]
        server.shutdown()


def asked(port: int, path: str, host: str | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{port}"})
    answer = connection.getresponse()
    return answer.status, answer.read()


def unfinished(folder: Path) -> Path:
    run = make_run(folder)
    (run / "claims.json").rename(run / "later.json")
    for name in ("seed-0/frames", "seed-1"):
        (run / "parts" / name).mkdir(parents=True)
    return run


def test_a_run_is_followed_and_then_read(tmp_path: Path) -> None:
    run = unfinished(tmp_path / "run")
    with at_work(run) as port:
        said = json.loads(asked(port, "/state.json")[1])
        assert (said["done"], said["underway"], said["finished"]) == (["seed-0"], ["seed-1"], False)
        assert b"A run at work" in asked(port, "/")[1]
        (run / "later.json").rename(run / "claims.json")
        write_page([run])
        assert json.loads(asked(port, "/state.json")[1])["finished"]
        assert asked(port, "/")[1] == (run / "report.html").read_bytes()


@pytest.mark.parametrize(
    "path",
    ["/config.json", "/../config.json", "/%2e%2e/config.json", "//etc/passwd", "/report.html",
     "/parts/", "/?x", "/state.json?x", "http://127.0.0.1/config.json"],
)  # fmt: skip
def test_nothing_else_can_be_had(tmp_path: Path, path: str) -> None:
    with at_work(make_run(tmp_path / "run")) as port:
        assert asked(port, path)[0] == 404


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1", "0.0.0.0", ""])
def test_other_names_of_this_machine_are_refused(tmp_path: Path, host: str) -> None:
    with at_work(make_run(tmp_path / "run")) as port:
        given = f"{host}:{port}" if host in ("0.0.0.0", "evil.example") else host or "[::1]"
        assert asked(port, "/state.json", given)[0] == 403
        assert asked(port, "/state.json", f"localhost:{port}")[0] == 200


def test_what_is_no_run_or_no_port_is_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"is no directory without config\.json"),
        served(tmp_path / "nowhere"),
    ):
        pass
    run = make_run(tmp_path / "run")
    with served(run) as server:
        taken = server.server_address[1]
        with pytest.raises(InputError, match=f"cannot listen on port {taken}"), served(run, taken):
            pass
    with pytest.raises(InputError, match="cannot listen on port 70000"), served(run, 70000):
        pass
    (run / "config.json").write_text("[]")
    with pytest.raises(InputError, match="is not the configuration of a run"), served(run):
        pass


def test_the_waiting_page_turns_into_the_run(tmp_path: Path, browser: Browser) -> None:
    run = unfinished(tmp_path / "run")
    (run / "parts" / HOSTILE.replace("/", "")).mkdir()
    with at_work(run) as port:
        browser.open(f"http://127.0.0.1:{port}/")
        browser.until("return document.querySelectorAll('#parts li').length === 3")
        assert browser.one("#now").text == "1 part done, 2 under way."
        (run / "later.json").rename(run / "claims.json")
        write_page([run])
        browser.until("return document.querySelector('#claims') !== null")
        assert browser.errors() == []
        allowed = f"http://127.0.0.1:{port}/"
        others = [url for url in browser.requests() if not url.startswith((allowed, "data:"))]
        assert others == []


def test_the_script_of_the_waiting_page_is_the_one_that_its_policy_allows() -> None:
    import lensclust.runs

    html = (Path(lensclust.runs.__file__).parent / "waiting.html").read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("claims.json", b"3"),
        ("claims.json", b'{"a": 1}'),
        ("claims.json", b"[" * 100_000),
        ("claims.json", b"\xff\xfe"),
        ("config.json", b"[]"),
        ("config.json", b""),
        ("config.json", None),
        ("report.html", None),
    ],
)
def test_a_malformed_run_is_unavailable_and_the_next_request_is_answered(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], file: str, content: bytes | None
) -> None:
    run = make_run(tmp_path / "run")
    write_page([run])
    with at_work(run) as port:
        before = (run / file).read_bytes()
        (run / file).unlink()
        if content is None:
            (run / file).mkdir()
        else:
            (run / file).write_bytes(content)
        assert asked(port, "/")[0] == 503
        if content is None:
            (run / file).rmdir()
        (run / file).write_bytes(before)
        assert asked(port, "/")[0] == 200
    assert capfd.readouterr().err == ""


def test_clients_that_leave_or_wait_are_let_go(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "SECONDS", 0.7)
    run = make_run(tmp_path / "run")
    write_page([run])
    with at_work(run) as port:
        for said in (
            b"",
            b"GET / HT",
            f"GET / HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n".encode(),
        ):
            leaver = socket.create_connection(("127.0.0.1", port))
            leaver.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            leaver.sendall(said)
            leaver.close()
        # A byte now and then: each alone is soon enough.
        slow = socket.create_connection(("127.0.0.1", port))
        ends, is_open = time.monotonic() + 20, True
        while is_open and time.monotonic() < ends:
            time.sleep(0.05)
            try:
                slow.sendall(b"x")
            except OSError:
                is_open = False
        assert not is_open
        slow.close()
        assert asked(port, "/state.json")[0] == 200
    assert capfd.readouterr().err == ""


def test_a_crowd_is_answered_or_refused_at_once(tmp_path: Path) -> None:
    with at_work(unfinished(tmp_path / "run")) as port:
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(serving.MAX_CLIENTS)]
        began = time.monotonic()
        crowd = [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]
        said = [client.recv(12) for client in crowd]
        assert time.monotonic() - began < serving.SECONDS
        assert set(said) == {b"HTTP/1.0 503"}
        for client in (*idle, *crowd):
            client.close()
        for _ in range(100):
            if asked(port, "/state.json")[0] == 200:
                break
            time.sleep(0.1)
        else:
            pytest.fail("nobody is answered any more")


# What is started in the background ignores interrupts, and so would what it starts.
LISTENING = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from lensclust.cli import main; sys.exit(main(sys.argv[1:]))"
)


def test_the_command_says_where_and_ends_by_an_interrupt(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    command = [sys.executable, "-c", LISTENING, "serve", str(run), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            port = int(re.search(r"http://127.0.0.1:(\d+)/", said)[1])  # type: ignore[index]
            assert asked(port, "/state.json")[0] == 200
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()
