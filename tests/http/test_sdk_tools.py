"""Tools, parsed answers and reasoning as the openai SDK's own helpers see them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest
import template_families as families
from chat_support import TOOLS
from fake_engine import FakeEngine
from fastapi import FastAPI
from http_support import listening
from pydantic import BaseModel

Ids = Callable[[str], list[int]]
USER: Any = [{"role": "user", "content": "hello"}]
CALLS = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln 🎉"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)


class Weather(BaseModel):
    city: str


@pytest.fixture
async def sdk(app_of: Callable[[str], FastAPI]) -> AsyncIterator[openai.AsyncOpenAI]:
    async with listening(app_of(families.THINKING)) as port:
        url = f"http://127.0.0.1:{port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            yield client


async def test_calls(sdk: openai.AsyncOpenAI, engine: FakeEngine, ids: Ids) -> None:
    engine.answer = [*ids(CALLS), 0]
    tools: Any = TOOLS
    answer = await sdk.chat.completions.create(model="tiny", messages=USER, tools=tools)
    calls = answer.choices[0].message.tool_calls or []
    assert [call.function.name for call in calls if call.type == "function"] == ["get_weather", "now"]
    assert answer.choices[0].finish_reason == "tool_calls"
    async with sdk.chat.completions.stream(model="tiny", messages=USER, tools=tools) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_completion()
    assert kinds.count("tool_calls.function.arguments.done") == 2
    streamed = final.choices[0].message.tool_calls or []
    assert [json.loads(call.function.arguments) for call in streamed] == [{"city": "Köln 🎉"}, {}]
    # what was answered goes back in as the SDK dumps it
    back = [*USER, answer.choices[0].message.model_dump()]
    back += [{"role": "tool", "tool_call_id": call.id, "content": "x"} for call in calls]
    engine.answer = [*ids("hello"), 0]
    await sdk.chat.completions.create(model="tiny", messages=back, tools=tools)


async def test_parsed(sdk: openai.AsyncOpenAI, engine: FakeEngine, ids: Ids) -> None:
    engine.answer = [*ids('{"city": "Köln"}'), 0]
    answer = await sdk.chat.completions.parse(model="tiny", messages=USER, response_format=Weather)
    assert answer.choices[0].message.parsed == Weather(city="Köln")
    tool = openai.pydantic_function_tool(Weather)
    engine.answer = [*ids('<tool_call>\n{"name": "Weather", "arguments": {"city": "Köln"}}\n</tool_call>'), 0]
    called = await sdk.chat.completions.parse(
        model="tiny", messages=USER, tools=[tool], tool_choice="required", parallel_tool_calls=False
    )
    (call,) = called.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == Weather(city="Köln")


async def test_reasoning(sdk: openai.AsyncOpenAI, engine: FakeEngine, ids: Ids) -> None:
    engine.answer = [*ids("<think>hm</think>hello"), 0]
    answer = await sdk.chat.completions.create(model="tiny", messages=USER)
    assert answer.choices[0].message.content == "hello"
    assert answer.choices[0].message.model_extra == {"reasoning_content": "hm"}
    assert answer.usage is not None and answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens
    stream = await sdk.chat.completions.create(model="tiny", messages=USER, stream=True)
    deltas = [choice.delta async for chunk in stream for choice in chunk.choices]
    assert "".join((delta.model_extra or {}).get("reasoning_content", "") for delta in deltas) == "hm"
    assert "".join(delta.content or "" for delta in deltas) == "hello"
