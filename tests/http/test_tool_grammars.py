"""The grammars of tool calls, compiled: what they let through the parsers read, and nothing else passes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import xgrammar

from engine.types import InvalidRequest
from server.grammar import Structure
from server.protocol.body import validate
from server.protocol.chat import ChatBody
from server.reasoning import Place
from server.structure import structure_of, tool_schemas
from server.tools import ToolCall, ToolFormat, format_for, names
from server.turn import TurnReader

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "°F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
WEATHER = ToolCall("", "get_weather", '{"city": "Zürich 🎉", "unit": "°F"}')
NOW = ToolCall("", "now", "{}")
WRONG = ToolCall("", "get_weather", '{"city": 3, "unit": "C"}')
OTHER = ToolCall("", "other", "{}")
NAMED = {"type": "function", "function": {"name": "now"}}


@pytest.fixture(params=names())
def form(request: pytest.FixtureRequest) -> ToolFormat:
    found = format_for("", request.param)
    assert found is not None
    return found


def body_of(**fields: Any) -> ChatBody:
    user = {"role": "user", "content": "hi"}
    return validate(ChatBody, {"model": "m", "messages": [user], "tools": TOOLS} | fields)


def passes(structure: Structure | None, text: str) -> bool:
    """Whether the whole text, and nothing short of it, matches."""
    assert structure is not None and structure.kind == "structural_tag"
    vocabulary = [chr(byte) for byte in range(128)]
    compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo(vocabulary, stop_token_ids=[0]))
    matcher = xgrammar.GrammarMatcher(compiler.compile_structural_tag(structure.text))
    return matcher.accept_string(text) and matcher.accept_token(0)


def test_required(form: ToolFormat) -> None:
    structure = structure_of(body_of(tool_choice="required"), form, None)
    for calls in ([WEATHER], [NOW, WEATHER]):
        text = form.calls_text(calls)
        assert passes(structure, text)
        turn = TurnReader(form.parser(["get_weather", "now"], sure=True))
        turn.push(text, final=True)
        assert [(c.name, c.arguments) for c in turn.tool_calls] == [(c.name, c.arguments) for c in calls]
        assert turn.content == ""
    for text in (
        "",
        "hello",
        form.calls_text([WRONG]),
        form.calls_text([OTHER]),
        form.calls_text([NOW])[:-1],
    ):
        assert not passes(structure, text)


def test_one_call_only(form: ToolFormat) -> None:
    for fields in ({"tool_choice": "required", "parallel_tool_calls": False}, {"tool_choice": NAMED}):
        structure = structure_of(body_of(**fields), form, None)
        assert passes(structure, form.calls_text([NOW]))
        assert not passes(structure, form.calls_text([NOW, NOW]))
    assert not passes(structure, form.calls_text([WEATHER]))  # another one was named


def test_offered(form: ToolFormat) -> None:
    structure = structure_of(body_of(parallel_tool_calls=False), form, None)
    for text in ("", "hello, you", form.calls_text([NOW]), form.calls_text([WRONG])):
        assert passes(structure, text)
    assert not passes(structure, form.calls_text([NOW, NOW]))
    assert structure_of(body_of(), form, None) is None
    strict = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]
    held = structure_of(body_of(tools=strict), form, None)
    assert passes(held, form.calls_text([WEATHER])) and passes(held, "hello")
    assert not passes(held, form.calls_text([WRONG]))


def test_a_call_or_an_answer(form: ToolFormat) -> None:
    structure = structure_of(body_of(structured_outputs={"choice": ["yes", "no"]}), form, None)
    assert passes(structure, "yes") and passes(structure, form.calls_text([NOW]))
    assert not passes(structure, "maybe") and not passes(structure, "")


STRUCTURES: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_object"}}, '{"a": [1]}'),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS}}},
        WEATHER.arguments,
    ),
    ({"structured_outputs": {"regex": "a+"}}, "aaa"),
    ({"structured_outputs": {"choice": ["ä", "b"]}}, "ä"),
    ({"structured_outputs": {"grammar": 'root ::= "x" "y"'}}, "xy"),
    (
        {
            "structured_outputs": {
                "structural_tag": {
                    "type": "structural_tag",
                    "format": {"type": "const_string", "value": "tag"},
                }
            }
        },
        "tag",
    ),
]


@pytest.mark.parametrize(("fields", "text"), STRUCTURES)
def test_reasoning_comes_first(fields: dict[str, Any], text: str) -> None:
    body = body_of(tools=[], **fields)
    may = structure_of(body, None, Place.START)
    must = structure_of(body, None, Place.OPENED)
    thought = "I wonder: {}, <tool_call>.</think>\n\n"
    assert passes(may, text) and passes(may, f"<think>{thought}{text}") and not passes(may, f"<think>{text}")
    assert passes(must, thought + text) and not passes(must, text)
    for place in (None, Place.CLOSED, Place.ANSWER):
        assert structure_of(body, None, place) == body.structure()


def test_calls_after_reasoning(form: ToolFormat) -> None:
    must = structure_of(body_of(tool_choice="required"), form, Place.OPENED)
    assert passes(must, "hm</think>\n\n" + form.calls_text([NOW])) and not passes(
        must, form.calls_text([NOW])
    )


def test_an_old_structural_tag_cannot_be_part_of_more() -> None:
    old = {"structured_outputs": {"structural_tag": {"structures": [], "triggers": []}}}
    with pytest.raises(InvalidRequest) as caught:
        structure_of(body_of(tools=[], **old), None, Place.START)
    assert caught.value.param == "structured_outputs.structural_tag"


def test_a_tools_schema_is_told_by_its_tool() -> None:
    other = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {}}}}}
    assert tool_schemas(body_of(tools=[*TOOLS, other])) == []  # calls are only offered
    found = tool_schemas(body_of(tools=[*TOOLS, other], tool_choice="required"))
    assert [each.param for each in found] == [f"tools[{i}].function.parameters" for i in range(3)]
    assert found[2].kind == "check" and json.loads(found[2].text) == {"properties": {"a": {}}}
