"""The openai SDK, sync and async, against a real port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import openai
import pytest
from fake_engine import FakeEngine

TEXT = " world, the stop is here"
USER: list[dict[str, str]] = [{"role": "user", "content": "hello"}]
EXTRA = {"speculation": {"policy": "static", "options": {"sl": 2}}}


@pytest.fixture
async def sdk(port: int) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
    ) as client:
        yield client


async def test_async_chat(sdk: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    answer = await sdk.chat.completions.create(model="tiny", messages=USER, extra_body=EXTRA)
    assert answer.choices[0].message.content == TEXT
    assert answer.usage is not None and answer.usage.completion_tokens == len(engine.answer)
    assert answer.model_extra is not None and answer.model_extra["speculation"]["policy"] == "static"
    assert engine.requests[0].speculation.options == {"sl": 2}


async def test_async_chat_stream(sdk: openai.AsyncOpenAI) -> None:
    stream = await sdk.chat.completions.create(
        model="tiny", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    text, usage = "", None
    async for chunk in stream:
        usage = chunk.usage or usage
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert text == TEXT and usage is not None and usage.total_tokens > usage.completion_tokens


async def test_async_completions(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.completions.create(model="tiny", prompt="hello", max_tokens=60, logprobs=1)
    assert answer.choices[0].text == TEXT
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.tokens
    stream = await sdk.completions.create(model="tiny", prompt="hello", max_tokens=60, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == TEXT


async def test_leaving_a_stream_aborts(sdk: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.stall_after = 4
    stream = await sdk.completions.create(model="tiny", prompt="hello", max_tokens=60, stream=True)
    async for _ in stream:
        break
    await stream.close()
    for _ in range(1000):
        if engine.aborts:
            break
        await asyncio.sleep(0.01)
    assert engine.aborts == 1


async def test_errors_are_the_sdks_own(sdk: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await sdk.completions.create(model="gpt-9", prompt="hello")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        await sdk.completions.create(model="tiny", prompt="hello", temperature=3)
    engine.die_after = 4
    with pytest.raises(openai.APIError, match="died"):
        async for _ in await sdk.chat.completions.create(model="tiny", messages=USER, stream=True):
            pass


async def test_models(sdk: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in sdk.models.list()] == ["tiny"]
    assert (await sdk.models.retrieve("tiny")).id == "tiny"


async def test_sync(port: int) -> None:
    def talk(check: Callable[[openai.OpenAI], None]) -> None:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
            check(client)

    def plain(client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(model="tiny", messages=USER)
        assert answer.choices[0].message.content == TEXT

    def streamed(client: openai.OpenAI) -> None:
        stream = client.completions.create(model="tiny", prompt="hello", max_tokens=60, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == TEXT

    for check in (plain, streamed):
        await asyncio.to_thread(talk, check)


async def test_many_streams_at_once(sdk: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    order: list[int] = []

    async def one(number: int) -> str:
        text = ""
        stream = await sdk.completions.create(model="tiny", prompt="hello", max_tokens=60, stream=True)
        async for chunk in stream:
            order.append(number)
            text += chunk.choices[0].text
        return text

    assert await asyncio.gather(*(one(number) for number in range(16))) == [TEXT] * 16
    assert order != sorted(order) and engine.aborts == 0
