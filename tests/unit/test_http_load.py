"""The load generator against a small server with known answers and faults."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import http_load
from http_load import figures, measure
from peers.fake_server import serving
from peers.streams import Answer, LoadError

SCRIPT = Path(http_load.__file__)
PROMPTS = tuple(f"prompt {i}" for i in range(100))


class Fake:
    """Answers as the model's name says, and remembers what it was asked."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.running = self.most = 0
        self.url = ""

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("authorization"))
        model = body["model"]
        if model == "refuses" or (model == "fails later" and len(self.bodies) == 6):
            return JSONResponse({"error": {"message": "the engine is on fire"}}, status_code=500)
        return StreamingResponse(self._stream(model, body), media_type="text/event-stream")

    async def _stream(self, model: str, body: dict[str, Any]) -> AsyncIterator[bytes]:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            async for piece in _pieces(model, body["max_tokens"]):
                yield piece
                await asyncio.sleep(0.002)
        finally:
            self.running -= 1


async def _pieces(model: str, tokens: int) -> AsyncIterator[bytes]:
    """Two tokens a chunk, then usage, then [DONE], with the fault that the model is named after."""
    events: list[Any] = [{"choices": [{"index": 0, "text": " a b"}], "usage": None}] * (tokens // 2)
    usage = {"choices": [], "usage": {"completion_tokens": tokens // 2 if model == "stops early" else tokens}}
    if model == "says nothing":
        events = []
    if model != "counts nothing":
        events.append(usage)
    if model == "reports an error":
        events[1] = {"error": {"message": "the engine is on fire"}}
    if model == "talks nonsense":
        events[1] = "nonsense"
    lines = [f"data: {json.dumps(event)}\n\n".encode() for event in events] + [b"data: [DONE]\n\n"]
    if model == "talks nonsense":
        lines[1] = b"data: {nonsense\n\n"
    if model == "ends without a word":
        lines.pop()
    for number, line in enumerate(lines):
        if model == "breaks off" and number == 1:
            raise RuntimeError("the connection closes here")
        if model == "sends crumbs":
            line = b": a comment\r\n" + line.replace(b"\n", b"\r\n")
            for start in range(0, len(line), 7):
                yield line[start : start + 7]
        else:
            yield line


@pytest.fixture
def fake() -> Iterator[Fake]:
    fake = Fake()
    app = Starlette(routes=[Route("/v1/completions", fake.completions, methods=["POST"])])
    listener = socket.create_server(("127.0.0.1", 0))
    fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.005)
    yield fake
    server.should_exit = True
    thread.join()
    listener.close()


@pytest.mark.parametrize("model", ["good", "sends crumbs"])
def test_every_request_is_sent_and_every_token_counted(fake: Fake, model: str) -> None:
    found = measure(fake.url, model, 3, 10, 7, PROMPTS)

    assert (found.streams, found.requests, found.output_tokens, found.chunks) == (3, 7, 70, 35)
    assert found.tokens_per_second == pytest.approx(70 / found.seconds)
    assert found.tpot_p50_ms is not None and found.tpot_p95_ms is not None
    assert 0 < found.tpot_p50_ms <= found.tpot_p95_ms
    assert 0 < found.ttft_p50_ms <= found.ttft_p95_ms < found.seconds * 1e3
    assert found.generator_cpu > 0
    assert len(fake.bodies) == 3 + 7  # a warm-up request for every stream
    assert fake.most == 3
    assert sorted(body["prompt"] for body in fake.bodies) == sorted(PROMPTS[:10])
    assert {body["prompt"] for body in fake.bodies[:3]} == set(PROMPTS[:3])
    for body in fake.bodies:
        del body["prompt"]
        assert body == {
            "model": model,
            "max_tokens": 10,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


def test_streams_and_requests_are_dealt_out_to_processes(fake: Fake) -> None:
    found = measure(fake.url, "good", 3, 4, 8, PROMPTS, processes=2)

    assert (found.streams, found.requests, found.output_tokens, found.processes) == (3, 8, 32, 2)
    assert fake.most == 3
    assert sorted(body["prompt"] for body in fake.bodies) == sorted(PROMPTS[: 3 + 8])


def test_options_go_with_every_request(fake: Fake) -> None:
    options: dict[str, Any] = {"speculation": {"drafter": "none"}, "ignore_eos": False, "api_key": "sesame"}

    measure(fake.url, "good", 1, 4, 2, [(5, 6, 7), "text"], **options)

    assert [body["prompt"] for body in fake.bodies] == [[5, 6, 7], "text", [5, 6, 7]]
    assert all(body["speculation"] == {"drafter": "none"} for body in fake.bodies)
    assert not any("ignore_eos" in body for body in fake.bodies)
    assert fake.keys == ["Bearer sesame"] * 3


def test_a_short_answer_is_counted_as_it_is_where_eos_counts(fake: Fake) -> None:
    found = measure(fake.url, "stops early", 1, 8, 3, PROMPTS, ignore_eos=False)

    assert found.output_tokens == 3 * 4


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("refuses", "HTTP 500: .*on fire"),
        ("breaks off", "RemoteProtocolError"),
        ("ends without a word", r"broke off before \[DONE\]"),
        ("counts nothing", "no chunk with usage"),
        ("says nothing", "no chunk with a choice"),
        ("stops early", "4 of 8 tokens: does the server take ignore_eos"),
        ("reports an error", "an error in the stream: .*on fire"),
        ("talks nonsense", "not a chunk"),
        ("fails later", "HTTP 500: .*on fire"),
    ],
)
def test_no_figures_over_failed_requests(fake: Fake, model: str, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        measure(fake.url, model, 2, 8, 40, PROMPTS)
    assert len(fake.bodies) < 2 + 40  # the first failure ends all streams


@pytest.mark.parametrize("model", ["refuses", "fails later"])
def test_a_failure_in_one_process_ends_them_all(fake: Fake, model: str) -> None:
    with pytest.raises(LoadError, match=r"HTTP 500: .*on fire"):
        measure(fake.url, model, 2, 8, 400, PROMPTS, processes=2)
    assert len(fake.bodies) < 200  # the other process did not go on to the end of its share


def test_a_server_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(LoadError, match="ConnectError"):
        measure(f"http://127.0.0.1:{port}/v1", "m", 1, 4, 1, PROMPTS)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"streams": 0}, "streams"),
        ({"tokens": 0}, "tokens"),
        ({"requests": 1}, "idle"),
        ({"prompts": ()}, "no prompts"),
        ({"processes": 3}, "3 load processes"),
        ({"processes": 0}, "0 load processes"),
        ({"url": "http://127.0.0.1:port/v1"}, "url"),
    ],
)
def test_numbers_that_cannot_work(changed: dict[str, Any], message: str) -> None:
    given = {"url": "http://127.0.0.1:9", "model": "m", "streams": 2, "tokens": 4, "requests": 2}
    with pytest.raises(ValueError, match=message):
        measure(**{**given, "prompts": PROMPTS, **changed})  # type: ignore[arg-type]


def test_figures_of_known_times() -> None:
    answers = [
        Answer(sent=10.0, first=10.1, last=11.1, ended=11.2, chunks=11, tokens=11),  # 100 ms a token
        Answer(sent=10.5, first=10.8, last=12.8, ended=13.0, chunks=3, tokens=11),  # 200 ms a token
        Answer(sent=9.0, first=9.2, last=9.2, ended=9.2, chunks=1, tokens=8),  # no time between chunks
    ]

    found = figures(answers, streams=2)

    assert (found.requests, found.output_tokens, found.chunks) == (3, 30, 15)
    assert found.seconds == pytest.approx(4.0)
    assert found.tokens_per_second == pytest.approx(7.5)
    assert found.ttft_p50_ms == pytest.approx(200)
    assert found.ttft_p95_ms == pytest.approx(290)
    assert found.tpot_p50_ms == pytest.approx(150)
    assert found.tpot_p95_ms == pytest.approx(195)


def test_one_token_has_no_time_per_token() -> None:
    found = figures([Answer(0.0, 1.0, 1.0, 1.0, chunks=1, tokens=1)], streams=1)

    assert found.tpot_p50_ms is None and found.tpot_p95_ms is None
    assert found.ttft_p95_ms == pytest.approx(1000)


def test_the_command_prints_a_table_and_writes_json(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "load.json"
    given = f"http_load --url {fake.url} --model good --streams 1 2 --tokens 4 --api-key sesame --json {out}"
    monkeypatch.setattr(sys, "argv", [*given.split(), "--speculation", '{"drafter": "none"}'])

    http_load.main()

    written = json.loads(out.read_text())
    assert [row["requests"] for row in written["figures"]] == [4, 8]
    assert [row["output_tokens"] for row in written["figures"]] == [16, 32]
    assert written["asked"]["speculation"] == {"drafter": "none"}
    assert written["environment"]["versions"]
    assert "sesame" not in out.read_text()
    assert "good" in capsys.readouterr().out
    assert len(fake.bodies) == (1 + 4) + (2 + 8)


def test_the_command_fails_visibly(fake: Fake, tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    given = f"--url {fake.url} --model refuses --streams 1 --json {out}"

    ended = subprocess.run(
        [sys.executable, SCRIPT, *given.split()],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )

    assert ended.returncode == 1
    assert "no figures: a request failed" in ended.stderr and "on fire" in ended.stderr
    assert ended.stdout == "" and not out.exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--model m", "--url and --model"),
        ("--url http://127.0.0.1:9 --model m --requests 0", "idle"),
        ("--url http://127.0.0.1:9 --model m --tokenizer ./not-there", "not-there"),
    ],
)
def test_the_command_says_what_is_wrong(given: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["http_load", *given.split()])
    with pytest.raises(SystemExit, match=message):
        http_load.main()


def test_a_busy_generator_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    answers = [Answer(0.0, 1.0, 2.0, 2.0, chunks=2, tokens=2)]

    http_load.show([figures(answers, streams=1, generator_cpu=0.5)], "idle")
    assert "raise --processes" not in capsys.readouterr().out
    http_load.show([figures(answers, streams=1, generator_cpu=0.9)], "busy")
    assert "raise --processes" in capsys.readouterr().out


def test_the_server_of_the_self_test_keeps_its_pace() -> None:
    with serving(200) as url:  # chunks a second, for each stream
        found = measure(url, "fake", 2, 20, 4, PROMPTS)

    assert (found.output_tokens, found.chunks) == (80, 80)
    assert found.seconds >= 2 * 20 / 200  # it may be late, never early
