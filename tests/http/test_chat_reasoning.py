"""Reasoning apart from content, for templates with think tags; and grammars that leave room for it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import template_families as families
from chat_support import Grammars, ask, message_of, stream
from fake_engine import FakeEngine
from fastapi import FastAPI
from http_support import running

Ids = Callable[[str], list[int]]
AppOf = Callable[[str], FastAPI]
NO_TOOLS: dict[str, Any] = {"tools": []}
TEXT = "<think>\nI wonder. 🎉\n</think>\n\nhello there"


@pytest.fixture
async def client(app_of: AppOf) -> AsyncIterator[httpx.AsyncClient]:
    async with running(app_of(families.THINKING)) as client:
        yield client


@pytest.mark.parametrize("block", [1, 3, 500])
async def test_reasoning_is_apart(
    client: httpx.AsyncClient, engine: FakeEngine, ids: Ids, block: int
) -> None:
    engine.answer, engine.block = [*ids(TEXT), 0], block
    answer = await ask(client, **NO_TOOLS)
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("I wonder. 🎉", "hello there")
    details = answer["usage"]["completion_tokens_details"]
    assert details["reasoning_tokens"] == len(ids("<think>\nI wonder. 🎉\n</think>"))
    streamed = message_of(await stream(client, **NO_TOOLS))
    assert streamed["reasoning_content"] == message["reasoning_content"]
    assert streamed["content"] == message["content"] and streamed["finish_reason"] == "stop"


async def test_no_reasoning(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    engine.answer = [*ids("hello"), 0]
    answer = await ask(client, **NO_TOOLS)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "hello", "refusal": None}
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


async def test_reasoning_that_the_limit_cuts(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    engine.answer = [*ids(TEXT), 0]
    answer = await ask(client, max_tokens=12, **NO_TOOLS)
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["content"] == ""
    assert "I wonder".startswith(choice["message"]["reasoning_content"])
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 12


async def test_a_template_that_opens_the_tag(app_of: AppOf, engine: FakeEngine, ids: Ids) -> None:
    engine.answer = [*ids("I wonder.</think>hello"), 0]
    async with running(app_of(families.OPENING)) as client:
        message = (await ask(client, **NO_TOOLS))["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("I wonder.", "hello")


async def test_a_template_that_closes_the_tag(
    client: httpx.AsyncClient, engine: FakeEngine, ids: Ids
) -> None:
    engine.answer = [*ids("hello"), 0]
    answer = await ask(client, chat_template_kwargs={"enable_thinking": False}, **NO_TOOLS)
    assert answer["choices"][0]["message"]["content"] == "hello"
    assert list(engine.requests[0].prompt_ids)[-len(ids("<think></think>")) :] == ids("<think></think>")


async def test_reasoning_goes_on(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    engine.answer = [*ids(" more</think> done"), 0]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<think>one"}]
    answer = await ask(client, messages=messages, continue_final_message=True, **NO_TOOLS)
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (" more", "done")


async def test_calls_after_reasoning(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    engine.answer = [*ids(f"<think>{call}</think>{call}"), 0]
    choice = (await ask(client))["choices"][0]
    assert choice["message"]["reasoning_content"] == call and len(choice["message"]["tool_calls"]) == 1
    assert choice["finish_reason"] == "tool_calls"


async def test_templates_without_tags_split_nothing(app_of: AppOf, engine: FakeEngine, ids: Ids) -> None:
    engine.answer = [*ids(TEXT), 0]
    async with running(app_of(families.HERMES)) as client:
        answer = await ask(client, **NO_TOOLS)
        assert answer["choices"][0]["message"]["content"] == TEXT
        assert "reasoning_tokens" not in answer["usage"]["completion_tokens_details"]


async def test_a_grammar_leaves_room_for_reasoning(
    app_of: AppOf, client: httpx.AsyncClient, engine: FakeEngine, grammars: Grammars, ids: Ids
) -> None:
    """What must match is the answer after the reasoning: it may come, or must."""
    engine.answer = [*ids("<think>hm</think>{}"), 0]
    asked = {"response_format": {"type": "json_object"}} | NO_TOOLS
    message = (await ask(client, **asked))["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "{}")
    thought, answer = grammars.format["elements"]
    assert thought["type"] == "optional" and answer["type"] == "json_schema"
    await ask(client, tool_choice="required")
    assert grammars.format["elements"][1]["type"] == "tags_with_separator"
    await ask(client, chat_template_kwargs={"enable_thinking": False}, **asked)
    assert grammars.asked[-1].kind == "json_object"
    async with running(app_of(families.OPENING)) as opening:
        await ask(opening, **asked)
        tag, _ = grammars.format["elements"][0]["elements"]
        assert json.dumps(tag["begin"]) == '""' and tag["end"] == "</think>"
