"""Structured answers of chats: what the grammar compiler is asked for, beside tools and alone."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable

import httpx
import pytest
import template_families as families
from chat_support import TOOLS, Grammars, ask
from fake_engine import FakeEngine
from fastapi import FastAPI
from http_support import running

Ids = Callable[[str], list[int]]


@pytest.fixture
async def client(app_of: Callable[[str], FastAPI]) -> AsyncIterator[httpx.AsyncClient]:
    async with running(app_of(families.HERMES)) as client:
        yield client


async def test_structure_beside_tools(
    client: httpx.AsyncClient, engine: FakeEngine, grammars: Grammars, ids: Ids
) -> None:
    """The answer is a call, or what was asked for."""
    engine.answer = [*ids('{"a": 1}'), 0]
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    answer = await ask(client, response_format=asked)
    assert answer["choices"][0]["message"]["content"] == '{"a": 1}'
    _, other = grammars.format["elements"]
    assert (other["type"], other["json_schema"]) == ("json_schema", schema)
    for structure in (
        {"regex": "a+"},
        {"choice": ["a", "b"]},
        {"grammar": 'root ::= "a"'},
        {"json_object": True},
        {"structural_tag": {"type": "structural_tag", "format": {"type": "any_text"}}},
    ):
        await ask(client, structured_outputs=structure)
        assert grammars.format["type"] == "or"


async def test_response_format(
    client: httpx.AsyncClient, engine: FakeEngine, grammars: Grammars, ids: Ids
) -> None:
    engine.answer = [*ids("{}"), 0]
    schema = {"type": "object"}
    for asked, kind in (
        ({"type": "text"}, None),
        ({"type": "json_object"}, "json_object"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "json_object"),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": False}},
            "json_schema",
        ),
    ):
        grammars.asked.clear()
        await ask(client, tools=[], response_format=asked)
        assert [structure.kind for structure in grammars.asked] == ([] if kind is None else [kind])
    assert json.loads(grammars.asked[0].text) == schema
    assert grammars.asked[0].param == "response_format.json_schema.schema"
    assert engine.requests[-1].params.grammar is not None


async def test_a_bad_schema_is_told_by_its_tool(client: httpx.AsyncClient, grammars: Grammars) -> None:
    grammars.refuse = '"x"'
    wrong = {
        "type": "function",
        "function": {"name": "f", "parameters": {"properties": {"a": {"type": "x"}}}},
    }
    error = await ask(client, 400, tool_choice="required", tools=[*TOOLS, wrong])
    assert error["param"] == "tools[2].function.parameters" and error["code"] == "invalid_grammar"
    grammars.refuse = "structural_tag"  # for another reason, such as its size
    error = await ask(client, 400, tool_choice="required")
    assert error["param"] == "tools" and error["code"] == "invalid_grammar"
