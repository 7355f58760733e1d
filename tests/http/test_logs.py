"""One line for each request: what it did, and nothing that it said."""

from __future__ import annotations

import logging
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from engine_times import timed
from fake_engine import FakeEngine
from fastapi import FastAPI
from http_support import listening, running
from log_support import Lines, configured, writing
from pydantic import SecretStr
from test_bad_input import CHAT, GOOD

from server.log_lines import LogFormat


@pytest.fixture
def written() -> Iterator[Callable[[LogFormat], Lines]]:
    with writing() as written:
        yield written


@pytest.fixture
def told(written: Callable[[LogFormat], Lines]) -> Lines:
    return written("json")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_line_has_what_the_request_did(
    client: httpx.AsyncClient, engine: FakeEngine, told: Lines, stream: bool
) -> None:
    engine.cached_tokens = 1
    body = GOOD | {"max_tokens": 60, "stream": stream}
    response = await client.post("/v1/completions", json=body, headers={"x-request-id": "mine"})
    line = told.request()
    tokens = len(engine.answer)
    iterations = -(-(tokens - 1) // engine.block)
    assert line["request_id"] == "mine" and line["level"] == "info" and line["time"].endswith("+00:00")
    assert (line["method"], line["path"], line["route"]) == ("POST", "/v1/completions", "/v1/completions")
    assert (line["status"], line["outcome"], line["finish_reasons"]) == (200, "done", ["stop"])
    assert "error" not in line and line["model"] == "tiny" and line["stream"] is stream
    assert line["prompt_tokens"] == len(engine.requests[0].prompt_ids) and line["cached_tokens"] == 1
    assert line["iterations"] == iterations and line["drafted"] == iterations * engine.block
    assert line["accepted"] == tokens - 1 - iterations
    assert line["mean_sl"] == engine.block
    assert line["acceptance_rate"] == pytest.approx(line["accepted"] / line["drafted"], abs=1e-6)
    assert (line["policy"], line["drafter"]) == ("static", "ngram")
    assert 0 < line["time_to_first_token"] <= line["seconds"] < 60
    if not stream:
        answer = response.json()
        assert line["id"] == answer["id"]
        assert line["generated_tokens"] == answer["usage"]["completion_tokens"]


async def test_phases_follow_each_other(
    client: httpx.AsyncClient, engine: FakeEngine, told: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(engine, monkeypatch)
    await client.post("/v1/completions", json=GOOD | {"max_tokens": 60, "n": 2})
    line = told.request()
    phases = [line[f"{name}_seconds"] for name in ("queue", "prefill", "decode")]
    assert all(seconds > 0 for seconds in phases) and sum(phases) < line["seconds"]
    assert phases[0] + phases[1] < line["time_to_first_token"]


async def test_sequences_are_added_up(client: httpx.AsyncClient, engine: FakeEngine, told: Lines) -> None:
    body = {"model": "tiny", "prompt": ["hello", "one two"], "n": 2, "max_tokens": 3}
    usage = (await client.post("/v1/completions", json=body)).json()["usage"]
    line = told.request()
    assert line["sequences"] == 4 and line["finish_reasons"] == ["length"] * 4
    assert (line["prompt_tokens"], line["generated_tokens"]) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", GOOD),
        ("/v1/completions", GOOD | {"stream": True}),
        ("/v1/chat/completions", CHAT),
        ("/v1/responses", {"model": "tiny", "input": "hello"}),
    ],
)
async def test_prompt_and_text_are_told_only_if_asked_for(
    make_app: Callable[..., FastAPI],
    engine: FakeEngine,
    written: Callable[[LogFormat], Lines],
    path: str,
    body: dict[str, Any],
) -> None:
    silent, plain = written("json"), written("text")
    async with running(make_app()) as client:
        assert (await client.post(path, json=body)).status_code == 200
    for word in ("hello", "world", "stop is"):
        assert word not in silent.text and word not in plain.text
    spoken = written("json")
    async with running(make_app(log_prompts=True)) as client:
        assert (await client.post(path, json=body)).status_code == 200
    line = spoken.request()
    ((prompt,), (text,)) = line["prompts"], line["texts"]
    assert "hello" in prompt and text.startswith(" world, the stop")
    assert "world, the stop" in plain.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), [("/v1/completions", GOOD), ("/v1/chat/completions", CHAT)])
async def test_no_prompt_and_no_text_is_told_at_debug(
    client: httpx.AsyncClient, told: Lines, path: str, body: dict[str, Any], stream: bool
) -> None:
    with configured("debug", "text"):
        logging.getLogger().addHandler(told.handler)
        assert (await client.post(path, json=body | {"stream": stream})).status_code == 200
    assert told.request()["status"] == 200
    assert "hello" not in told.text and "world" not in told.text
    spoke = {each["logger"].partition(".")[0] for each in told.all() if each["level"] == "debug"}
    assert spoke <= {"server", "engine"}


def test_a_log_that_nobody_reads_stops_no_request(tiny_llama: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    names = ["--target", str(tiny_llama), "--draft", "none", "--served-model-name", "tiny"]
    flags = ["--threads", "1", "--kv-blocks", "600", "--log-level", "debug", "--port", str(port)]
    command = [sys.executable, "-c", "from server.cli import main; main()", "serve", *names, *flags]
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        assert server.stderr is not None
        try:
            while "ready" not in (line := server.stderr.readline()):
                assert line, "the server ended"
            for number in range(600):  # some 200 KB; a pipe takes 64
                assert client.get(f"/v1/{number}-{'x' * 200}").status_code == 404
            assert client.get("/health").status_code == client.get("/ready").status_code == 200
            assert client.post("/v1/completions", json=GOOD).status_code == 200
            server.terminate()
            assert server.wait(60) == 0
        finally:
            server.kill()
        numbers = [int(told[1]) for told in re.finditer(r"GET /v1/(\d+)-x{200} 404", server.stderr.read())]
    assert numbers and numbers == list(range(len(numbers)))


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/completions", {"model": "tiny", "prompt": "secret", "nonsense": 1}, 400, "unknown_field"),
        ("/v1/completions", {"model": "other", "prompt": "secret"}, 404, "model_not_found"),
        ("/v1/completions", {"model": "tiny", "prompt": "secret " * 1000}, 400, "context_length_exceeded"),
        ("/v1/nowhere", {}, 404, "not_found"),
        ("/health", {}, 405, "method_not_allowed"),
    ],
)
async def test_what_is_refused_is_told(
    client: httpx.AsyncClient, told: Lines, path: str, body: dict[str, Any], status: int, code: str
) -> None:
    await client.post(path, json=body)
    line = told.request()
    assert (line["status"], line["outcome"], line["error"]) == (status, "refused", code)
    assert "secret" not in told.text and "generated_tokens" not in line


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hello", "max_tokens": 500}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 500}),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 500}),
    ],
)
async def test_the_prompt_of_what_is_refused_is_told_once_it_was_read(
    make_app: Callable[..., FastAPI], told: Lines, path: str, body: dict[str, Any]
) -> None:
    async with running(make_app(log_prompts=True)) as client:
        assert (await client.post(path, json={"model": "tiny", **body})).status_code == 400
    line = told.request()
    assert line["outcome"] == "refused" and line["texts"] == []
    (prompt,) = line["prompts"]
    assert "hello" in prompt


async def test_a_missing_key_is_told(make_app: Callable[..., FastAPI], told: Lines) -> None:
    async with running(make_app(api_key=[SecretStr("k")])) as client:
        await client.post("/v1/completions", json=GOOD)
    line = told.request()
    assert (line["status"], line["outcome"], line["error"]) == (401, "refused", "invalid_api_key")
    assert line["path"] == "/v1/completions" and line["route"] == "unmatched"


async def test_the_name_of_a_key_is_told_and_not_the_key(
    make_app: Callable[..., FastAPI], told: Lines, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"alice sha256:{sha256(b'sk-of-alice-long-enough').hexdigest()}\n")
    async with running(make_app(api_key_file=keys)) as client:
        given = {"authorization": "Bearer sk-of-alice-long-enough"}
        assert (await client.post("/v1/completions", json=GOOD, headers=given)).status_code == 200
    line = told.request()
    assert line["key"] == "alice" and "sk-of" not in str(told.all())


@pytest.mark.parametrize("stream", [False, True])
async def test_what_fails_is_told(
    client: httpx.AsyncClient, engine: FakeEngine, told: Lines, stream: bool
) -> None:
    engine.die_after = 4
    await client.post("/v1/completions", json=GOOD | {"max_tokens": 60, "stream": stream})
    line = told.request()
    assert line["status"] == (200 if stream else 503)
    assert (line["outcome"], line["error"]) == ("error", "engine_unavailable")
    assert line["generated_tokens"] == 4 and line["finish_reasons"] == ["error"]


async def test_a_fault_of_ours_is_told(client: httpx.AsyncClient, engine: FakeEngine, told: Lines) -> None:
    def script(request: object) -> list[int]:
        raise ZeroDivisionError("a\nb")

    engine.script = script
    await client.post("/v1/completions", json=GOOD)
    line = told.request()
    assert (line["status"], line["outcome"], line["error"]) == (500, "error", "internal_error")
    (other,) = [each for each in told.all() if each["logger"] != "server.logs" and "exception" in each]
    assert "ZeroDivisionError: a\nb" in other["exception"]
    assert other["request_id"] == line["request_id"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_is_told_once(
    make_app: Callable[..., FastAPI], engine: FakeEngine, told: Lines, stream: bool
) -> None:
    engine.stall_after = 4
    async with (
        listening(make_app()) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        body = GOOD | {"max_tokens": 60, "stream": stream}
        if stream:
            async with client.stream("POST", "/v1/completions", json=body) as response:
                await engine.stalled.wait()
                assert response.status_code == 200
        else:
            with pytest.raises(httpx.ReadTimeout):
                await client.post("/v1/completions", json=body, timeout=0.3)
    line = told.request()
    assert (line["outcome"], line["finish_reasons"]) == ("abort", ["abort"]) and "error" not in line
    assert line["status"] == (200 if stream else 499)
    assert line["generated_tokens"] == 4


async def test_other_routes_have_their_line_too(client: httpx.AsyncClient, told: Lines) -> None:
    await client.get("/health")
    await client.head("/v1/models/tiny")
    health, model = told.requests()
    assert (health["path"], health["status"], health["outcome"]) == ("/health", 200, "done")
    assert (model["method"], model["path"]) == ("HEAD", "/v1/models/tiny")
    assert model["route"] == "/v1/models/{model_id:path}" and "model" not in health
