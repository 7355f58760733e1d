"""What chats with tools refuse, and the field that they name."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import template_families as families
from chat_support import TOOLS, ask
from fake_engine import FakeEngine
from fastapi import FastAPI
from http_support import running


@pytest.fixture
async def client(app_of: Callable[[str], FastAPI]) -> AsyncIterator[httpx.AsyncClient]:
    async with running(app_of(families.HERMES)) as client:
        yield client


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": {}}, "tools", "list"),
    ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type", "custom"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "required"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "required"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "letters"),
    ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name", "letters"),
    ({"tools": [{"type": "function", "function": {"name": "a" * 65}}]}, "tools[0].function.name", "64"),
    ({"tools": [{"type": "function", "function": {"name": "ab\n"}}]}, "tools[0].function.name", "letters"),
    ({"tools": [{"type": "function", "function": {"name": 3}}]}, "tools[0].function.name", "string"),
    (
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]},
        "tools[0].function.parameters",
        "object",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "string"}}}]},
        "tools[0].function.parameters",
        "object",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"properties": 1}}}]},
        "tools[0].function.parameters",
        "properties",
    ),
    ({"tools": [TOOLS[1], TOOLS[0], TOOLS[1]]}, "tools[2].function.name", "now"),
    ({"tools": [*TOOLS * 65]}, "tools", "128"),
    ({"tool_choice": "any"}, "tool_choice", "required"),
    ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice.function.name", "x"),
    ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice", "allowed_tools"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.function", "required"),
    ({"tool_choice": 1}, "tool_choice", "function"),
    ({"tool_choice": "required", "tools": []}, "tool_choice", "no tools"),
    ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice", "exclude"),
    ({"tool_choice": "required", "structured_outputs": {"regex": "a"}}, "tool_choice", "exclude"),
    (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "structured_outputs",
        "exclude",
    ),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "needs"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "response_format.json_schema.name",
        "required",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
        "response_format.json_schema.name",
        "letters",
    ),
    (
        {"response_format": {"type": "text", "json_schema": {"name": "a"}}},
        "response_format.json_schema",
        "only",
    ),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "boolean"),
    ({"functions": [{}]}, "functions", "tools"),
    ({"function_call": "auto"}, "function_call", "tool_choice"),
    ({"store": True}, "store", "stored"),
    ({"service_tier": "flex"}, "service_tier", "tier"),
    ({"include_reasoning": False}, "include_reasoning", "true"),
    ({"add_special_tokens": True}, "add_special_tokens", "template"),
    ({"chat_template": "x"}, "chat_template", "template"),
]
ASSISTANT = {"role": "assistant", "content": None}
ONE = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
BAD_MESSAGES: list[tuple[list[dict[str, Any]], str, str]] = [
    ([{"role": "tool", "tool_call_id": "c9", "content": "x"}], "messages[0].tool_call_id", "c9"),
    ([{"role": "user", "content": "x", "tool_call_id": "c1"}], "messages[0].tool_call_id", "tool"),
    ([{"role": "user", "content": "x", "tool_calls": [ONE]}], "messages[0].tool_calls", "assistant"),
    ([ASSISTANT], "messages[0].content", "required"),
    ([ASSISTANT | {"tool_calls": [{"id": "c1"}]}], "messages[0].tool_calls[0].function", "required"),
    (
        [ASSISTANT | {"tool_calls": [ONE | {"type": "custom"}]}],
        "messages[0].tool_calls[0].type",
        "custom",
    ),
    (
        [ASSISTANT | {"tool_calls": [{"id": "c", "function": {"name": "now", "arguments": {}}}]}],
        "messages[0].tool_calls[0].function.arguments",
        "string",
    ),
    ([{"role": "user", "content": [{"type": "file", "file": {}}]}], "messages[0].content[0].type", "file"),
    ([{"role": "user", "content": [{"type": "input_audio"}]}], "messages[0].content[0].type", "input_audio"),
    ([{"role": "user", "content": []}], "messages[0].content", "parts"),
    ([{"role": "user", "content": ["x"]}], "messages[0].content[0]", "object"),
    (
        [{"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}],
        "messages[0].content[0].y",
        "no field",
    ),
    ([{"role": "assistant", "content": "x", "audio": {"id": "a"}}], "messages[0].audio", "not supported"),
]


@pytest.mark.parametrize(("fields", "param", "word"), BAD)
async def test_bad_fields(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], param: str, word: str
) -> None:
    error = await ask(client, 400, **fields)
    assert error["param"] == param and word in error["message"]
    assert engine.requests == []


@pytest.mark.parametrize(("messages", "param", "word"), BAD_MESSAGES)
async def test_bad_messages(
    client: httpx.AsyncClient, messages: list[dict[str, Any]], param: str, word: str
) -> None:
    error = await ask(client, 400, messages=messages)
    assert error["param"] == param and word in error["message"]
