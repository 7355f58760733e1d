"""What one key may take, and that it takes nothing from another; what a request may ask for."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from fastapi import FastAPI
from http_support import running
from pydantic import SecretStr
from test_admission import ROUTES, MakeApp
from test_bad_input import GOOD, check_error

import server.key_limits

KEYS = [SecretStr("sk-one"), SecretStr("sk-two")]
ONE, TWO = ({"authorization": f"Bearer {key.get_secret_value()}"} for key in KEYS)
POST = "/v1/completions"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Time passes only where a test says so."""
    now = [1000.0]
    monkeypatch.setattr(server.key_limits.time, "monotonic", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    return passes


@pytest.fixture
async def keyed(make_app: MakeApp) -> AsyncIterator[Callable[..., Any]]:
    """Clients of apps with two keys."""
    stack = []

    async def keyed(**changes: Any) -> httpx.AsyncClient:
        clients = running(make_app(api_key=KEYS, **changes))
        stack.append(clients)
        return await clients.__aenter__()

    yield keyed
    for clients in stack:
        await clients.__aexit__(None, None, None)


def limited(response: httpx.Response) -> dict[str, Any]:
    error = check_error(response, 429, "rate_limit_error")
    assert error["code"] == "rate_limit_exceeded"
    assert int(response.headers["retry-after"]) >= 1
    assert "sk-" not in response.text
    return error


async def refusals(client: httpx.AsyncClient) -> dict[str, float]:
    text = (await client.get("/metrics")).text
    found = re.findall(r'disco_refused_requests_total{reason="(\w+)"} (\S+)', text)
    return {reason: float(value) for reason, value in found if float(value)}


@pytest.mark.parametrize(("path", "body"), [*ROUTES, ("/tokenize", GOOD)])
async def test_open_requests_of_one_key_are_bounded(
    keyed: Callable[..., Any], engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    client = await keyed(key_concurrency=2)
    engine.stall_after = 0
    first = [asyncio.create_task(client.post(POST, json=GOOD, headers=ONE)) for _ in range(2)]
    while len(engine.requests) < 2:
        await asyncio.sleep(0.001)
    error = limited(await client.post(path, json=body, headers=ONE))
    assert "'key-1'" in error["message"] and "2" in error["message"]
    other = asyncio.create_task(client.post(POST, json=GOOD, headers=TWO))
    while len(engine.requests) < 3:
        await asyncio.sleep(0.001)
    engine.go_on.set()
    assert {(await each).status_code for each in (*first, other)} == {200}
    assert (await client.post(path, json=body, headers=ONE)).status_code == 200
    assert await refusals(client) == {"key_concurrency": 1}


async def test_requests_a_minute(keyed: Callable[..., Any], clock: Callable[[float], None]) -> None:
    client = await keyed(key_requests_per_minute=3)
    for left in (2, 1, 0):
        response = await client.post(POST, json=GOOD, headers=ONE)
        assert response.status_code == 200
        assert response.headers["x-ratelimit-limit-requests"] == "3"
        assert response.headers["x-ratelimit-remaining-requests"] == str(left)
    assert response.headers["x-ratelimit-reset-requests"] == "60.000s"
    response = await client.post(POST, json=GOOD, headers=ONE)
    limited(response)
    assert response.headers["retry-after"] == "20"
    assert response.headers["x-ratelimit-remaining-requests"] == "0"
    assert (await client.post(POST, json=GOOD, headers=TWO)).status_code == 200
    clock(19.0)
    limited(await client.post(POST, json=GOOD, headers=ONE))
    clock(1.5)
    assert (await client.post(POST, json=GOOD, headers=ONE)).status_code == 200
    clock(3600.0)  # a minute's worth at most is saved up
    statuses = [(await client.post(POST, json=GOOD, headers=ONE)).status_code for _ in range(4)]
    assert statuses == [200, 200, 200, 429]
    assert await refusals(client) == {"key_requests": 3}


@pytest.mark.parametrize("streamed", [False, True])
async def test_tokens_a_minute_of_prompts_and_answers(
    keyed: Callable[..., Any], clock: Callable[[float], None], streamed: bool
) -> None:
    client = await keyed(key_tokens_per_minute=60)
    response = await client.post(POST, json=GOOD, headers=ONE)
    used = response.json()["usage"]["total_tokens"]
    response = await client.post(POST, json=GOOD | {"max_tokens": 1}, headers=ONE)
    before = 60 - used - response.json()["usage"]["prompt_tokens"]
    assert before - 1 <= int(response.headers["x-ratelimit-remaining-tokens"]) <= before
    prompt = {"prompt": [5] * 80, "stream": streamed}  # more than there is: it may run, and is owed
    assert (await client.post(POST, json=GOOD | prompt, headers=ONE)).status_code == 200
    response = await client.post(POST, json=GOOD, headers=ONE)
    assert "tokens a minute" in limited(response)["message"]
    assert response.headers["x-ratelimit-remaining-tokens"] == "0"
    assert (await client.post(POST, json=GOOD, headers=TWO)).status_code == 200
    clock(float(response.headers["retry-after"]))
    assert (await client.post(POST, json=GOOD, headers=ONE)).status_code == 200


async def test_without_keys_all_are_one(make_app: MakeApp) -> None:
    async with running(make_app(key_requests_per_minute=1)) as client:
        assert (await client.post(POST, json=GOOD)).status_code == 200
        assert "all clients together" in limited(await client.post(POST, json=GOOD))["message"]


async def test_who_has_no_key_takes_nothing(keyed: Callable[..., Any]) -> None:
    client = await keyed(key_requests_per_minute=1, key_concurrency=1)
    for _ in range(3):
        assert (await client.post(POST, json=GOOD)).status_code == 401
    assert (await client.post(POST, json=GOOD, headers=ONE)).status_code == 200


async def test_no_limits_no_headers(client: httpx.AsyncClient) -> None:
    response = await client.post(POST, json=GOOD)
    assert not [name for name in response.headers if name.startswith("x-ratelimit")]


async def test_the_engine_is_told_on_whose_behalf(keyed: Callable[..., Any], engine: FakeEngine) -> None:
    """Fairness between keys is its business, and it knows no key, but a name."""
    client = await keyed()
    for path, body in ROUTES:
        assert (await client.post(path, json=body, headers=TWO)).status_code == 200
    assert {request.tenant for request in engine.requests} == {"key-2"}


@pytest.mark.parametrize(
    ("setting", "body", "param", "said"),
    [
        ({"max_n": 2}, {"n": 3}, "n", "at most 2"),
        ({"max_sequences": 3}, {"n": 2, "prompt": ["a", "b"]}, "prompt", "at most 3"),
        ({"max_sequences": 3}, {"best_of": 4}, "prompt", "at most 3"),
        ({"max_logit_bias": 1}, {"logit_bias": {"1": 1, "2": 1}}, "logit_bias", "at most 1"),
        ({"max_stop_length": 3}, {"stop": ["abc", "abcd"]}, "stop", "at most 3"),
        ({}, {"stop": "x" * 1025}, "stop", "at most 1024"),
        ({"max_request_seconds": 5.0}, {"timeout": 5.5}, "timeout", "at most 5"),
        ({}, {"stop_token_ids": [1] * 1025}, "stop_token_ids", "at most 1024"),
        ({}, {"timeout": 0}, "timeout", "greater than 0"),
        ({}, {"timeout": "1s"}, "timeout", "number"),
    ],
)
async def test_what_one_request_may_ask_for(
    make_app: MakeApp,
    engine: FakeEngine,
    setting: dict[str, Any],
    body: dict[str, Any],
    param: str,
    said: str,
) -> None:
    async with running(make_app(**setting)) as client:
        error = check_error(await client.post(POST, json=GOOD | body), 400)
    assert error["param"] == param and said in error["message"]
    assert not engine.requests


async def test_bounds_hold_for_chats_and_responses(make_app: MakeApp) -> None:
    async with running(make_app(max_n=2, max_logit_bias=1, max_sequences=1)) as client:
        (_, chat), (_, responses) = ROUTES[1:]
        for path, body, param in (
            ("/v1/chat/completions", chat | {"n": 3}, "n"),
            ("/v1/chat/completions", chat | {"n": 2}, "n"),
            ("/v1/responses", responses | {"logit_bias": {"1": 1, "2": 1}}, "logit_bias"),
        ):
            assert check_error(await client.post(path, json=body), 400)["param"] == param


def test_a_request_of_a_key_cannot_be_owed_for_ever(make_app: Callable[..., FastAPI]) -> None:
    """A bucket that holds less than nothing fills up at the same pace."""
    bucket = server.key_limits.Bucket(60)
    bucket.take(90)
    assert 30.9 < bucket.seconds_to(1.0) <= 31.0


async def test_a_key_that_fills_the_queue_does_not_keep_another_out(
    keyed: Callable[..., Any], engine: FakeEngine
) -> None:
    """Four may wait; the first key has them all. The second gets its half beyond that, and no more."""
    client = await keyed(max_num_seqs=1, max_queued_requests=4, max_queued_tokens=12)
    engine.stall_after = 0
    open_posts = []

    async def opens(headers: dict[str, str], **more: Any) -> None:
        open_posts.append(asyncio.create_task(client.post(POST, json=GOOD | more, headers=headers)))
        while len(engine.requests) < len(open_posts):
            await asyncio.sleep(0.001)

    async def is_refused(headers: dict[str, str], **more: Any) -> None:
        error = check_error(
            await client.post(POST, json=GOOD | more, headers=headers), 429, "rate_limit_error"
        )
        assert error["code"] == "queue_full"

    async with asyncio.timeout(20):
        for _ in range(5):
            await opens(ONE, prompt=[5, 6])
        await is_refused(ONE)
        await is_refused(TWO, prompt=[5] * 7)  # more than half of the tokens
        for _ in range(2):
            await opens(TWO, prompt=[5, 6])
        await is_refused(TWO)
        await is_refused(ONE)
        engine.go_on.set()
        assert {(await each).status_code for each in open_posts} == {200}
    text = (await client.get("/metrics")).text
    assert "disco_queued_requests 0.0" in text and "disco_queued_tokens 0.0" in text
