"""https: served, renewed without a restart, bad pairs refused. The pairs in tls/ are for here only."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import ssl
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from fake_engine import FakeEngine
from fastapi import FastAPI
from http_support import events_of, listening
from test_bad_input import GOOD
from test_http1 import answer_to
from test_network import request
from typer.testing import CliRunner

from server import tls
from server.cli import app as command

MakeApp = Callable[..., FastAPI]
PAIRS = Path(__file__).parent / "tls"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return (
        Path(shutil.copy(PAIRS / "localhost.pem", tmp_path / "cert.pem")),
        Path(shutil.copy(PAIRS / "localhost.key", tmp_path / "key.pem")),
    )


def trusting(name: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(PAIRS / f"{name}.pem"))


async def get(port: int, name: str) -> int:
    async with httpx.AsyncClient(verify=trusting(name)) as client:
        return (await client.get(f"https://localhost:{port}/health")).status_code


async def test_it_is_served(make_app: MakeApp, pair: tuple[Path, Path], engine: FakeEngine) -> None:
    made = tls.context(*map(str, pair))
    async with listening(make_app(), tls=made) as port:
        async with httpx.AsyncClient(verify=trusting("localhost")) as client:
            url = f"https://localhost:{port}/v1/completions"
            assert (await client.post(url, json=GOOD)).status_code == 200
            stream = await client.post(url, json=GOOD | {"stream": True})
            assert events_of(stream)[-1] == "[DONE]"
            refused = await client.get(f"https://localhost:{port}/", headers={"expect": "foo"})
            assert refused.status_code == 417
        old = trusting("localhost")
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        async with httpx.AsyncClient(verify=old) as client:
            assert (await client.get(f"https://localhost:{port}/health")).status_code == 200


async def test_who_has_left_is_not_generated_for(
    make_app: MakeApp, pair: tuple[Path, Path], engine: FakeEngine
) -> None:
    engine.stall_after = 4
    async with listening(make_app(), tls=tls.context(*map(str, pair))) as port:
        context = trusting("localhost")
        _, writer = await asyncio.open_connection("localhost", port, ssl=context)
        writer.write(request(GOOD))
        await engine.stalled.wait()
        writer.close()
        async with asyncio.timeout(5):
            while not engine.aborts:
                await asyncio.sleep(0.02)


async def test_what_is_no_tls_harms_nobody(
    make_app: MakeApp, pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    async with listening(make_app(), tls=tls.context(*map(str, pair))) as port:
        for raw in (b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", b"\x16\x03\x01" + b"\xff" * 2000, b"\x00"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(raw)
            writer.write_eof()
            assert b"HTTP" not in await asyncio.wait_for(reader.read(), 10)
            writer.close()
        assert await get(port, "localhost") == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], caplog.text


async def test_a_renewed_certificate_needs_no_restart(
    make_app: MakeApp, pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    cert, key = pair
    made = tls.context(str(cert), str(key))
    async with listening(make_app(), tls=made) as port:
        shutil.copy(PAIRS / "renewed.pem", cert)
        tls.reload(made, str(cert), str(key))  # half a pair
        assert "stays as it was" in caplog.text and await get(port, "localhost") == 200
        shutil.copy(PAIRS / "renewed.key", key)
        tls.reload(made, str(cert), str(key))
        assert await get(port, "renewed") == 200
        with pytest.raises(httpx.ConnectError):
            await get(port, "localhost")


@pytest.mark.parametrize(
    ("cert", "key", "says"),
    [
        ("nothing.pem", "localhost.key", "No such file"),
        ("localhost.pem", "nothing.key", "No such file"),
        ("localhost.pem", "renewed.key", "the key is not the certificate's"),
        ("localhost.pem", None, "no certificate and private key"),
        ("localhost.pem", "localhost.pem", "no certificate and private key"),
        ("localhost.key", "localhost.key", "no certificate and private key"),
        ("localhost.pem", "encrypted.key", "encrypted"),
        (".", None, "directory"),
    ],
)
def test_bad_pairs_are_refused_in_a_line(cert: str, key: str | None, says: str) -> None:
    files = [str(PAIRS / cert), None if key is None else str(PAIRS / key)]
    with pytest.raises(tls.BadCertificate, match=says) as error:
        tls.context(*files)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    flags = ["--ssl-certfile", files[0] or "", *(("--ssl-keyfile", files[1]) if files[1] else ())]
    result = CliRunner().invoke(command, ["serve", "--port", "0", *flags])
    assert result.exit_code == 1 and says in result.stderr and result.stderr.count("\n") == 1


def test_a_key_alone_is_refused() -> None:
    result = CliRunner().invoke(command, ["serve", "--ssl-keyfile", str(PAIRS / "localhost.key")])
    assert result.exit_code == 2 and "wants --ssl-certfile" in result.stderr


async def test_http_stays_http(port: int) -> None:
    assert (await answer_to(port, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")).status_code == 400


async def test_a_request_may_come_with_the_handshakes_last_bytes(
    make_app: MakeApp, pair: tuple[Path, Path]
) -> None:
    async with listening(make_app(), tls=tls.context(*map(str, pair))) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        come, go = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = trusting("localhost").wrap_bio(come, go, server_hostname="localhost")
        with pytest.raises(ssl.SSLWantReadError):
            client.do_handshake()
        writer.write(go.read())
        while True:
            come.write(await reader.read(65536))
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                continue
        client.write(b"GET /version HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        writer.write(go.read())  # in one piece
        answer = b""
        while not answer.startswith(b"HTTP/1.1 200 "):
            come.write(await asyncio.wait_for(reader.read(65536), 5))
            with contextlib.suppress(ssl.SSLWantReadError):
                answer += client.read()
        writer.close()


async def test_silent_handshakes_are_bounded(make_app: MakeApp, pair: tuple[Path, Path]) -> None:
    """As connections are: in number, and in time."""
    app = make_app(read_seconds=1, max_connections=4)
    async with listening(app, tls=tls.context(*map(str, pair))) as port:
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(40)]
        begun = asyncio.get_running_loop().time()
        ends = [asyncio.create_task(_end_of(reader)) for reader, _ in silent]
        await asyncio.sleep(0.5)
        assert 40 - sum(each.done() for each in ends) == 4 + 16  # far too many are not even told
        await asyncio.wait_for(asyncio.gather(*ends), 5)
        assert asyncio.get_running_loop().time() - begun > 0.9
        assert await get(port, "localhost") == 200
        for _, writer in silent:
            writer.close()


async def test_a_handshake_under_way_does_not_hold_the_end_up(
    make_app: MakeApp, pair: tuple[Path, Path]
) -> None:
    async with listening(make_app(), tls=tls.context(*map(str, pair))) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.sleep(0.1)
        begun = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - begun < 5
    assert await _end_of(reader) == b""
    writer.close()


async def _end_of(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""
