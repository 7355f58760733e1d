"""`disco-serve top` and what no disco-serve would answer."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from typing import Any

import httpx
import pytest
from fake_disco import Server, answering, drawn, run, text, window
from typer.testing import CliRunner

from server import cli, top
from server.top_frame import frame
from server.top_page import Page

BUCKET = "disco_request_seconds_bucket"
GARBLED = {"headers": {"content-encoding": "gzip"}, "stream": httpx.ByteStream(b"garbage")}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Server:
    return answering(monkeypatch)


@pytest.mark.parametrize(
    ("path", "said", "message"),
    [
        ("/metrics", GARBLED, "cannot be read"),
        ("/health", GARBLED, "cannot be read"),
        ("/health", {"content": b"[" * 100_000}, "/health answers HTTP 200"),
        ("/health", {"content": b"\xff\xfe\xff"}, "/health answers HTTP 200"),
        ("/metrics", {"text": text(1) + f'{BUCKET}{{le="wide"}} 1\n'}, "a bound 'wide'"),
        ("/metrics", {"text": text(1) + f'{BUCKET}{{le="NaN"}} 1\n'}, "a bound 'NaN'"),
        ("/metrics", {"text": text(1) + f"{BUCKET} 1\n"}, "a bound None"),
        ("/metrics", {"text": text(1) + "disco_kv_blocks NaN\n"}, "disco_kv_blocks is nan"),
        ("/metrics", {"text": text(1) + f'{BUCKET}{{le="1"}} +Inf\n'}, "is inf"),
        ("/metrics", {"text": "disco_engine_up x\n"}, "not a page of metrics"),
        ("/metrics", {"text": "x" * (1 << 23)}, "it has over"),
    ],
)
def test_answers_that_cannot_be_read_are_told_and_asked_for_again(
    fake: Server, path: str, said: dict[str, Any], message: str
) -> None:
    fake.bad = {path: said}
    result = run("--once")
    assert "Traceback" not in result.output and not isinstance(result.exception, ValueError)
    assert message in result.output and result.exit_code == (0 if "/health answers" in message else 1)
    with top.Watched("http://x:1", "http://x:1/metrics", 30.0, 2.0) as watched:
        assert message in drawn(top._frame(watched, 2.0))
        fake.bad = {}
        assert "ready" in drawn(top._frame(watched, 2.0))


@pytest.mark.parametrize("begin", [b"HTTP/1.1 200 OK\r\nx: ", b"HTTP/1.1 200 OK\r\n\r\n# "])
def test_a_page_that_drips_is_given_up(begin: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top, "_PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                connection.sendall(begin)
                while True:
                    connection.sendall(b"x")
                    time.sleep(0.05)

        thread = threading.Thread(target=drip)
        thread.start()
        url, start = f"http://127.0.0.1:{listener.getsockname()[1]}", time.monotonic()
        result = CliRunner().invoke(cli.app, ["top", "--url", url, "--interval", "0.1", "--once"])
        thread.join()
    assert result.exit_code == 1 and "no whole answer within 0.5 s" in result.stderr
    assert time.monotonic() - start < 5


def test_what_a_server_says_does_nothing_to_the_terminal(fake: Server) -> None:
    escapes = 'disco_model_info{target="\x1b]0;x\x07",version="\x1b[2J"} 1\n'
    counted = 'disco_requests_total{{outcome="[/x]\x1b[31m"}} {}\n'
    first, second = (f"disco_engine_up 1\n{escapes}{counted.format(k)}" for k in (1, 5))
    found = drawn(frame(window(Page(first, 0.0), Page(second, 1.0)), "ready", "http://x"))
    assert "\x1b" not in found and "\\x1b[2J at" in found and "[/x]\\x1b[31m 4" in found
    fake.bad = {"/health": {"json": {"engine": "\x1b[2J", "restarts": 0}}}
    assert "\\x1b[2J, 0 restarts" in (said := run("--once").stdout) and "\x1b" not in said


def test_a_password_is_not_shown(fake: Server) -> None:
    result = CliRunner().invoke(
        cli.app, ["top", "--url", "http://u:sesame@x:1", "--interval", "0.1", "--once"]
    )
    assert result.exit_code == 0 and "at http://x:1: ready" in result.stdout
    fake.bad = {"/metrics": {"text": ""}}
    for url in ("http://u:sesame@x:1", "http://u:sesame@x:port", "http://u:sesame/x@y"):
        result = CliRunner().invoke(cli.app, ["top", "--url", url, "--once"])
        assert result.exit_code in (1, 2) and "sesame" not in result.output
        assert len(result.stderr.strip().splitlines()) == 1
