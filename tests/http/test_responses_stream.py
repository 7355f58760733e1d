"""POST /v1/responses, streamed: every event in OpenAI's order, faults midway, clients that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from server.protocol.responses_answer import ResponsesAnswer, ResponsesEvent

Ids = Callable[[str], list[int]]
TEXT = " world, the stop is here"
DELTA = "response.output_text.delta"
_SDK_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def named_events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events; each has its type as its name, its number, and the shape of the page and of the SDK."""
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in response.text.strip("\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        ResponsesEvent.model_validate_json(data.removeprefix("data: "))
        _SDK_EVENT.validate_python(event)
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


async def stream(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": "tiny", "input": "hello", "stream": True} | fields
    response = await client.post("/v1/responses", json=body)
    assert response.status_code == 200, response.text
    return named_events(response)


def types(events: list[dict[str, Any]]) -> list[str]:
    """The types in order, a run of deltas as one."""
    found: list[str] = []
    for event in events:
        if not (found and found[-1] == event["type"] and event["type"].endswith(".delta")):
            found.append(event["type"])
    return found


async def test_order_of_a_text(client: httpx.AsyncClient) -> None:
    events = await stream(client)
    assert types(events) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        DELTA,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    created, in_progress, added, part_added = events[:4]
    text_done, part_done, item_done, completed = events[-4:]
    deltas = events[4:-4]
    for begun in (created, in_progress):
        response = begun["response"]
        assert response["status"] == "in_progress" and response["output"] == [] and response["usage"] is None
    item = added["item"]
    assert (item["type"], item["status"], item["content"]) == ("message", "in_progress", [])
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    assert part_added["part"] == part
    assert len(deltas) > 3 and "".join(event["delta"] for event in deltas) == TEXT
    inner = [part_added, *deltas, text_done, part_done]
    assert {(e["item_id"], e["output_index"], e["content_index"]) for e in inner} == {(item["id"], 0, 0)}
    assert text_done["text"] == TEXT and part_done["part"] == part | {"text": TEXT}
    whole = {"status": "completed", "content": [part_done["part"]]}
    assert item_done["item"] == item | whole
    assert completed["response"]["output"] == [item_done["item"]]
    assert len({event["response"]["id"] for event in (created, in_progress, completed)}) == 1


async def test_the_last_event_has_the_whole_answer(client: httpx.AsyncClient) -> None:
    def comparable(response: dict[str, Any]) -> dict[str, Any]:
        for item in response["output"]:
            del item["id"]
        own = ("id", "created_at", "completed_at")
        return {name: value for name, value in response.items() if name not in own}

    fields: dict[str, Any] = {"include": ["message.output_text.logprobs"], "return_token_ids": True}
    whole = (await client.post("/v1/responses", json={"model": "tiny", "input": "hello"} | fields)).json()
    ResponsesAnswer.model_validate(whole)
    Response.model_validate(whole)
    last = (await stream(client, **fields))[-1]["response"]
    assert comparable(last) == comparable(whole)


async def test_the_limit_makes_it_incomplete(client: httpx.AsyncClient) -> None:
    *_, item_done, last = await stream(client, max_output_tokens=2)
    assert item_done["item"]["status"] == "incomplete"
    assert last["type"] == "response.incomplete" and last["response"]["status"] == "incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert last["response"]["usage"]["output_tokens"] == 2


async def test_an_empty_answer_has_all_events(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.answer = [0]
    events = await stream(client)
    assert [t for t in types(events) if t != DELTA] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]


async def test_logprobs_come_with_their_text(client: httpx.AsyncClient) -> None:
    events = await stream(client, include=["message.output_text.logprobs"], top_logprobs=1)
    deltas = [event for event in events if event["type"] == DELTA]
    done = next(event for event in events if event["type"] == "response.output_text.done")
    assert [entry for event in deltas for entry in event["logprobs"]] == done["logprobs"]
    assert "".join(entry["token"] for entry in done["logprobs"]).removesuffix("<|end|>") == TEXT
    assert all(len(entry["top_logprobs"]) == 1 for entry in done["logprobs"])


@pytest.mark.parametrize("block", range(1, 9))
async def test_characters_stay_whole(
    client: httpx.AsyncClient, engine: FakeEngine, ids: Ids, block: int
) -> None:
    text = "né 你好 👩‍👩‍👧 e\u0301!"
    engine.answer, engine.block = [*ids(text), 0], block
    deltas = [event["delta"] for event in await stream(client) if event["type"] == DELTA]
    assert "".join(deltas) == text and "\ufffd" not in "".join(deltas)


@pytest.mark.parametrize("die", [True, False])
async def test_a_fault_midway(client: httpx.AsyncClient, engine: FakeEngine, die: bool) -> None:
    engine.die_after, engine.fail_after = (7, None) if die else (None, 7)
    *before, error, failed = await stream(client)
    assert types(before)[-1] == DELTA
    assert error["type"] == "error" and error["param"] is None
    assert error["code"] == ("engine_unavailable" if die else "request_failed")
    assert failed["type"] == "response.failed" and failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": error["message"]}
    told = "".join(event["delta"] for event in before if event["type"] == DELTA)
    (item,) = failed["response"]["output"]
    assert item["status"] == "incomplete" and item["content"][0]["text"] == told


async def test_our_own_fault_shows_no_detail(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Any) -> Any:
        raise KeyError("a secret of the house")

    engine.script = broken
    *_, error, failed = await stream(client)
    assert error["message"] == failed["response"]["error"]["message"] == "internal server error"


async def test_what_is_refused_is_no_stream(client: httpx.AsyncClient) -> None:
    body = {"model": "tiny", "input": "forbidden", "stream": True}
    response = await client.post("/v1/responses", json=body)
    assert response.status_code == 400 and response.json()["error"]["param"] == "input"


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_client_that_leaves_aborts(port: int, engine: FakeEngine, streamed: bool) -> None:
    engine.stall_after = 4
    body = {"model": "tiny", "input": "hello", "stream": streamed}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        asking = asyncio.create_task(_read_all(client, body))
        await asyncio.wait_for(engine.stalled.wait(), 10)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    for _ in range(1000):
        if engine.aborts:
            break
        await asyncio.sleep(0.01)
    assert engine.aborts == 1


async def _read_all(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    async with client.stream("POST", "/v1/responses", json=body) as response:
        async for _ in response.aiter_bytes():
            pass


async def test_many_streams_at_once(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answers = await asyncio.gather(*(stream(client) for _ in range(16)))
    assert len({events[-1]["response"]["id"] for events in answers}) == 16
    assert all("".join(e.get("delta", "") for e in events) == TEXT for events in answers)


async def test_the_page_lists_it(client: httpx.AsyncClient) -> None:
    page = (await client.get("/openapi.json")).json()
    operation = page["paths"]["/v1/responses"]["post"]
    content = operation["requestBody"]["content"]["application/json"]
    name = content["schema"]["$ref"].rsplit("/", 1)[1]
    assert "instructions" in page["components"]["schemas"][name]["properties"]
