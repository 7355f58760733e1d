"""Spans as a collector gets them: names, attributes, parents, errors; and a collector that is not there."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from engine_times import timed
from fake_engine import FakeEngine
from fastapi import FastAPI
from http_support import listening, running
from otlp_collector import Collector, collecting
from pydantic import SecretStr
from test_bad_input import CHAT, GOOD

RESPONSES = {"model": "tiny", "input": "hello"}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
KEY = {"authorization": "Bearer k"}
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture
def traced(make_app: Callable[..., FastAPI], collector: Collector) -> Callable[..., FastAPI]:
    """Apps that send to the collector; by their end all spans are there."""
    return lambda **changes: make_app(otlp_endpoint=collector.url, **changes)


@pytest.mark.parametrize(
    ("path", "body", "operation"),
    [
        ("/v1/completions", GOOD | {"max_tokens": 60}, "text_completion"),
        ("/v1/chat/completions", CHAT | {"max_tokens": 60, "stream": True}, "chat"),
        ("/v1/responses", RESPONSES | {"max_output_tokens": 60}, "chat"),
    ],
)
async def test_a_request_is_a_span(
    traced: Callable[..., FastAPI],
    collector: Collector,
    engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: dict[str, Any],
    operation: str,
) -> None:
    timed(engine, monkeypatch)
    asked = body | {"temperature": 0.5, "top_p": 0.75, "seed": 7}
    async with running(traced()) as client:
        response = await client.post(path, json=asked, headers={"x-request-id": "mine"})
        await client.get("/health")
        await client.get(path)
        await client.post("/tokenize", json=GOOD)
    span = collector.request()
    told = span.attributes
    iterations = -(-(len(engine.answer) - 1) // engine.block)
    assert (span.name, span.kind, span.parent, span.failed) == (f"{operation} tiny", "SERVER", "", False)
    expected = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "disco-serve",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.request.max_tokens": 60,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.75,
        "gen_ai.request.seed": 7,
        "gen_ai.request.stream": bool(body.get("stream")),
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": len(engine.requests[0].prompt_ids),
        "gen_ai.usage.output_tokens": len(engine.answer),
        "http.request.method": "POST",
        "http.route": path,
        "http.response.status_code": 200,
        "url.path": path,
        "disco.request.id": "mine",
        "disco.outcome": "done",
        "disco.speculation.policy": "static",
        "disco.speculation.drafter": "ngram",
        "disco.speculation.iterations": iterations,
        "disco.speculation.drafted": iterations * engine.block,
        "disco.speculation.mean_sl": engine.block,
    }
    assert {name: told.get(name) for name in expected} == expected
    assert told["disco.speculation.accepted"] == len(engine.answer) - 1 - iterations
    assert 0 < told["disco.speculation.acceptance_rate"] < 1
    assert told["gen_ai.response.id"] in response.text
    assert "error.type" not in told and "gen_ai.request.choice.count" not in told
    assert span.service["service.name"] == "disco-serve" and span.service["service.version"]
    assert not any("hello" in str(value) or "world" in str(value) for value in told.values())
    assert set(collector.paths) == {"/v1/traces"}


async def test_phases_are_children(
    traced: Callable[..., FastAPI],
    collector: Collector,
    engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed(engine, monkeypatch)
    async with running(traced()) as client:
        await client.post("/v1/completions", json=GOOD | {"max_tokens": 60})
    span = collector.request()
    phases = collector.children(span)
    assert [phase.name for phase in phases] == ["queue", "prefill", "decode"]
    assert {phase.trace for phase in phases} == {span.trace}
    ends = [span.start, *(at for phase in phases for at in (phase.start, phase.end)), span.end]
    assert ends == sorted(ends)
    for phase in phases:
        seconds = span.attributes[f"disco.{phase.name}_seconds"]
        assert seconds == pytest.approx((phase.end - phase.start) / 1e9, abs=1e-6) and seconds > 0
    assert 0 < span.attributes["disco.time_to_first_token"] <= (span.end - span.start) / 1e9


async def test_prompt_and_text_are_told_if_asked_for(
    traced: Callable[..., FastAPI], collector: Collector
) -> None:
    async with running(traced(log_prompts=True)) as client:
        await client.post("/v1/completions", json=GOOD | {"max_tokens": 60, "n": 2})
    told = collector.request().attributes
    assert json.loads(told["gen_ai.input.messages"]) == [
        {"role": "user", "parts": [{"type": "text", "content": "hello"}]}
    ]
    said = json.loads(told["gen_ai.output.messages"])
    text = {"type": "text", "content": " world, the stop is here"}
    assert said == [{"role": "assistant", "parts": [text], "finish_reason": "stop"}] * 2
    assert told["gen_ai.request.choice.count"] == 2


async def test_the_callers_trace_goes_on(traced: Callable[..., FastAPI], collector: Collector) -> None:
    headers = {"traceparent": TRACEPARENT, "tracestate": "vendor=1,other=2"}
    async with running(traced()) as client:
        await client.post("/v1/completions", json=GOOD, headers=headers)
    span = collector.request()
    assert (span.trace, span.parent, span.state) == (TRACE, PARENT, "vendor=1,other=2")


@pytest.mark.parametrize("flags", ["01", "03"])
async def test_a_later_version_and_other_flags_are_read(
    traced: Callable[..., FastAPI], collector: Collector, flags: str
) -> None:
    async with running(traced()) as client:
        headers = {"traceparent": f"cc-{TRACE}-{PARENT}-{flags}-what.the.future.has"}
        await client.post("/v1/completions", json=GOOD, headers=headers)
    span = collector.request()
    assert (span.trace, span.parent) == (TRACE, PARENT)


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "nonsense",
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE}-{PARENT}-01-more",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE[1:]}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-0x",
        f"00-{TRACE}-{PARENT}-01" + "-" * 600,
    ],
)
async def test_a_malformed_parent_is_ignored(
    traced: Callable[..., FastAPI], collector: Collector, wrong: str
) -> None:
    async with running(traced()) as client:
        headers = {"traceparent": wrong, "tracestate": "vendor=1"}
        assert (await client.post("/v1/completions", json=GOOD, headers=headers)).status_code == 200
    span = collector.request()
    assert (span.parent, span.state) == ("", "") and span.trace != TRACE


async def test_two_parents_are_none(traced: Callable[..., FastAPI], collector: Collector) -> None:
    async with running(traced()) as client:
        headers = [("traceparent", TRACEPARENT), ("traceparent", TRACEPARENT)]
        await client.post("/v1/completions", json=GOOD, headers=headers)
    assert collector.request().parent == ""


async def test_a_bad_state_leaves_the_parent(traced: Callable[..., FastAPI], collector: Collector) -> None:
    async with running(traced()) as client:
        headers = {"traceparent": TRACEPARENT, "tracestate": "no state, is it"}
        await client.post("/v1/completions", json=GOOD, headers=headers)
    span = collector.request()
    assert (span.trace, span.parent, span.state) == (TRACE, PARENT, "")


async def test_what_the_caller_does_not_sample_is_not_sent(
    traced: Callable[..., FastAPI], collector: Collector
) -> None:
    async with running(traced()) as client:
        headers = {"traceparent": TRACEPARENT.removesuffix("01") + "00"}
        assert (await client.post("/v1/completions", json=GOOD, headers=headers)).status_code == 200
    assert collector.spans == []


async def test_log_lines_name_the_trace(
    traced: Callable[..., FastAPI], collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "server.logs")
    async with running(traced()) as client:
        await client.post("/v1/completions", json=GOOD)
        await client.get("/health")
    span = collector.request()
    first, second = [record.__dict__["fields"] for record in caplog.records if record.name == "server.logs"]
    assert (first["trace_id"], first["span_id"]) == (span.trace, span.id)
    assert "trace_id" not in second


@pytest.mark.parametrize(
    ("headers", "body", "status", "error", "name"),
    [
        ({}, GOOD, 401, "invalid_api_key", "text_completion"),
        (KEY, GOOD | {"x": 1}, 400, "unknown_field", "text_completion"),
        (KEY, GOOD | {"model": "other"}, 404, "model_not_found", "text_completion"),
        (KEY, GOOD | {"max_tokens": 999}, 400, "context_length_exceeded", "text_completion tiny"),
    ],
)
async def test_a_refusal_is_told_and_is_no_failure_of_ours(
    traced: Callable[..., FastAPI],
    collector: Collector,
    headers: dict[str, str],
    body: dict[str, Any],
    status: int,
    error: str,
    name: str,
) -> None:
    async with running(traced(api_key=[SecretStr("k")])) as client:
        assert (await client.post("/v1/completions", json=body, headers=headers)).status_code == status
    span = collector.request()
    assert span.attributes["http.response.status_code"] == status
    assert (span.attributes["error.type"], span.attributes["disco.outcome"]) == (error, "refused")
    assert (span.name, span.failed) == (name, False)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fault", "error"), [("die_after", "engine_unavailable"), ("fail_after", "request_failed")]
)
async def test_a_failure_is_one(
    traced: Callable[..., FastAPI],
    collector: Collector,
    engine: FakeEngine,
    stream: bool,
    fault: str,
    error: str,
) -> None:
    setattr(engine, fault, 4)
    async with running(traced()) as client:
        await client.post("/v1/completions", json=GOOD | {"max_tokens": 60, "stream": stream})
    span = collector.request()
    told = span.attributes
    assert span.failed and (told["error.type"], told["disco.outcome"]) == (error, "error")
    assert told["gen_ai.usage.output_tokens"] == 4
    assert told["gen_ai.response.finish_reasons"] == ["error"]


async def test_a_stream_that_is_left_ends_its_span(
    traced: Callable[..., FastAPI], collector: Collector, engine: FakeEngine
) -> None:
    engine.stall_after = 4
    async with listening(traced()) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        body = GOOD | {"max_tokens": 60, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body):
            await engine.stalled.wait()
    span = collector.request()
    assert span.attributes["disco.outcome"] == "abort" and not span.failed and span.end > span.start
    assert span.attributes["gen_ai.response.finish_reasons"] == ["abort"]
    assert "error.type" not in span.attributes


@pytest.mark.parametrize("listens", [False, True])
async def test_a_dead_collector_holds_up_nobody(make_app: Callable[..., FastAPI], listens: bool) -> None:
    """One that refuses connections, and one that takes them and never answers."""
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        if listens:
            hole.listen()
        app = make_app(otlp_endpoint=f"http://127.0.0.1:{hole.getsockname()[1]}")
        async with running(app) as client:
            started = time.monotonic()
            for _ in range(20):
                assert (await client.post("/v1/completions", json=GOOD)).status_code == 200
            assert time.monotonic() - started < 5
            started = time.monotonic()
        assert time.monotonic() - started < 6
