"""What tests of chats with tools share: requests, streams added up, a grammar compiler that keeps notes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import httpx
from http_support import events_of, joined

from engine.types import CompiledGrammar, InvalidRequest
from server.grammar import Structure

USER = {"role": "user", "content": "hello"}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]


class Grammars:
    """Compiles nothing; keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[Structure] = []
        self.refuse: str | None = None  # a text that no structure may have

    async def compile(self, structure: Structure, tenant: str) -> CompiledGrammar:
        self.asked.append(structure)
        if self.refuse is not None and self.refuse in structure.text:
            raise InvalidRequest("no such grammar", structure.param, "invalid_grammar")
        return CompiledGrammar(key=str(len(self.asked)), data=b"{}")

    def close(self) -> None:
        pass

    @property
    def format(self) -> dict[str, Any]:
        """The structural tag asked for last."""
        assert self.asked[-1].kind == "structural_tag"
        format: dict[str, Any] = json.loads(self.asked[-1].text)["format"]
        return format


async def ask(client: httpx.AsyncClient, status: int = 200, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": [USER], "tools": TOOLS} | fields
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == status, response.text
    answer: dict[str, Any] = response.json()
    return answer if status == 200 else answer["error"]


async def stream(client: httpx.AsyncClient, **fields: Any) -> list[Any]:
    body = {"model": "tiny", "messages": [USER], "tools": TOOLS, "stream": True} | fields
    return events_of(await client.post("/v1/chat/completions", json=body))


def message_of(chunks: Sequence[Any], index: int = 0) -> dict[str, Any]:
    """The message that the chunks of one choice add up to, as SDKs do it."""
    message: dict[str, Any] = {
        "content": "",
        "reasoning_content": "",
        "tool_calls": [],
        "finish_reason": None,
    }
    for choice in joined(chunk["choices"] for chunk in chunks if chunk != "[DONE]"):
        if choice["index"] != index:
            continue
        delta = choice["delta"]
        assert len(delta.keys() - {"role"}) <= 1
        message["content"] += delta.get("content") or ""
        message["reasoning_content"] += delta.get("reasoning_content", "")
        for call in delta.get("tool_calls", []):
            if call["index"] == len(message["tool_calls"]):
                assert call["type"] == "function" and call["id"] and call["function"]["name"]
                message["tool_calls"].append(json.loads(json.dumps(call)))
            else:
                assert call.keys() == {"index", "function"} and call["function"].keys() == {"arguments"}
                message["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        message["finish_reason"] = choice["finish_reason"] or message["finish_reason"]
    return message


def calls_of(message: dict[str, Any]) -> list[tuple[str, str]]:
    calls = message.get("tool_calls", [])
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
