"""Fields that generation shares: those of vLLM, those that mean nothing here, those refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest
from fake_engine import FakeEngine, logprob_of
from fastapi import FastAPI
from http_support import running
from test_bad_input import check_error

from engine.types import InvalidRequest
from engine.validate import token_set
from server.grammar import Structure
from server.protocol.body import validate
from server.protocol.completions import CompletionBody
from server.protocol.fields import word_tokens

Ids = Callable[[str], list[int]]
GOOD = {"model": "tiny", "prompt": "hello"}


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post("/v1/completions", json=GOOD | fields)
    assert response.status_code == 200, response.text
    return response.json()


async def test_what_means_nothing_is_accepted(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    plain = await ask(client)
    same = await ask(
        client, suffix="", metadata={"a": "b"}, store=False, service_tier="auto", best_of=1, user="me",
        use_beam_search=False, length_penalty=1, spaces_between_special_tokens=False, safety_identifier="s",
        prompt_cache_key="k", bad_words=[], stop=[], logit_bias={},
    )  # fmt: skip
    assert same["choices"] == plain["choices"]
    assert engine.requests[0].params == engine.requests[1].params


async def test_one_point_zero_is_an_integer(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await ask(
        client, prompt=[[5.0, 6], [7]], max_tokens=3.0, n=2.0, stop_token_ids=[9.0], seed=4.0, top_k=5.0,
        speculation={"max_sl": 4.0},
    )  # fmt: skip
    request = engine.requests[0]
    assert (request.prompt_ids, request.params.max_tokens, request.params.top_k) == ((5, 6), 3, 5)
    assert (request.params.seed, request.speculation.max_sl, len(engine.requests)) == (4, 4, 4)
    for fields in ({"n": 1.5}, {"prompt": [1.5]}, {"stop_token_ids": [1.5]}, {"prompt": [[True]]}):
        assert (await client.post("/v1/completions", json=GOOD | fields)).status_code == 400


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"suffix": "x"}, "fill-in-the-middle"),
    ({"store": True}, "not stored"),
    ({"service_tier": "priority"}, "one tier"),
    ({"use_beam_search": True}, "beam"),
    ({"length_penalty": 0.5}, "beam"),
    ({"truncate_prompt_tokens": 5}, "never cut"),
    ({"request_id": "x"}, "x-request-id"),
    ({"prompt_embeds": "x"}, "token ids"),
    *(({f"guided_{name}": "x"}, "structured_outputs") for name in ("json", "regex", "choice", "grammar")),
]


@pytest.mark.parametrize(("fields", "word"), REFUSED)
async def test_refused_by_name(client: httpx.AsyncClient, fields: dict[str, Any], word: str) -> None:
    error = check_error(await client.post("/v1/completions", json=GOOD | fields), 400)
    assert (error["param"], error["code"]) == (next(iter(fields)), "unsupported_field")
    assert "not supported" in error["message"] and word in error["message"]


SCHEMA = {"type": "object", "properties": {"ä": {"type": "integer"}}}
STRUCTURES: list[tuple[dict[str, Any], Structure]] = [
    ({"json": SCHEMA}, Structure("json_schema", json.dumps(SCHEMA, ensure_ascii=False), "json")),
    ({"json": json.dumps(SCHEMA)}, Structure("json_schema", json.dumps(SCHEMA, ensure_ascii=False), "json")),
    ({"json_object": True}, Structure("json_object", "", "json_object")),
    ({"regex": "[a-z]+"}, Structure("regex", "[a-z]+", "regex")),
    ({"choice": ["é", "b"]}, Structure("choice", '["é", "b"]', "choice")),
    ({"grammar": 'root ::= "a"'}, Structure("grammar", 'root ::= "a"', "grammar")),
    ({"structural_tag": {"type": "x"}}, Structure("structural_tag", '{"type": "x"}', "structural_tag")),
    ({"structural_tag": '{"type": "x"}'}, Structure("structural_tag", '{"type": "x"}', "structural_tag")),
    ({"regex": "a", "json": None, "disable_fallback": True}, Structure("regex", "a", "regex")),
]


@pytest.mark.parametrize(("outputs", "expected"), STRUCTURES)
def test_structured_outputs(outputs: dict[str, Any], expected: Structure) -> None:
    found = validate(CompletionBody, GOOD | {"structured_outputs": outputs}).structure()
    assert found == Structure(expected.kind, expected.text, f"structured_outputs.{expected.param}")


def test_response_format_of_a_completion() -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    found = validate(CompletionBody, GOOD | {"response_format": asked}).structure()
    text = json.dumps(SCHEMA, ensure_ascii=False)
    assert found == Structure("json_schema", text, "response_format.json_schema.schema")
    assert validate(CompletionBody, GOOD | {"response_format": {"type": "text"}}).structure() is None
    with pytest.raises(InvalidRequest, match="exclude each other"):
        validate(CompletionBody, GOOD | {"response_format": asked, "structured_outputs": {"regex": "a"}})


BAD_STRUCTURES: list[tuple[Any, str, str]] = [
    ({}, "structured_outputs", "exactly one"),
    ({"json_object": False}, "structured_outputs", "exactly one"),
    ({"regex": "a", "choice": ["b"]}, "structured_outputs", "'regex' and 'choice'"),
    ({"json": "{"}, "structured_outputs.json", "not JSON"),
    ({"json": "[1]"}, "structured_outputs.json", "object"),
    ({"json": '{"const": "\\ud800"}'}, "structured_outputs.json", "surrogate"),
    ({"structural_tag": '{"format": "\\ud800"}'}, "structured_outputs.structural_tag", "surrogate"),
    ({"json": '{"type": "null", "type": "string"}'}, "structured_outputs.json", "comes twice"),
    ({"json": "[" * 100_000}, "structured_outputs.json", "too deeply"),
    ({"json": '{"const": ' + "1" * 5000 + "}"}, "structured_outputs.json", "too many digits"),
    ({"json": 5}, "structured_outputs.json", "object"),
    ({"choice": []}, "structured_outputs.choice", "1"),
    ({"choice": [""]}, "structured_outputs.choice[0]", "1"),
    ({"regex": ""}, "structured_outputs.regex", "1"),
    ({"regex": "a", "whitespace_pattern": " "}, "structured_outputs.whitespace_pattern", "not supported"),
    ({"regex": "a", "disable_any_whitespace": True}, "structured_outputs.disable_any_whitespace", "false"),
    ({"xml": "a"}, "structured_outputs.xml", "unknown"),
    ("json", "structured_outputs", "object"),
]


@pytest.mark.parametrize(("outputs", "param", "word"), BAD_STRUCTURES)
def test_bad_structured_outputs(outputs: Any, param: str, word: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        validate(CompletionBody, GOOD | {"structured_outputs": outputs}).structure()
    assert refused.value.param == param and word in refused.value.message


async def test_a_grammar_reaches_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await ask(client, structured_outputs={"regex": "[a-z]+"}, n=2)
    one, two = (request.params.grammar for request in engine.requests)
    assert one is not None and one == two
    bad = GOOD | {"structured_outputs": {"regex": "["}}
    error = check_error(await client.post("/v1/completions", json=bad), 400)
    assert (error["param"], error["code"]) == ("structured_outputs.regex", "invalid_grammar")


async def test_constraints_reach_the_engine(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    await ask(client, bad_words=["stop", " the"], allowed_token_ids=[5, 6, 7])
    params = engine.requests[0].params
    assert params.allowed_token_ids == token_set((5, 6, 7), "allowed_token_ids", engine.info.vocab_size)
    assert params.bad_words == tuple(tuple(ids(text)) for text in ("stop", " stop", "the", " the"))


def test_bad_words_in_tokens() -> None:
    def encode(text: str) -> list[int]:
        return [ord(character) for character in text]

    assert word_tokens(["a"], encode) == ((97,), (32, 97))
    assert word_tokens([" a", "a"], encode) == ((97,), (32, 97))
    assert word_tokens([" "], encode) == ((32,), (32, 32))
    with pytest.raises(InvalidRequest, match="no tokens"):
        word_tokens(["x"], lambda _: [])


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"bad_words": [""]}, "bad_words[0]", "1"),
    ({"bad_words": "a"}, "bad_words", "list"),
    ({"bad_words": ["a"] * 1025}, "bad_words", "1024"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "1"),
    ({"allowed_token_ids": [270]}, "allowed_token_ids", "270"),
    ({"allowed_token_ids": [-1]}, "allowed_token_ids[0]", "0"),
    ({"allowed_token_ids": [5] * 271}, "allowed_token_ids", "270"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "20"),
    ({"prompt_logprobs": -1}, "prompt_logprobs", "0"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream"),
    ({"metadata": {"a": 5}}, "metadata.a", "string"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "16"),
    ({"repetition_penalty": 11}, "repetition_penalty", "10"),
    ({"add_special_tokens": 1}, "add_special_tokens", "boolean"),
    (
        {"stream_options": {"include_obfuscation": True}, "stream": True},
        "stream_options.include_obfuscation",
        "padded",
    ),
]


@pytest.mark.parametrize(("fields", "param", "word"), BAD)
async def test_bad(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], param: str, word: str
) -> None:
    error = check_error(await client.post("/v1/completions", json=GOOD | fields), 400)
    assert error["param"] == param and word in error["message"]
    assert engine.requests == []


async def test_prompt_logprobs(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    prompt = ids("hello one")
    choice = (await ask(client, prompt=prompt, prompt_logprobs=2))["choices"][0]
    first, *rest = choice["prompt_logprobs"]
    assert first is None and len(rest) == len(prompt) - 1
    for token, told in zip(prompt[1:], rest, strict=True):
        assert list(told) == [str(token), str(token + 1), str(token + 2)]
        assert told[str(token)]["logprob"] == logprob_of(token)
        assert [entry["rank"] for entry in told.values()] == [None, 1, 2]
    assert engine.requests[0].params.prompt_logprobs == 2


async def test_tokens_named_by_their_ids(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    logprobs = (await ask(client, logprobs=1, return_tokens_as_token_ids=True))["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [f"token_id:{i}" for i in engine.answer[: len(logprobs["tokens"])]]
    assert all(set(top) == {name, f"token_id:{int(name[9:]) + 1}"} for name, top in
               zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))  # fmt: skip


@pytest.mark.parametrize(
    "path", ["/health", "/ready", "/version", "/metrics", "/v1/models", "/v1/models/tiny"]
)
async def test_head(client: httpx.AsyncClient, path: str) -> None:
    response = await client.head(path)
    assert response.status_code == 200 and response.content == b""
    whole = await client.get(path)
    assert response.headers["content-type"] == whole.headers["content-type"]


async def test_head_where_there_is_no_get(client: httpx.AsyncClient) -> None:
    response = await client.head("/v1/completions")
    assert response.status_code == 405 and response.headers["allow"] == "POST" and not response.content
    assert (await client.head("/v1/nothing")).status_code == 404


async def test_head_over_a_socket(port: int) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        for _ in range(2):  # the connection stays good
            response = await client.head("/health")
            assert response.status_code == 200 and int(response.headers["content-length"]) > 0
        assert (await client.get("/health")).json()["status"] == "ok"


async def test_head_is_counted_by_its_route(client: httpx.AsyncClient) -> None:
    await client.head("/health")
    assert 'route="/health"' in (await client.get("/metrics")).text


async def test_who_does_not_draft_has_no_policy(make_app: Callable[..., FastAPI], engine: FakeEngine) -> None:
    engine._info = msgspec.structs.replace(engine._info, default_drafter="none")
    async with running(make_app()) as client:
        default = (await client.get("/v1/policies")).json()["default"]
    assert default == {"drafter": "none", "policy": "none", "options": {}}
