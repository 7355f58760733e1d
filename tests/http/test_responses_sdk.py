"""The openai SDK's Responses client against a real port."""

from __future__ import annotations

from collections.abc import AsyncIterator

import openai
import pytest
from fake_engine import FakeEngine

TEXT = " world, the stop is here"


@pytest.fixture
async def sdk(port: int) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
    ) as client:
        yield client


async def test_create(sdk: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    extra = {"seed": 7, "speculation": {"policy": "static", "options": {"sl": 2}}}
    answer = await sdk.responses.create(model="tiny", input="hello", extra_body=extra)
    assert answer.output_text == TEXT and answer.status == "completed"
    assert answer.usage is not None and answer.usage.output_tokens == len(engine.answer)
    assert answer.usage.output_tokens_details.reasoning_tokens == 0
    assert answer.model_extra is not None and answer.model_extra["speculation"]["policy"] == "static"
    assert engine.requests[0].params.seed == 7


async def test_a_stream_of_events(sdk: openai.AsyncOpenAI) -> None:
    text, last = "", None
    async for event in await sdk.responses.create(model="tiny", input="hello", stream=True):
        if event.type == "response.output_text.delta":
            text += event.delta
        last = event
    assert text == TEXT
    assert last is not None and last.type == "response.completed" and last.response.output_text == TEXT


async def test_the_stream_helper(sdk: openai.AsyncOpenAI) -> None:
    async with sdk.responses.stream(model="tiny", input="hello") as stream:
        snapshots = [e.snapshot async for e in stream if e.type == "response.output_text.delta"]
        answer = await stream.get_final_response()
    assert snapshots[-1] == answer.output_text == TEXT


async def test_a_conversation_goes_on(sdk: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    first = await sdk.responses.create(model="tiny", input="hello")
    items = [{"role": "user", "content": "hello"}, *first.output, {"role": "user", "content": "go on"}]
    second = await sdk.responses.create(model="tiny", input=items)
    assert second.output_text == TEXT
    before, after = (len(request.prompt_ids) for request in engine.requests)
    assert after > before + len(engine.answer) - 1


async def test_errors_are_the_sdks_own(sdk: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.create(model="gpt-9", input="hello")
    with pytest.raises(openai.BadRequestError, match="not kept") as refused:
        await sdk.responses.create(model="tiny", input="hello", previous_response_id="resp_1")
    assert refused.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve("resp_1")
    engine.die_after = 4
    with pytest.raises(openai.InternalServerError, match="died"):
        await sdk.responses.create(model="tiny", input="hello")


async def test_a_fault_midway_is_told(sdk: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.fail_after = 4
    events = [event async for event in await sdk.responses.create(model="tiny", input="hello", stream=True)]
    *_, error, failed = events
    assert error.type == "error" and error.code == "request_failed"
    assert failed.type == "response.failed" and failed.response.error is not None
