"""POST /v1/responses: tools, reasoning and structured text, held to what chat makes of the same request."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import openai
import pytest
from fake_engine import FakeEngine
from http_support import listening, running
from pydantic import BaseModel
from test_responses_stream import stream, types
from transformers import PreTrainedTokenizerFast

from server.app import create_app
from server.settings import Settings

Ids = Callable[[str], list[int]]
TEMPLATE = (
    "{% if tools %}<|im_start|>system <tools>{{ tools | tojson }}</tools>"
    "call as <tool_call>x</tool_call><|im_end|>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }} "
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
TOOL = {
    "type": "function",
    "name": "add",
    "description": "adds",
    "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
}
CHAT_TOOL = {"type": "function", "function": {name: TOOL[name] for name in TOOL if name != "type"}}
ANSWER = '<think>hm</think>so<tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call>'
ITEMS: list[dict[str, Any]] = [
    {"role": "user", "content": "hello"},
    {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
    {"role": "assistant", "content": [{"type": "output_text", "text": "so"}]},
    {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"x": 1}'},
    {"type": "function_call_output", "call_id": "c1", "output": "2"},
]
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "hello"},
    {
        "role": "assistant",
        "content": "so",
        "reasoning_content": "hm",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "2"},
]


@pytest.fixture
def engine(tokenizer: PreTrainedTokenizerFast, ids: Ids) -> FakeEngine:
    engine = FakeEngine(len(tokenizer), max_model_len=1024)
    engine.answer = [*ids(ANSWER), 0]
    return engine


@pytest.fixture
def make_app(
    tokenizer: PreTrainedTokenizerFast, engine: FakeEngine, settings: Settings
) -> Callable[..., Any]:
    """The same model with a template that knows tools and thinks."""
    able = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>")
    able.chat_template = TEMPLATE
    return lambda: create_app(settings, engine, able)


@pytest.fixture
async def client(make_app: Callable[..., Any]) -> AsyncIterator[httpx.AsyncClient]:
    async with running(make_app()) as client:
        yield client


@pytest.fixture
async def sdk(make_app: Callable[..., Any]) -> AsyncIterator[openai.AsyncOpenAI]:
    async with listening(make_app()) as port:
        base = f"http://127.0.0.1:{port}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0) as client:
            yield client


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post("/v1/responses", json={"model": "tiny", "input": "hello"} | fields)
    assert response.status_code == 200, response.text
    return response.json()


async def chat(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": MESSAGES[:1]} | fields
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_items_of_a_turn(client: httpx.AsyncClient, ids: Ids) -> None:
    answer = await ask(client, tools=[TOOL])
    reasoning, message, call = answer["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert message["content"][0]["text"] == "so"
    assert call["call_id"].startswith("call_") and call["id"].startswith("fc_")
    assert (call["type"], call["status"], call["name"]) == ("function_call", "completed", "add")
    assert json.loads(call["arguments"]) == {"x": 1}
    assert answer["status"] == "completed" and answer["tool_choice"] == "auto"
    assert answer["tools"] == [TOOL | {"strict": None}]
    thinking = answer["usage"]["output_tokens_details"]["reasoning_tokens"]
    assert 0 < thinking <= len(ids("<think>hm</think>")) + 1


async def test_it_says_what_chat_says(client: httpx.AsyncClient) -> None:
    own = await ask(client, tools=[TOOL])
    message = (await chat(client, tools=[CHAT_TOOL]))["choices"][0]["message"]
    texts = {item["type"]: item["content"][0]["text"] for item in own["output"][:2]}
    assert texts == {"reasoning": message["reasoning_content"], "message": message["content"]}
    function = message["tool_calls"][0]["function"]
    assert {name: own["output"][2][name] for name in function} == function


@pytest.mark.parametrize("choice", [None, "auto", "none"])
async def test_the_same_tokens_as_chat(
    client: httpx.AsyncClient, engine: FakeEngine, choice: str | None
) -> None:
    await chat(client, messages=MESSAGES, tools=[CHAT_TOOL], tool_choice=choice)
    await ask(client, input=ITEMS, tools=[TOOL], tool_choice=choice)
    one, other = engine.requests
    assert one.prompt_ids == other.prompt_ids and one.params == other.params


async def test_what_is_answered_goes_back_in(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    output = (await ask(client, tools=[TOOL]))["output"]
    result = {"type": "function_call_output", "call_id": output[-1]["call_id"], "output": "2"}
    engine.answer = [*ids("two"), 0]
    second = await ask(client, input=[ITEMS[0], *output, result], tools=[TOOL])
    await ask(client, input=ITEMS, tools=[TOOL])
    assert second["output"][0]["content"][0]["text"] == "two"
    assert engine.requests[1].prompt_ids == engine.requests[2].prompt_ids


@pytest.mark.parametrize("block", range(1, 9))
async def test_streamed(client: httpx.AsyncClient, engine: FakeEngine, block: int) -> None:
    engine.block = block
    events = await stream(client, tools=[TOOL])
    assert types(events) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]
    said = "".join(e["delta"] for e in events if e["type"] == "response.function_call_arguments.delta")
    assert json.loads(said) == {"x": 1}


async def test_logprobs_are_those_of_the_text(client: httpx.AsyncClient, ids: Ids) -> None:
    answer = await ask(client, tools=[TOOL], include=["message.output_text.logprobs"])
    logprobs = answer["output"][1]["content"][0]["logprobs"]
    assert "so" in "".join(entry["token"] for entry in logprobs)
    assert len(logprobs) < len(ids(ANSWER)) / 3


async def test_a_turn_cut_in_its_thoughts(client: httpx.AsyncClient, ids: Ids) -> None:
    answer = await ask(client, tools=[TOOL], max_output_tokens=len(ids("<think>h")))
    (reasoning,) = answer["output"]
    assert answer["status"] == reasoning["status"] == "incomplete"
    usage = answer["usage"]
    assert usage["output_tokens_details"]["reasoning_tokens"] == usage["output_tokens"]


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NAMED = {"type": "function", "name": "add"}
FORMAT = {"name": "n", "schema": SCHEMA, "strict": True}
SHAPED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {"text": {"format": {"type": "json_schema", **FORMAT}}},
        {"response_format": {"type": "json_schema", "json_schema": FORMAT}},
    ),
    ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
    (
        {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
        {"tools": [CHAT_TOOL], "tool_choice": "required", "parallel_tool_calls": False},
    ),
    (
        {"tools": [TOOL], "tool_choice": NAMED},
        {"tools": [CHAT_TOOL], "tool_choice": {"type": "function", "function": {"name": "add"}}},
    ),
]


async def test_what_has_a_shape_has_chats_grammar(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """In one test, as each app starts a compiler of its own."""
    for own, theirs in SHAPED:
        await chat(client, **theirs)
        answer = await ask(client, **own)
        one, other = engine.requests[-2:]
        assert one.params.grammar is not None and one.params == other.params
        for name in own.keys() - {"text", "tools"}:
            assert answer[name] == own[name]
        if "text" in own:
            assert answer["text"]["format"].items() >= own["text"]["format"].items()
    unsound = {"format": {"type": "json_schema", "name": "n", "schema": {"type": "nonsense"}}}
    body = {"model": "tiny", "input": "hello", "text": unsound}
    response = await client.post("/v1/responses", json=body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == "text.format.schema"
    assert "$.type" in error["message"] and "response_format" not in error["message"]


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [TOOL, TOOL]}, "tools[1].name", "add"),
    ({"tools": [TOOL | {"name": "a b"}]}, "tools[0].name", "letters"),
    ({"tools": [TOOL | {"parameters": {"type": "array"}}]}, "tools[0].parameters", "object"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "sub"}}, "tool_choice.name", "sub"),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"reasoning": {"effort": "low"}}, "reasoning.effort", "reasoning.effort"),
    (
        {"text": {"format": {"type": "json_schema", "name": "a b", "schema": {}}}},
        "text.format.name",
        "letters",
    ),
    (
        {"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}},
        "structured_outputs",
        "text.format",
    ),
    (
        {"text": {"format": {"type": "json_object"}}, "tools": [TOOL], "tool_choice": "required"},
        "tool_choice",
        "text.format",
    ),
]


@pytest.mark.parametrize(("change", "param", "says"), BAD)
async def test_bad_input(
    client: httpx.AsyncClient, engine: FakeEngine, change: dict[str, Any], param: str, says: str
) -> None:
    body = {"model": "tiny", "input": "hello"} | change
    response = await client.post("/v1/responses", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param and says in error["message"], error
    assert engine.requests == []


class Sum(BaseModel):
    a: int


async def test_the_sdk_parses(sdk: openai.AsyncOpenAI, engine: FakeEngine, ids: Ids) -> None:
    engine.answer = [*ids('{"a": 5}'), 0]
    answer = await sdk.responses.parse(model="tiny", input="hello", text_format=Sum)
    assert answer.output_parsed == Sum(a=5)
    async with sdk.responses.stream(model="tiny", input="hello", text_format=Sum) as events:
        async for _ in events:
            pass
        assert (await events.get_final_response()).output_parsed == Sum(a=5)


async def test_the_sdk_calls(sdk: openai.AsyncOpenAI, engine: FakeEngine, ids: Ids) -> None:
    items: list[Any] = [{"role": "user", "content": "hello"}]
    async with sdk.responses.stream(model="tiny", input=items, tools=[TOOL]) as events:
        said = [e.snapshot async for e in events if e.type == "response.function_call_arguments.delta"]
        first = await events.get_final_response()
    call = first.output[-1]
    assert call.type == "function_call" and said[-1] == call.arguments
    engine.answer = [*ids("two"), 0]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "2"}
    second = await sdk.responses.create(model="tiny", input=[*items, *first.output, result], tools=[TOOL])
    assert second.output_text == "two"
