"""POST /v1/responses: log-probabilities go where their text goes, in whatever pieces it comes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import template_families as families
from chat_support import PARAMETERS
from fake_engine import FakeEngine
from fastapi import FastAPI
from http_support import joined, running
from test_responses_stream import DELTA, stream

Ids = Callable[[str], list[int]]
INCLUDE = {"include": ["message.output_text.logprobs"]}
TOOL = {"type": "function", "name": "get_weather", "parameters": PARAMETERS}
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "a"}}</tool_call>'


@pytest.fixture
async def client(app_of: Callable[[str], FastAPI]) -> AsyncIterator[httpx.AsyncClient]:
    async with running(app_of(families.THINKING)) as client:
        yield client


async def told(client: httpx.AsyncClient, **fields: Any) -> list[tuple[str, str]]:
    """Of each message its text, and the tokens whose log-probabilities it has."""
    body = {"model": "tiny", "input": "hello", "tools": [TOOL]} | INCLUDE | fields
    response = await client.post("/v1/responses", json=body)
    assert response.status_code == 200, response.text
    parts = [item["content"][0] for item in response.json()["output"] if item["type"] == "message"]
    return [(part["text"], "".join(entry["token"] for entry in part["logprobs"])) for part in parts]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 500])
@pytest.mark.parametrize(
    ("answer", "messages"),
    [
        ("<think>hm</think>so", [("so", "so<|end|>")]),
        ("<think>\nhm\n</think>\n\nso", [("so", "so<|end|>")]),
        ("\n<think>hm</think>", [("", "<|end|>")]),
        ("<think>hm", [("", "")]),
        ("<thing> so", [("<thing> so", "<thing> so<|end|>")]),
        ("<thi", [("<thi", "<thi<|end|>")]),
        (f"<think>hm</think>so\n{CALL}", [("so", "so")]),
        (
            f"so {CALL} and {CALL}\nno more",
            [("so", "so"), (" and", " and"), ("\nno more", "\nno more<|end|>")],
        ),
        (f"<think>{CALL}</think>{CALL}", []),
        ("so <tool_call>{} ", [("so <tool_call>{} ", "so <tool_call>{} <|end|>")]),
        ("hm 🎉" + CALL + "🎉", [("hm 🎉", "hm 🎉"), ("🎉", "🎉<|end|>")]),
    ],
)
async def test_where_they_go(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    ids: Ids,
    block: int,
    answer: str,
    messages: list[tuple[str, str]],
) -> None:
    engine.answer, engine.block = [*ids(answer), 0], block
    found = await told(client)
    # an emoji is tokens of a byte each, of which none is a character by itself
    shown = [(text, tokens.replace("\ufffd" * 4, "🎉")) for text, tokens in found]
    assert shown == messages


@pytest.mark.parametrize("block", [1, 3, 500])
async def test_the_stream_tells_the_same(
    client: httpx.AsyncClient, engine: FakeEngine, ids: Ids, block: int
) -> None:
    engine.answer, engine.block = [*ids(f"<think>hm</think>so{CALL} and"), 0], block
    events = await stream(client, tools=[TOOL], **INCLUDE)
    done = [event["logprobs"] for event in events if event["type"] == "response.output_text.done"]
    deltas = [event["logprobs"] for event in events if event["type"] == DELTA]
    assert joined(deltas) == joined(done)
    assert ["".join(entry["token"] for entry in each) for each in done] == ["so", " and<|end|>"]


async def test_an_undecided_tag_that_the_limit_cuts(
    client: httpx.AsyncClient, engine: FakeEngine, ids: Ids
) -> None:
    engine.answer = [*ids("<think>hm</think>so"), 0]
    assert await told(client, max_output_tokens=len(ids("<thi"))) == [("<thi", "<thi")]
    assert await told(client, stop="think") == [("<", "<")]


async def test_none_unless_they_are_asked_for(
    client: httpx.AsyncClient, engine: FakeEngine, ids: Ids
) -> None:
    engine.answer = [*ids("<think>hm</think>so"), 0]
    assert await told(client, include=[]) == [("so", "")]
