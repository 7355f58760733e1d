"""Tools and JSON with the default pair: real tokens, real grammars, drafts in between."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_support import calls_of, message_of
from live_app import Live, live

from engine.client_local import LocalEngine
from engine.config import EngineConfig
from engine.models.load import load_tokenizer

PATH = "/v1/chat/completions"
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 16}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "Weather of a city", "parameters": PARAMETERS},
    },
    {"type": "function", "function": {"name": "now", "description": "The time"}},
]
USER = {"role": "user", "content": "What is the weather in Paris?"}
FIELDS: dict[str, Any] = {"messages": [USER], "temperature": 0, "max_tokens": 64}
OFF, ON = {"max_sl": 0}, {"policy": "static", "options": {"sl": 5}}


@pytest.fixture(scope="module")
def app(smollm2: Path) -> Iterator[Live]:
    config = EngineConfig(target="smollm2", draft="default", device="cpu", max_model_len=1024, kv_blocks=128)
    with live(LocalEngine(config), load_tokenizer("smollm2", False)) as app:
        yield app


def test_a_call_whatever_is_drafted(app: Live) -> None:
    asked = FIELDS | {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    plain, drafted = (app.ask(PATH, **asked, speculation=how) for how in (OFF, ON))
    message = plain["choices"][0]["message"]
    assert plain["choices"][0]["finish_reason"] == "tool_calls" and message["content"] is None
    ((name, arguments),) = calls_of(message)
    assert name == "get_weather" and json.loads(arguments)["unit"] in ("celsius", "fahrenheit")
    assert calls_of(drafted["choices"][0]["message"]) == calls_of(message)
    assert drafted["speculation"]["accepted"] > 0
    chunks = app.stream(PATH, **asked, speculation=ON)
    assert calls_of(message_of(chunks)) == calls_of(message)
    assert sum("tool_calls" in chunk["choices"][0]["delta"] for chunk in chunks) > 2


def test_a_conversation_with_a_tool(app: Live) -> None:
    first = app.ask(PATH, **FIELDS, tools=TOOLS, tool_choice="required")["choices"][0]["message"]
    answers = [
        {"role": "tool", "tool_call_id": call["id"], "content": "sunny"} for call in first["tool_calls"]
    ]
    second = app.ask(PATH, **FIELDS | {"messages": [USER, first, *answers]}, tools=TOOLS)
    message = second["choices"][0]["message"]
    assert message["content"] or message["tool_calls"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_json_whatever_is_drafted(app: Live) -> None:
    schema = {"type": "object", "properties": {"unit": {"enum": ["C", "°F"]}}, "required": ["unit"]}
    schema["additionalProperties"] = False
    asked = FIELDS | {
        "response_format": {"type": "json_schema", "json_schema": {"name": "u", "schema": schema}}
    }
    plain, drafted = (app.ask(PATH, **asked, speculation=how) for how in (OFF, ON))
    choice = plain["choices"][0]
    assert choice["finish_reason"] == "stop" and json.loads(choice["message"]["content"])["unit"] in (
        "C",
        "°F",
    )
    assert drafted["choices"][0]["message"] == choice["message"]
