"""POST /tokenize and /detokenize: vLLM's shapes, both forms of input, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from fastapi import FastAPI
from http_support import running
from test_bad_input import check_error
from transformers import PreTrainedTokenizerFast

Ids = Callable[[str], list[int]]


async def tokenize(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post("/tokenize", json=fields)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("text", ["hello world", "", "a€😀é 漢字", " lead", "x" * 90])
async def test_there_and_back(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids, text: str) -> None:
    answer = await tokenize(client, prompt=text, model="tiny")
    assert answer == {"count": len(ids(text)), "max_model_len": 96, "tokens": ids(text), "token_strs": None}
    response = await client.post("/detokenize", json={"tokens": answer["tokens"]})
    assert response.json() == {"prompt": text}
    assert engine.requests == []


async def test_token_strs(client: httpx.AsyncClient, tokenizer: PreTrainedTokenizerFast, ids: Ids) -> None:
    answer = await tokenize(client, prompt="hello é", return_token_strs=True)
    assert answer["token_strs"] == tokenizer.convert_ids_to_tokens(ids("hello é"))


async def test_special_tokens(make_app: Callable[..., FastAPI], tokenizer: PreTrainedTokenizerFast) -> None:
    from tokenizers.processors import TemplateProcessing

    inner = tokenizer.backend_tokenizer
    before = inner.post_processor
    inner.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    try:
        async with running(make_app()) as client:
            plain = (await tokenize(client, prompt="hello", add_special_tokens=False))["tokens"]
            assert (await tokenize(client, prompt="hello"))["tokens"] == [1, *plain]
            body = {"model": "tiny", "prompt": "hello", "return_token_ids": True}
            for add in (True, False):
                response = await client.post("/v1/completions", json=body | {"add_special_tokens": add})
                assert response.json()["choices"][0]["prompt_token_ids"] == [1] * add + plain
    finally:
        inner.post_processor = before


async def test_messages_are_those_of_a_chat(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: PreTrainedTokenizerFast
) -> None:
    messages = [{"role": "user", "content": "hello"}]
    answer = await tokenize(client, messages=messages)
    await client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
    assert tuple(answer["tokens"]) == engine.requests[-1].prompt_ids
    shorter = await tokenize(client, messages=messages, add_generation_prompt=False)
    assert answer["tokens"][: shorter["count"]] == shorter["tokens"] and shorter["count"] < answer["count"]
    response = await client.post("/detokenize", json={"tokens": shorter["tokens"]})
    assert response.json()["prompt"] == "<|im_start|>user hello<|im_end|>"


BAD: list[tuple[str, dict[str, Any], str | None, str]] = [
    ("/tokenize", {}, "prompt", "exactly one"),
    ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt", "exactly one"),
    ("/tokenize", {"prompt": 5}, "prompt", "string"),
    ("/tokenize", {"prompt": ["a"]}, "prompt", "string"),
    ("/tokenize", {"content": "a"}, "content", "llama.cpp"),
    ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt", "messages"),
    ("/tokenize", {"messages": []}, "messages", "1"),
    ("/tokenize", {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string"),
    ("/tokenize", {"messages": [{"role": "user", "content": "forbidden"}]}, "messages", "no forbidden"),
    (
        "/tokenize",
        {"messages": [{"role": "user", "content": "a"}], "add_special_tokens": True},
        "add_special_tokens",
        "template",
    ),
    (
        "/tokenize",
        {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]},
        "tools[0].function",
        "required",
    ),
    ("/tokenize", {"prompt": "a", "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs", "messages"),
    ("/tokenize", {"prompt": "x" * 10_000}, "prompt", "cannot fit"),
    ("/detokenize", {}, "tokens", "required"),
    ("/detokenize", {"tokens": "a"}, "tokens", "list"),
    ("/detokenize", {"tokens": [1.5]}, "tokens[0]", "integer"),
    ("/detokenize", {"tokens": [True]}, "tokens[0]", "integer"),
    ("/detokenize", {"tokens": [-1]}, "tokens[0]", "0"),
    ("/detokenize", {"tokens": [270]}, "tokens", "270"),
    ("/detokenize", {"tokens": [10**30]}, "tokens[0]", "less"),
    ("/detokenize", {"tokens": [1], "content": "a"}, "content", "llama.cpp"),
]


@pytest.mark.parametrize(("path", "fields", "param", "word"), BAD)
async def test_refused(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any], param: str, word: str
) -> None:
    error = check_error(await client.post(path, json=fields), 400)
    assert error["param"] == param and word in error["message"]


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_unknown_model(client: httpx.AsyncClient, path: str) -> None:
    body = {"model": "gpt-9", "prompt": "a"} if path == "/tokenize" else {"model": "gpt-9", "tokens": [1]}
    assert check_error(await client.post(path, json=body), 404)["code"] == "model_not_found"
