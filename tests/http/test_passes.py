"""`stream_options.include_speculation`: whose each token is, pass by pass, to the last statistic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
import template_families as families
from fake_engine import FakeEngine
from fastapi import FastAPI
from http_support import events_of, joined, running
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_app import CONTEXT, Live, Script
from test_live_streams import CHARACTERS, SLIPS, TEXTS
from transformers import PreTrainedTokenizerFast

from server.protocol.answers import CompletionChunk
from server.protocol.answers_chat import ChatChunk

Ids = Callable[[str], list[int]]
PATHS = ("/v1/completions", "/v1/chat/completions")
TOLD = {"include_speculation": True}


def asked(path: str, **fields: Any) -> dict[str, Any]:
    prompt = {"prompt": "hello"} if path == PATHS[0] else {"messages": [{"role": "user", "content": "hello"}]}
    return {"model": "tiny", "max_tokens": 60, "stream": True, "stream_options": TOLD} | prompt | fields


async def stream(client: httpx.AsyncClient, path: str, **fields: Any) -> list[Any]:
    response = await client.post(path, json=asked(path, **fields))
    assert response.status_code == 200, response.text
    *chunks, done = events_of(response)
    assert done == "[DONE]"
    kind = CompletionChunk if path == PATHS[0] else ChatChunk
    for chunk in chunks:
        kind.model_validate(chunk, strict=True)
    return chunks


def passes_of(chunks: list[Any], index: int = 0) -> list[Any]:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return joined(choice.get("passes", []) for choice in choices if choice["index"] == index)


def tokens_of(passes: list[Any]) -> list[Any]:
    return joined(each["tokens"] for each in passes)


def text_of(chunks: list[Any], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(c["text"] if "text" in c else c["delta"].get("content") or "" for c in choices)


def adds_up(chunks: list[Any], index: int = 0) -> list[Any]:
    """The passes of a choice, which must be the whole of its text and of its statistics."""
    passes = passes_of(chunks, index)
    assert "".join(token["text"] for token in tokens_of(passes)) == text_of(chunks, index)
    (told,) = (
        chunk["speculation"]
        for chunk in chunks
        if chunk["choices"] and chunk["choices"][0]["index"] == index and "speculation" in chunk
    )
    drafting = [each for each in passes if each["iteration"]]
    drafted, longest, accepted = (
        sum(each[name] for each in passes) for name in ("drafted", "lookahead", "accepted")
    )
    emitted = sum(len(each["tokens"]) for each in drafting)
    assert (told["iterations"], told["drafted"], told["accepted"]) == (len(drafting), drafted, accepted)
    assert told["mean_emitted"] == (emitted / len(drafting) if drafting else 0)
    assert told["mean_sl"] == (longest / len(drafting) if drafting else 0)
    assert told["acceptance_rate"] == (accepted / drafted if drafted else 0)
    for name in ("draft_seconds", "verify_seconds"):
        assert told[name] == pytest.approx(sum(each[name] for each in passes))
    for each in passes:
        origins = [token["origin"] for token in each["tokens"]]
        assert origins[: each["accepted"]] == ["draft"] * each["accepted"]
        own = origins[each["accepted"] :]
        assert len(own) < 2 and {*own} <= _own(each)
    assert not passes or not passes[0]["iteration"]
    return passes


def _own(told: dict[str, Any]) -> set[str]:
    """What the target's own token behind a draft may be called: a tree has short ways, too."""
    if not told["drafted"]:
        return {"target"}
    if told["accepted"] == told["lookahead"]:
        return {"bonus"}
    return {"correction", "bonus"} if told["drafted"] > told["lookahead"] else {"correction"}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("block", [1, 2, 5])
async def test_each_pass_is_told_once(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, block: int
) -> None:
    engine.block = block
    chunks = await stream(client, path)
    passes = adds_up(chunks)
    assert [token["id"] for token in tokens_of(passes)] == engine.answer
    assert passes[0] == {
        "iteration": False, "drafted": 0, "lookahead": 0, "accepted": 0, "stop_reason": None,
        "draft_seconds": 0.0, "verify_seconds": 0.0,
        "tokens": [{"id": engine.answer[0], "text": " wo", "origin": "target"}],
    }  # fmt: skip
    assert (passes[1]["iteration"], passes[1]["drafted"], passes[1]["accepted"]) == (True, block, block - 1)
    assert passes[1]["stop_reason"] == "policy"
    assert [token["origin"] for token in passes[1]["tokens"]] == ["draft"] * (block - 1) + ["correction"]
    assert sum(bool(chunk["choices"][0].get("passes")) for chunk in chunks) > 1  # they come as they are made


@pytest.mark.parametrize("path", PATHS)
async def test_nobody_sees_it_unasked(client: httpx.AsyncClient, path: str) -> None:
    for options in (None, {"include_usage": True}, {"include_speculation": False}):
        chunks = await stream(client, path, stream_options=options)
        assert not any("passes" in choice for chunk in chunks for choice in chunk["choices"])
    whole = (await client.post(path, json=asked(path, stream=False, stream_options=None))).json()
    assert "passes" not in whole["choices"][0]


@pytest.mark.parametrize("path", PATHS)
async def test_it_changes_nothing_else(client: httpx.AsyncClient, path: str) -> None:
    def bare(chunks: list[Any]) -> list[Any]:
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        return [{key: value for key, value in choice.items() if key != "passes"} for choice in choices]

    told, untold = [
        await stream(client, path, return_token_ids=True, stream_options=options) for options in (TOLD, None)
    ]
    assert bare(told) == bare(untold) and text_of(told)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stop", ["top", "the stop", "e", "here", " world", "never"])
@pytest.mark.parametrize("included", [False, True])
async def test_a_stop_string_takes_its_tokens(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, stop: str, included: bool
) -> None:
    for engine.block in (1, 3, 7):
        chunks = await stream(client, path, stop=stop, include_stop_str_in_output=included)
        passes = adds_up(chunks)
        for end in range(1, len(chunks)):  # nothing is told before its text is
            told = tokens_of(passes_of(chunks[:end]))
            assert text_of(chunks[:end]).startswith("".join(token["text"] for token in told))
        assert len(tokens_of(passes)) == len(joined(_ids(await stream(client, path, stop=stop,
            include_stop_str_in_output=included, return_token_ids=True))))  # fmt: skip


def _ids(chunks: list[Any]) -> list[list[int]]:
    return [choice.get("token_ids", []) for chunk in chunks for choice in chunk["choices"]]


@pytest.mark.parametrize("path", PATHS)
async def test_half_characters_have_no_text(
    client: httpx.AsyncClient, engine: FakeEngine, ids: Ids, path: str
) -> None:
    for block in (1, 2, 3, 4):
        engine.block = block
        for answer in (ids("a😀é!"), ids("a😀")[:-1], ids("a") + ids("😀")[:2]):  # the last two end in halves
            engine.answer = answer
            passes = adds_up(await stream(client, path))
            assert [token["id"] for token in tokens_of(passes)] == answer
    assert "\ufffd" in "".join(token["text"] for token in tokens_of(passes))


@pytest.mark.parametrize("path", PATHS)
async def test_choices_have_their_own(
    client: httpx.AsyncClient, engine: FakeEngine, ids: Ids, path: str
) -> None:
    texts = ["one two three", "four five", " there"]
    engine.script = lambda request: [*ids(texts[len(engine.requests) - 1]), 0]
    chunks = await stream(client, path, n=3)
    for index in range(3):
        adds_up(chunks, index)
    assert sorted(text_of(chunks, index) for index in range(3)) == sorted(texts)


@pytest.mark.parametrize("block", [1, 3, 500])
async def test_thoughts_and_calls_are_raw_text(
    app_of: Callable[[str], FastAPI], engine: FakeEngine, ids: Ids, block: int
) -> None:
    raw = '<think>\nI see. 🎉\n</think>\n\nLook: <tool_call>{"name": "look", "arguments": {}}</tool_call>'
    engine.answer, engine.block = [*ids(raw), 0], block
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    async with running(app_of(families.THINKING)) as client:
        chunks = await stream(client, PATHS[1], tools=tools, max_tokens=400)
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls" and text_of(chunks) == "Look:"
    tokens = tokens_of(passes_of(chunks))
    assert "".join(token["text"] for token in tokens) == raw
    assert [token["id"] for token in tokens] == engine.answer


async def test_with_echo_the_prompt_is_nobodys(client: httpx.AsyncClient) -> None:
    chunks = await stream(client, PATHS[0], echo=True)
    said = "".join(token["text"] for token in tokens_of(passes_of(chunks)))
    assert text_of(chunks) == "hello" + said


async def test_no_tokens_no_passes(client: httpx.AsyncClient) -> None:
    (chunk,) = await stream(client, PATHS[0], max_tokens=0)
    assert tokens_of(chunk["choices"][0]["passes"]) == []
    adds_up([chunk])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("wrong", ["yes", 1, [], {}])
async def test_bad_values(client: httpx.AsyncClient, path: str, wrong: object) -> None:
    body = asked(path, stream_options={"include_speculation": wrong})
    response = await client.post(path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "stream_options.include_speculation")
    response = await client.post(path, json=asked(path, stream=False))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "stream_options")


async def test_responses_refuse_it(client: httpx.AsyncClient) -> None:
    body = {"model": "tiny", "input": "hello", "stream": True, "stream_options": TOLD}
    response = await client.post("/v1/responses", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "stream_options.include_speculation")


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=TEXTS,
    stop=st.lists(st.text(st.sampled_from(CHARACTERS), min_size=1, max_size=3), max_size=2),
    slips=SLIPS,
    sl=st.integers(0, 8),
)
def test_a_real_engine_adds_up(
    app: Live,
    script: Script,
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    stop: list[str],
    slips: frozenset[int],
    sl: int,
) -> None:
    script.answer, script.slips = tokenizer(text, add_special_tokens=False)["input_ids"], slips
    policy = {"drafter": "model", "policy": "static", "options": {"sl": sl}} if sl else {"drafter": "none"}
    chunks = app.stream(
        PATHS[0], prompt=[5], max_tokens=CONTEXT - 1, temperature=0, stop=stop, speculation=policy,
        stream_options=TOLD, return_token_ids=True,
    )  # fmt: skip
    passes = adds_up(chunks)
    assert [token["id"] for token in tokens_of(passes)] == joined(_ids(chunks))
    assert all(each["drafted"] <= sl for each in passes)
