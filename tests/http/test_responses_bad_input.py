"""POST /v1/responses: what is wrong or not served is a 400 that names it, and the engine is not asked."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine

USER = {"role": "user", "content": "hello"}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
SCHEMA = {"type": "json_schema", "name": "x", "schema": {"type": "object"}}


def parts(*given: Any) -> list[Any]:
    return [{"role": "user", "content": list(given)}]


BAD: list[tuple[dict[str, Any], str | None, str]] = [
    ({"input": None}, "input", "string or a list"),
    ({"input": 5}, "input", "string or a list"),
    ({"input": []}, "input", "empty"),
    ({"input": ["hello"]}, "input[0]", "object"),
    ({"input": [USER, {"role": "user"}]}, "input[1].content", "required"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "function_call_output"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "user"),
    ({"input": [{**USER, "size": 1}]}, "input[0].size", "unknown"),
    ({"input": [{**USER, "phase": "commentary"}]}, "input[0].phase", "not supported"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "nothing is kept"),
    ({"input": [{"type": "web_search_call"}]}, "input[0].type", "web_search_call"),
    ({"input": [{"type": 3}]}, "input[0]", "type"),
    ({"input": parts()}, "input[0].content", "parts"),
    ({"input": parts("x")}, "input[0].content[0]", "type"),
    ({"input": parts({"type": "input_image", "image_url": "x"})}, "input[0].content[0].type", "input_image"),
    ({"input": parts({"type": "input_file", "file_id": "x"})}, "input[0].content[0].type", "input_file"),
    ({"input": parts({"type": "input_text"})}, "input[0].content[0].text", "text"),
    ({"input": parts({"type": "input_text", "text": "x", "y": 1})}, "input[0].content[0].y", "no field"),
    ({"input": parts({"type": "input_text", "text": "x", "y": None})}, "input[0].content[0].y", "no field"),
    ({"input": [USER, {**CALL, "call_id": ""}]}, "input[1].call_id", "at least 1"),
    ({"input": [USER, {**CALL, "arguments": {}}]}, "input[1].arguments", "string"),
    ({"input": [USER, {**CALL, "namespace": "n"}]}, "input[1].namespace", "not supported"),
    (
        {"input": [USER, CALL, {"type": "function_call_output", "call_id": "c2", "output": "5"}]},
        "input[2].call_id",
        "c2",
    ),
    (
        {"input": [CALL, {"type": "function_call_output", "call_id": "c1", "output": [{"type": "x"}]}]},
        "input[1].output[0].type",
        "'x'",
    ),
    (
        {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}, USER]},
        "input[0].encrypted_content",
        "encrypted",
    ),
    ({"input": [{"type": "reasoning", "summary": "x"}, USER]}, "input[0].summary", "summary_text"),
    ({"input": "forbidden"}, "input", "no forbidden words"),
    ({"input": "hello" * 100}, "input", "context"),
    ({"previous_response_id": "resp_1"}, "previous_response_id", "not kept"),
    ({"conversation": "conv_1"}, "conversation", "not kept"),
    ({"prompt": {"id": "x"}}, "prompt", "stored prompts"),
    ({"background": True}, "background", "not kept"),
    ({"store": True}, "store", "stored"),
    ({"truncation": "auto"}, "truncation", "never cut"),
    ({"context_management": [{"type": "compaction"}]}, "context_management", "never cut"),
    ({"moderation": {"model": "x"}}, "moderation", "moderate"),
    ({"reasoning": {"summary": "auto"}}, "reasoning.summary", "whole"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "low"),
    ({"include": ["file_search_call.results"]}, "include[0]", "file_search_call.results"),
    ({"include": "x"}, "include", "list"),
    ({"top_logprobs": 2}, "top_logprobs", "include"),
    ({"top_logprobs": 21, "include": ["message.output_text.logprobs"]}, "top_logprobs", "20"),
    ({"max_tool_calls": 0}, "max_tool_calls", "1"),
    ({"max_tool_calls": 2**63}, "max_tool_calls", "less"),
    ({"max_tool_calls": 1.5}, "max_tool_calls", "integer"),
    ({"max_output_tokens": 0}, "max_output_tokens", "1"),
    ({"max_output_tokens": 1000}, "max_output_tokens", "context"),
    ({"max_output_tokens": 2, "min_tokens": 3}, "min_tokens", "max_output_tokens"),
    ({"n": 2}, "n", "1"),
    ({"temperature": 2.5}, "temperature", "2"),
    ({"metadata": {"a": 1}}, "metadata.a", "string"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options", "stream"),
    (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
        "padded",
    ),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type", "xml"),
    ({"text": {"format": {"name": "x"}}}, "text.format.type", "type"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "required"),
    ({"text": {"verbosity": "low"}}, "text.verbosity", "no such setting"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
    ({"tools": [TOOL, {"type": "mcp"}]}, "tools[1].type", "mcp"),
    ({"tools": [{"type": "function"}]}, "tools[0].name", "required"),
    ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading", "prompt"),
    ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice", "any"),
    ({"tools": [TOOL], "tool_choice": {"type": "mcp"}}, "tool_choice.type", "mcp"),
    ({"messages": [USER]}, "messages", "unknown"),
    ({"speculation": {"policy": "nope"}}, "speculation.policy", "nope"),
]


@pytest.mark.parametrize(("change", "param", "says"), BAD)
async def test_bad_input(
    client: httpx.AsyncClient, engine: FakeEngine, change: dict[str, Any], param: str | None, says: str
) -> None:
    body = {"model": "tiny", "input": "hello"} | change
    response = await client.post("/v1/responses", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert says in error["message"] and error["param"] == param
    assert engine.requests == []


async def test_other_models_are_not_found(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/responses", json={"model": "gpt-9", "input": "hello"})
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"


async def test_nothing_is_kept(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/v1/responses", json={"model": "tiny", "input": "hello"})).json()
    assert (await client.get(f"/v1/responses/{answer['id']}")).status_code == 404
