"""Tools over HTTP: whole and streamed answers, choices, what goes back in, what is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import template_families as families
from chat_support import PARAMETERS, TOOLS, USER, Grammars, ask, calls_of, message_of, stream
from fake_engine import FakeEngine
from fastapi import FastAPI
from http_support import joined, running
from transformers import PreTrainedTokenizerFast

Ids = Callable[[str], list[int]]
AppOf = Callable[[str], FastAPI]
PARIS = '{"city": "Paris, Île-de-France 🎉"}'
CALL = '<tool_call>\n{"name": "get_weather", "arguments": ' + PARIS + "}\n</tool_call>"
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.fixture
async def client(app_of: AppOf) -> AsyncIterator[httpx.AsyncClient]:
    async with running(app_of(families.HERMES)) as client:
        yield client


async def test_whole_answer(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    engine.answer = [*ids(f"Let me see.\n{CALL}\n{NOW}"), 0]
    answer = await ask(client)
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    assert calls_of(choice["message"]) == [("get_weather", PARIS), ("now", "{}")]
    first, second = choice["message"]["tool_calls"]
    assert first.keys() == {"id", "type", "function"} and first["type"] == "function"
    assert first["id"].startswith("call_") and first["id"] != second["id"]
    assert answer["usage"]["completion_tokens"] == len(engine.answer)
    assert engine.requests[0].params.grammar is None


async def test_content_is_null_beside_calls(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    engine.answer = [*ids(NOW), 0]
    message = (await ask(client))["choices"][0]["message"]
    assert message["content"] is None and message["refusal"] is None
    engine.answer = [*ids("hello"), 0]
    message = (await ask(client))["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "hello", "refusal": None}


@pytest.mark.parametrize("block", [1, 2, 3, 7, 500])
@pytest.mark.parametrize(
    "text",
    [
        f"Let me see.\n{CALL}\n{NOW}",
        f"{CALL}then text <tool_call>" + '{"name": "nope", "arguments": {}}</tool_call>',
        'broken <tool_call>{"name": "now", "arguments": {"a": }}</tool_call> 🎉',
        "<tool_call>",
        "",
    ],
)
async def test_streamed_is_whole(
    client: httpx.AsyncClient, engine: FakeEngine, ids: Ids, block: int, text: str
) -> None:
    engine.answer, engine.block = [*ids(text), 0], block
    chunks = await stream(client, stream_options={"include_usage": True}, logprobs=True)
    answer = await ask(client, logprobs=True)
    whole, streamed = answer["choices"][0], message_of(chunks)
    assert streamed["content"] == (whole["message"]["content"] or "")
    assert calls_of(streamed) == calls_of(whole["message"])
    assert streamed["finish_reason"] == whole["finish_reason"]
    assert chunks[-2]["usage"] == answer["usage"] and chunks[-1] == "[DONE]"
    logprobs = [c["logprobs"]["content"] for k in chunks[:-1] for c in k["choices"] if c["logprobs"]]
    assert joined(logprobs) == whole["logprobs"]["content"]


async def test_first_chunks_of_a_call(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    engine.answer = [*ids(CALL), 0]
    role, head, *_, last, done = await stream(client)
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    (call,) = head["choices"][0]["delta"]["tool_calls"]
    assert call["index"] == 0 and call["function"] == {"name": "get_weather", "arguments": ""}
    assert last["choices"][0]["delta"] == {} and last["choices"][0]["finish_reason"] == "tool_calls"
    assert done == "[DONE]"


async def test_choices_call_each_on_their_own(
    client: httpx.AsyncClient, engine: FakeEngine, ids: Ids
) -> None:
    texts = [CALL, "hello", f"{NOW}\n{NOW}"]
    engine.script = lambda request: [*ids(texts[int(request.id[-1])]), 0]
    answer = await ask(client, n=3)
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["tool_calls", "stop", "tool_calls"]
    ids_seen = [call["id"] for c in answer["choices"] for call in c["message"].get("tool_calls", [])]
    assert len(set(ids_seen)) == 3
    chunks = await stream(client, n=3)
    for index, choice in enumerate(answer["choices"]):
        assert calls_of(message_of(chunks, index)) == calls_of(choice["message"])


async def test_a_call_cut_by_the_limit_stays_content(
    client: httpx.AsyncClient, engine: FakeEngine, ids: Ids
) -> None:
    engine.answer = ids(CALL)
    choice = (await ask(client, max_tokens=30))["choices"][0]
    assert choice["finish_reason"] == "length" and "tool_calls" not in choice["message"]
    assert CALL.startswith(choice["message"]["content"]) and choice["message"]["content"]


async def test_stop_strings(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    """A stop string is looked for in what the model writes, so the end of a call may be one."""
    engine.answer = [*ids(f"{NOW} and more"), 0]
    choice = (await ask(client, stop=["</tool_call>"]))["choices"][0]
    assert calls_of(choice["message"]) == [("now", "{}")] and choice["finish_reason"] == "tool_calls"
    choice = (await ask(client, stop=["arguments"]))["choices"][0]
    assert (
        choice["message"]["content"] == '<tool_call>\n{"name": "now", "' and choice["finish_reason"] == "stop"
    )


@pytest.mark.parametrize("fields", [{"tools": []}, {"tool_choice": "none"}, {"tools": None}])
async def test_without_tools_nothing_is_a_call(
    client: httpx.AsyncClient, engine: FakeEngine, ids: Ids, fields: dict[str, Any]
) -> None:
    engine.answer = [*ids(NOW), 0]
    choice = (await ask(client, parallel_tool_calls=False, **fields))["choices"][0]
    assert choice["message"]["content"] == NOW and choice["finish_reason"] == "stop"
    assert list(engine.requests[0].prompt_ids) == ids(
        "<|im_start|>user hello<|im_end|><|im_start|>assistant "
    )


async def test_required(client: httpx.AsyncClient, engine: FakeEngine, grammars: Grammars, ids: Ids) -> None:
    engine.answer = [*ids(CALL), 0]
    choice = (await ask(client, tool_choice="required"))["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and calls_of(choice["message"]) == [("get_weather", PARIS)]
    assert engine.requests[0].params.grammar is not None and grammars.asked[0].param == "tools"
    assert grammars.format["at_least_one"] and not grammars.format["stop_after_first"]
    weather, now = grammars.format["tags"]
    assert weather["content"]["json_schema"] == PARAMETERS
    assert now["content"]["json_schema"]["additionalProperties"] is False
    await ask(client, tool_choice="required", parallel_tool_calls=False)
    assert grammars.format["stop_after_first"]


async def test_arguments_are_streamed_where_calls_are_sure(
    client: httpx.AsyncClient, engine: FakeEngine, ids: Ids
) -> None:
    engine.answer = [*ids(CALL), 0]
    chunks = await stream(client, tool_choice="required")
    pieces = [c for k in chunks[:-1] for c in k["choices"] if "tool_calls" in c["delta"]]
    assert len(pieces) > 5 and calls_of(message_of(chunks)) == [("get_weather", PARIS)]
    for fields, reason in (({"max_tokens": 70}, "length"), ({"stop": "France"}, "stop")):
        message = message_of(await stream(client, tool_choice="required", **fields))
        assert message["finish_reason"] == reason and message["content"] == ""
        assert PARIS.startswith(calls_of(message)[0][1])


async def test_a_named_function(
    client: httpx.AsyncClient, engine: FakeEngine, grammars: Grammars, ids: Ids
) -> None:
    engine.answer = [*ids(NOW), 0]
    await ask(client, tool_choice={"type": "function", "function": {"name": "now"}})
    (tag,) = grammars.format["tags"]
    assert '"now"' in tag["begin"] and grammars.format["stop_after_first"]
    assert "get_weather" in bytes_of(engine, client)


def bytes_of(engine: FakeEngine, client: httpx.AsyncClient) -> str:
    """The last prompt as text."""
    app: Any = client._transport.app  # type: ignore[attr-defined]
    text: str = app.state.context.tokenizer.decode(list(engine.requests[-1].prompt_ids), False)
    return text


async def test_offered_calls_are_held_to_their_form_only_where_asked(
    client: httpx.AsyncClient, engine: FakeEngine, grammars: Grammars, ids: Ids
) -> None:
    engine.answer = [*ids("hello"), 0]
    await ask(client, tool_choice="auto")
    assert grammars.asked == []
    await ask(client, parallel_tool_calls=False)
    assert grammars.format["type"] == "triggered_tags" and grammars.format["stop_after_first"]
    strict = {"type": "function", "function": {"name": "f", "parameters": PARAMETERS, "strict": True}}
    await ask(client, tools=[*TOOLS, strict])
    weather, _, held = grammars.format["tags"]
    assert weather["content"]["json_schema"] == {"type": "object"}
    assert held["content"]["json_schema"] == PARAMETERS


async def test_calls_go_back_in(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    engine.answer = [*ids(f"ok {NOW}"), 0]
    message = (await ask(client))["choices"][0]["message"]
    answers = [{"role": "tool", "tool_call_id": c["id"], "content": "noon"} for c in message["tool_calls"]]
    await ask(client, messages=[USER, message, *answers])
    prompt = bytes_of(engine, client)
    assert '<|im_start|>assistant ok<tool_call>{"name": "now", "arguments": {}}</tool_call>' in prompt
    assert "<|im_start|>tool noon<|im_end|>" in prompt


async def test_templates_without_tools(app_of: AppOf, engine: FakeEngine, ids: Ids) -> None:
    engine.answer = [*ids("hello"), 0]
    no_format = "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"
    for template, word in ((families.EFFORT, "knows no tools"), (no_format, "form known here")):
        async with running(app_of(template)) as client:
            error = await ask(client, 400)
            assert error["param"] == "tools" and error["code"] == "unsupported_tools"
            assert word in error["message"]
            await ask(client, tools=[])
            await ask(client, tool_choice="none")


async def test_markers_that_are_special_tokens(
    app_of: AppOf, engine: FakeEngine, ids: Ids, tokenizer: PreTrainedTokenizerFast
) -> None:
    """<|im_start|> stands in for a marker: it is read where the format has it, and no client sees it."""
    engine.answer = [*ids("<|im_end|>hi <|im_start|>"), 0]
    async with running(app_of(families.HERMES)) as client:
        assert (await ask(client))["choices"][0]["message"]["content"] == "hi "
        shown = await ask(client, skip_special_tokens=False)
        assert shown["choices"][0]["message"]["content"] == "<|im_end|>hi <|im_start|>"
    template = app_of(families.HERMES).state.context.renderer.template
    assert template.special_ids(("<|im_start|>",)) == {0, 2}


async def test_fields_that_change_nothing(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    engine.answer = [*ids("hello"), 0]
    nothing = {
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "user": "u",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "parallel_tool_calls": True,
        "modalities": ["text"],
        "tools": [],
        "tool_choice": "auto",
    }
    await ask(client, **nothing)
    await ask(client, tools=[])
    assert engine.requests[0].prompt_ids == engine.requests[1].prompt_ids
    assert engine.requests[0].params == engine.requests[1].params


async def test_the_context_is_the_messages_fault(client: httpx.AsyncClient) -> None:
    for fields in ({}, {"max_tokens": 5}):
        error = await ask(client, 400, messages=[{"role": "user", "content": "x" * 4200}], **fields)
        assert error["param"] == "messages" and error["code"] == "context_length_exceeded"
