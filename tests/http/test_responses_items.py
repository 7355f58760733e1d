"""Output items as they grow, and input items as chat's messages: the parts that need no server."""

from __future__ import annotations

from typing import Any

import pytest

from engine.types import InvalidRequest
from server.protocol.body import validate
from server.protocol.responses import ResponsesBody
from server.responses_chat import chat_body, messages
from server.responses_events import Output
from server.turn import Delta, ToolDelta

THINK = {
    "type": "reasoning",
    "id": "rs_1",
    "summary": [],
    "content": [{"type": "reasoning_text", "text": "hm"}],
}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x": 1}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "5"}
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}


def body(**fields: Any) -> ResponsesBody:
    return validate(ResponsesBody, {"model": "tiny", "input": "hello"} | fields)


def called(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def run(*deltas: Delta, status: Any = "completed") -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    output = Output()
    events = [event for delta in deltas for event in output.push(delta)]
    return events + output.finish(status), output.items()


def test_reasoning_text_calls() -> None:
    deltas = (
        Delta(reasoning="h"),
        Delta("m", ("so",)),
        Delta(parts=(ToolDelta(0, "c1", "f", ""), ToolDelta(0, None, None, '{"x"'))),
        Delta(parts=(ToolDelta(0, None, None, ": 1}"), ToolDelta(1, "c2", "g", "{}"))),
    )
    events, items = run(*deltas)
    assert [event["type"].removeprefix("response.") for event in events] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]
    reasoning, message, first, second = items
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm"}] and reasoning["summary"] == []
    assert message["content"][0]["text"] == "so"
    assert (first["call_id"], first["name"], first["arguments"]) == ("c1", "f", '{"x": 1}')
    assert (second["call_id"], second["name"], second["arguments"]) == ("c2", "g", "{}")
    assert {item["status"] for item in items} == {"completed"}
    added = [event for event in events if event["type"] == "response.output_item.added"]
    done = [event for event in events if event["type"] == "response.output_item.done"]
    assert (
        [event["output_index"] for event in added]
        == [event["output_index"] for event in done]
        == [0, 1, 2, 3]
    )
    assert [event["item"] for event in done] == items
    assert added[2]["item"] == first | {"status": "in_progress", "arguments": ""}
    for event in events:
        if "item_id" in event:
            assert event["item_id"] == items[event["output_index"]]["id"]


def test_text_after_a_call_is_a_message_of_its_own() -> None:
    call = ToolDelta(0, "c1", "f", "{}")
    for deltas in (
        [Delta(parts=("a",)), Delta(parts=(call,)), Delta(parts=("b",))],
        [Delta(parts=("a", call, "b"))],
    ):
        _, items = run(*deltas)
        assert [item["type"] for item in items] == ["message", "function_call", "message"]


def test_only_the_item_that_was_cut_is_incomplete() -> None:
    _, items = run(Delta(parts=("a",)), Delta(parts=(ToolDelta(0, "c1", "f", "{"),)), status="incomplete")
    assert [item["status"] for item in items] == ["completed", "incomplete"]


@pytest.mark.parametrize(
    ("deltas", "status", "expected"),
    [
        ((), "completed", ["message"]),
        ((), "incomplete", ["message"]),
        ((Delta(reasoning="hm"),), "completed", ["reasoning", "message"]),
        ((Delta(reasoning="hm"),), "incomplete", ["reasoning"]),
        ((Delta(parts=(ToolDelta(0, "c1", "f", "{}"),)),), "completed", ["function_call"]),
    ],
)
def test_an_answer_is_never_nothing(deltas: tuple[Delta, ...], status: str, expected: list[str]) -> None:
    events, items = run(*deltas, status=status)
    assert [item["type"] for item in items] == expected
    assert [event["type"] for event in events].count("response.output_item.done") == len(items)


def test_one_turn_is_one_message() -> None:
    items = [
        {"role": "user", "content": "hello"},
        THINK,
        {"role": "assistant", "content": "let me see"},
        CALL,
        {**CALL, "call_id": "c2"},
        RESULT,
        {**RESULT, "call_id": "c2", "output": [{"type": "input_text", "text": "6"}]},
        {"role": "assistant", "content": "eleven"},
    ]
    assert messages(body(input=items).items, "be brief") == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {
            "role": "assistant",
            "content": "let me see",
            "reasoning_content": "hm",
            "tool_calls": [called("c1", "f", '{"x": 1}'), called("c2", "f", '{"x": 1}')],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "5"},
        {"role": "tool", "tool_call_id": "c2", "content": "6"},
        {"role": "assistant", "content": "eleven"},
    ]


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        (["a", "b"], [{"content": "a"}, {"content": "b"}]),
        (["a", THINK, "b"], [{"content": "a"}, {"content": "b", "reasoning_content": "hm"}]),
        ([THINK], [{"content": "", "reasoning_content": "hm"}]),
        ([CALL, "b"], [{"content": "b", "tool_calls": [called("c1", "f", '{"x": 1}')]}]),
        ([CALL, RESULT, CALL], None),
    ],
)
def test_where_a_turn_ends(items: list[Any], expected: list[dict[str, Any]] | None) -> None:
    given = [{"role": "assistant", "content": item} if isinstance(item, str) else item for item in items]
    result = messages(body(input=given).items, None)
    if expected is None:
        assert [message["role"] for message in result] == ["assistant", "tool", "assistant"]
    else:
        assert result == [{"role": "assistant"} | message for message in expected]


def test_a_summary_counts_where_the_thoughts_are_missing() -> None:
    item = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "short"}]}
    (message,) = messages(body(input=[item]).items, None)
    assert message["reasoning_content"] == "short"


def test_an_output_needs_its_call_before_it() -> None:
    with pytest.raises(InvalidRequest, match="c1") as refused:
        messages(body(input=[RESULT, CALL]).items, None)
    assert refused.value.param == "input[0].call_id"


def test_chat_is_asked_the_same() -> None:
    schema = {"type": "object", "properties": {"a": {"default": None}}}
    own = body(
        tools=[{**TOOL, "strict": True, "parameters": schema}],
        tool_choice={"type": "function", "name": "f"},
        parallel_tool_calls=False,
        max_output_tokens=5,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        seed=3,
        logit_bias={"5": 1.5},
        speculation={"policy": "static", "options": {"sl": 2}},
    )
    chat = chat_body(own)
    assert chat.limit == 5 and chat.logprobs and chat.top_logprobs == 2 and chat.seed == 3
    assert chat.logit_bias == {5: 1.5} and chat.speculation.options == {"sl": 2}
    assert chat.tools is not None and not chat.parallel_tool_calls
