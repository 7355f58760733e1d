"""POST /v1/chat/completions: templates, chunk shapes, logprobs, choices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, logprob_of
from fastapi import FastAPI
from http_support import events_of, joined, running
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from server.app import create_app
from server.settings import Settings

Ids = Callable[[str], list[int]]
USER = [{"role": "user", "content": "hello"}]
PROMPT = "<|im_start|>user hello<|im_end|><|im_start|>assistant "
TEXT = " world, the stop is here"


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post("/v1/chat/completions", json={"model": "tiny", "messages": USER} | fields)
    assert response.status_code == 200, response.text
    return response.json()


async def stream(client: httpx.AsyncClient, **fields: Any) -> list[Any]:
    body = {"model": "tiny", "messages": USER, "stream": True} | fields
    return events_of(await client.post("/v1/chat/completions", json=body))


async def test_whole_answer(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    answer = await ask(client)
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": TEXT, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    request = engine.requests[0]
    assert list(request.prompt_ids) == ids(PROMPT)
    assert request.params.max_tokens == engine.info.max_model_len - len(ids(PROMPT))
    assert answer["usage"]["completion_tokens"] == len(engine.answer)
    assert answer["speculation"]["accepted"] > 0


async def test_stream_shapes(client: httpx.AsyncClient) -> None:
    *chunks, usage, done = await stream(client, stream_options={"include_usage": True})
    whole = await ask(client)
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"]) for chunk in [*chunks, usage]}) == 1
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == [] and usage["usage"] == whole["usage"]
    first, *middle, last = [chunk["choices"][0] for chunk in chunks]
    assert first == {
        "index": 0,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }
    assert all(choice["delta"].keys() == {"content"} and choice["finish_reason"] is None for choice in middle)
    assert "".join(choice["delta"]["content"] for choice in middle) == TEXT
    assert last["delta"] == {} and last["finish_reason"] == "stop"
    assert chunks[-1]["speculation"] == whole["speculation"]


async def test_choices_have_a_role_and_an_end_each(client: httpx.AsyncClient) -> None:
    *chunks, _ = await stream(client, n=3)
    choices = [chunk["choices"][0] for chunk in chunks]
    for index in range(3):
        own = [choice for choice in choices if choice["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert [choice["finish_reason"] for choice in own].count("stop") == 1
        assert "".join(choice["delta"].get("content", "") for choice in own) == TEXT
    answer = await ask(client, n=3)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert all("speculation" in choice for choice in answer["choices"])


async def test_logprobs(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    engine.answer = [*ids("né"), 0]
    content = (await ask(client, logprobs=True, top_logprobs=2))["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in content] == [logprob_of(i) for i in engine.answer]
    assert [entry["bytes"] for entry in content[:3]] == [[0x6E], [0xC3], [0xA9]]
    assert [entry["token"] for entry in content] == ["n", "\ufffd", "\ufffd", "<|end|>"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert all(entry.keys() == {"token", "logprob", "bytes"} for entry in content[0]["top_logprobs"])
    *chunks, _ = await stream(client, logprobs=True, top_logprobs=2)
    logprobs = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert joined(part["content"] for part in logprobs if part) == content
    bare = (await ask(client, logprobs=True))["choices"][0]["logprobs"]["content"]
    assert bare[0]["top_logprobs"] == []


async def test_prompt_logprobs(client: httpx.AsyncClient, ids: Ids) -> None:
    scored = (await ask(client, prompt_logprobs=2))["prompt_logprobs"]
    assert scored[0] is None and len(scored) == len(ids(PROMPT))
    assert all(str(token_id) in entry for token_id, entry in zip(ids(PROMPT)[1:], scored[1:], strict=True))
    assert "prompt_logprobs" not in await ask(client)


async def test_tokens_by_their_ids(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    entries = (await ask(client, logprobs=True, return_tokens_as_token_ids=True))["choices"][0]["logprobs"]
    assert [entry["token"] for entry in entries["content"]] == [f"token_id:{i}" for i in engine.answer]


async def test_token_ids(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    answer = await ask(client, return_token_ids=True)
    assert answer["prompt_token_ids"] == ids(PROMPT)
    assert answer["choices"][0]["token_ids"] == engine.answer
    first, *rest, _ = await stream(client, return_token_ids=True)
    assert first["prompt_token_ids"] == ids(PROMPT)
    assert joined(chunk["choices"][0].get("token_ids", []) for chunk in rest) == engine.answer


async def test_text_parts_and_developer(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    messages = [{"role": "developer", "content": "one"}, {"role": "user", "content": parts}]
    await ask(client, messages=messages)
    assert list(engine.requests[0].prompt_ids) == ids("<|im_start|>system one<|im_end|>" + PROMPT)


async def test_continue_final_message(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    messages = [*USER, {"role": "assistant", "content": "one two"}]
    await ask(client, messages=messages, continue_final_message=True)
    assert list(engine.requests[0].prompt_ids) == ids(PROMPT + "one two")


async def test_without_generation_prompt(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    await ask(client, add_generation_prompt=False)
    assert list(engine.requests[0].prompt_ids) == ids("<|im_start|>user hello<|im_end|>")


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_both_names_of_the_limit(client: httpx.AsyncClient, name: str) -> None:
    answer = await ask(client, **{name: 2})
    assert answer["usage"]["completion_tokens"] == 2
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_answers_can_be_sent_back(client: httpx.AsyncClient) -> None:
    answer = (await ask(client))["choices"][0]["message"] | {"tool_calls": None, "audio": None}
    await ask(client, messages=[*USER, answer, *USER])


@pytest.fixture
def bos_app(tokenizer: PreTrainedTokenizerFast, engine: FakeEngine, settings: Settings) -> FastAPI:
    """The same model with a tokenizer that puts <|im_start|> before every text by itself."""
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    with_bos = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    with_bos.chat_template = tokenizer.chat_template
    return create_app(settings, engine, with_bos)


async def test_bos_once(bos_app: FastAPI, engine: FakeEngine, ids: Ids) -> None:
    async with running(bos_app) as client:
        await ask(client)
        await client.post("/v1/completions", json={"model": "tiny", "prompt": "hello"})
    chat, plain = engine.requests
    assert list(chat.prompt_ids) == ids(PROMPT)  # the template wrote it
    assert list(plain.prompt_ids) == [1, *ids("hello")]  # the tokenizer's normal way
