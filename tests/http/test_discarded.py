"""Tokens that the engine made and no answer has: each is counted once, with its reason."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
from fake_engine import FakeEngine
from http_support import events_of
from test_bad_input import GOOD
from test_ops import samples

REASONS = ("stop_string", "best_of", "aborted", "error")
Ids = Callable[[str], list[int]]


async def books(client: httpx.AsyncClient) -> tuple[float, dict[str, float]]:
    """Tokens generated, and those discarded by reason, without zeros."""
    found = await samples(client)
    discarded = {reason: found["disco_discarded_tokens_total", reason] for reason in REASONS}
    return found["disco_generated_tokens_total",], {why: n for why, n in discarded.items() if n}


@pytest.mark.parametrize("stream", [False, True])
async def test_behind_a_stop_string(
    client: httpx.AsyncClient, engine: FakeEngine, ids: Ids, stream: bool
) -> None:
    engine.answer = ids("one two three four five")
    asked = GOOD | {"max_tokens": 90, "stop": ["re"]}  # within a block, and within a word
    if stream:
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
    response = await client.post("/v1/completions", json=asked)
    usage = events_of(response)[-2]["usage"] if stream else response.json()["usage"]
    kept = usage["completion_tokens"]
    generated, discarded = await books(client)
    assert 0 < kept < generated < len(engine.answer)
    assert discarded == {"stop_string": generated - kept}
    assert engine.cuts == [(engine.requests[0].id, kept)]


async def test_a_stop_string_at_the_engines_own_end(
    client: httpx.AsyncClient, engine: FakeEngine, ids: Ids
) -> None:
    engine.answer = ids("one two")
    answer = (await client.post("/v1/completions", json=GOOD | {"max_tokens": 90, "stop": ["wo"]})).json()
    generated, discarded = await books(client)
    assert discarded == {"stop_string": generated - answer["usage"]["completion_tokens"]}
    assert generated == len(engine.answer)


async def test_all_of_an_answer_that_breaks_off(
    client: httpx.AsyncClient, engine: FakeEngine, ids: Ids
) -> None:
    """One choice is complete, the other one fails: neither is told."""
    engine.script = lambda request: ids("one" if request.id.endswith("0") else "one two three four")
    engine.fail_after = 7
    response = await client.post("/v1/completions", json=GOOD | {"max_tokens": 90, "n": 2})
    assert response.status_code == 500
    generated, discarded = await books(client)
    assert generated == len(ids("one")) + 7 and discarded == {"error": generated}


async def test_what_a_dead_engine_gave(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.die_after = 4
    assert (await client.post("/v1/completions", json=GOOD | {"max_tokens": 90})).status_code == 503
    assert await books(client) == (4, {"error": 4})


async def test_responses_and_chats_discard_nothing(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 20}
    told = (await client.post("/v1/chat/completions", json=chat)).json()["usage"]["completion_tokens"]
    asked = {"model": "tiny", "input": "hello", "max_output_tokens": 20}
    told += (await client.post("/v1/responses", json=asked)).json()["usage"]["output_tokens"]
    assert await books(client) == (told, {}) and told > 0
