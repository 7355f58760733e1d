"""Numbers of any size and JSON of any depth: taken, or a 400 that names the field, never a fault of ours."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import template_families as families
from fake_engine import FakeEngine
from fastapi import FastAPI
from http_support import running

from server.protocol import strict_json
from server.protocol.base import Body, arms
from server.protocol.chat import ChatBody
from server.protocol.completions import CompletionBody
from server.protocol.responses import ResponsesBody

USER = [{"role": "user", "content": "hello"}]
BODIES: dict[str, tuple[type[Body], dict[str, Any]]] = {
    "/v1/completions": (CompletionBody, {"model": "tiny", "prompt": "hello"}),
    "/v1/chat/completions": (ChatBody, {"model": "tiny", "messages": USER}),
    "/v1/responses": (ResponsesBody, {"model": "tiny", "input": USER}),
}
NUMBERS = [10**400, -(10**400), 2**64, 2**63, -(2**63) - 1, 1e308, -1e308, 5e-324, -0.0, 0.5, -1]
FIELDS = [
    (path, name)
    for path, (model, _) in BODIES.items()
    for name, field in model.model_fields.items()
    if {int, float} & set(arms(field.annotation))
]


@pytest.fixture
async def client(app_of: Callable[[str], FastAPI]) -> AsyncIterator[httpx.AsyncClient]:
    async with running(app_of(families.EFFORT + "{{ tools | tojson }}{# <tool_call> #}")) as client:
        yield client


@pytest.mark.parametrize(("path", "name"), FIELDS)
async def test_numbers(client: httpx.AsyncClient, path: str, name: str) -> None:
    for number in NUMBERS:
        response = await client.post(path, json=BODIES[path][1] | {name: number})
        late = {504} if name == "timeout" else set()  # a time that is over at once
        assert response.status_code in {200, 400} | late, response.text
        if response.status_code == 400:
            assert response.json()["error"]["param"] == name


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels - 1):
        value = {"a": value}
    return value


CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
SHAPED = {"type": "json_schema", "name": "x"}
DEEP: list[tuple[str, int, Callable[[Any], dict[str, Any]]]] = [
    (CHAT, 4, lambda v: {"tools": [{"type": "function", "function": {"name": "f", "parameters": v}}]}),
    (CHAT, 2, lambda v: {"chat_template_kwargs": {"reasoning_effort": v}}),
    (
        CHAT,
        3,
        lambda v: {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": v}}},
    ),
    (CHAT, 2, lambda v: {"structured_outputs": {"json": v}}),
    (RESPONSES, 3, lambda v: {"tools": [{"type": "function", "name": "f", "parameters": v}]}),
    (RESPONSES, 3, lambda v: {"text": {"format": SHAPED | {"schema": v}}}),
    (RESPONSES, 3, lambda v: {"speculation": {"policy": "static", "options": {"sl": v}}}),
    ("/v1/completions", 2, lambda v: {"structured_outputs": {"json": v}}),
]


@pytest.mark.parametrize(("path", "outer", "fields"), DEEP)
async def test_depth(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    path: str,
    outer: int,
    fields: Callable[[Any], dict[str, Any]],
) -> None:
    """`outer`: levels around the value."""
    for levels, status in ((strict_json.DEEPEST, {200, 400}), (strict_json.DEEPEST + 1, {400})):
        body = BODIES[path][1] | fields(nested(levels - outer))
        response = await client.post(path, json=body)
        assert response.status_code in status, response.text
        assert ("nested too deeply" in response.text) == (levels > strict_json.DEEPEST)
