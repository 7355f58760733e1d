"""POST /v1/responses: the whole answer, what goes into the prompt, what is echoed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, logprob_of

Ids = Callable[[str], list[int]]
PROMPT = "<|im_start|>user hello<|im_end|><|im_start|>assistant "
TEXT = " world, the stop is here"


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post("/v1/responses", json={"model": "tiny", "input": "hello"} | fields)
    assert response.status_code == 200, response.text
    return response.json()


async def test_whole_answer(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    engine.cached_tokens = 2
    answer = await ask(client)
    assert answer["id"].startswith("resp_") and answer["object"] == "response"
    assert answer["status"] == "completed" and answer["error"] is None
    assert answer["incomplete_details"] is None and answer["completed_at"] >= answer["created_at"]
    (message,) = answer["output"]
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": TEXT, "annotations": [], "logprobs": []}],
    }
    request = engine.requests[0]
    assert list(request.prompt_ids) == ids(PROMPT)
    assert request.params.max_tokens == engine.info.max_model_len - len(ids(PROMPT))
    usage = answer["usage"]
    assert usage["input_tokens"] == len(ids(PROMPT)) and usage["output_tokens"] == len(engine.answer)
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["input_tokens_details"]["cached_tokens"] == 2
    assert usage["output_tokens_details"]["reasoning_tokens"] == 0
    assert answer["speculation"]["accepted"] > 0 and answer["speculation"]["policy"] == "static"


async def test_the_limit_makes_it_incomplete(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await ask(client, max_output_tokens=2)
    assert engine.requests[0].params.max_tokens == 2
    assert answer["status"] == "incomplete" and answer["completed_at"] is None
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["output"][0]["status"] == "incomplete"
    assert answer["usage"]["output_tokens"] == 2


async def test_an_empty_answer_is_an_empty_message(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.answer = [0]
    (message,) = (await ask(client))["output"]
    assert message["status"] == "completed" and message["content"][0]["text"] == ""


async def test_echo(client: httpx.AsyncClient) -> None:
    asked = {
        "instructions": "be brief",
        "max_output_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.75,
        "metadata": {"run": "7"},
        "user": "somebody",
        "prompt_cache_key": "a",
        "safety_identifier": "b",
        "max_tool_calls": 3,
        "parallel_tool_calls": False,
        "presence_penalty": 1.0,
        "frequency_penalty": -1.0,
    }
    answer = await ask(client, **asked)
    assert {name: answer[name] for name in asked} == asked
    assert answer["model"] == "tiny" and answer["text"] == {"format": {"type": "text"}}
    assert answer["tools"] == [] and answer["tool_choice"] == "auto" and answer["truncation"] == "disabled"
    assert answer["store"] is False and answer["background"] is False
    assert answer["previous_response_id"] is None and answer["reasoning"] == {"effort": None, "summary": None}


async def test_what_is_left_out_has_its_default(client: httpx.AsyncClient) -> None:
    plain = await ask(client)
    nulls = ("instructions", "metadata", "tools", "tool_choice", "reasoning", "text", "store", "include")
    same = await ask(client, **dict.fromkeys(nulls), previous_response_id=None, conversation=None)
    assert (plain["temperature"], plain["top_p"], plain["metadata"]) == (1.0, 1.0, {})
    assert {name: same[name] for name in ("tools", "text", "metadata")} == {
        name: plain[name] for name in ("tools", "text", "metadata")
    }


async def test_sampling_and_speculation_reach_the_engine(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await ask(
        client,
        seed=7,
        top_k=5,
        min_p=0.25,
        logit_bias={"5": 2},
        stop_token_ids=[9],
        priority=3,
        cache_salt="salt",
        speculation={"drafter": "ngram", "policy": "static", "options": {"sl": 2}},
    )
    request = engine.requests[0]
    params = request.params
    assert (params.seed, params.top_k, params.min_p, params.logit_bias) == (7, 5, 0.25, {5: 2.0})
    assert params.stop_token_ids == (9,) and request.priority == 3 and request.cache_salt == "salt"
    assert request.speculation.policy == "static" and request.speculation.options == {"sl": 2}


async def test_stop_strings(client: httpx.AsyncClient) -> None:
    answer = await ask(client, stop=["stop"])
    assert answer["output"][0]["content"][0]["text"] == " world, the "
    assert answer["status"] == "completed"


async def test_token_ids(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    answer = await ask(client, return_token_ids=True)
    assert answer["prompt_token_ids"] == ids(PROMPT) and answer["token_ids"] == engine.answer


async def test_logprobs(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    engine.answer = [*ids("hello"), 0]
    answer = await ask(client, include=["message.output_text.logprobs"], top_logprobs=2)
    logprobs = answer["output"][0]["content"][0]["logprobs"]
    assert [entry["logprob"] for entry in logprobs[: len(ids("hello"))]] == [
        logprob_of(i) for i in ids("hello")
    ]
    assert all(len(entry["top_logprobs"]) == 2 for entry in logprobs)
    assert answer["top_logprobs"] == 2
    bare = await ask(client, include=["message.output_text.logprobs"])
    assert all(entry["top_logprobs"] == [] for entry in bare["output"][0]["content"][0]["logprobs"])


async def prompt_of(client: httpx.AsyncClient, engine: FakeEngine, **fields: Any) -> list[int]:
    await ask(client, **fields)
    return list(engine.requests[-1].prompt_ids)


async def test_instructions_come_first(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    prompt = await prompt_of(client, engine, instructions="one")
    assert prompt == ids("<|im_start|>system one<|im_end|>" + PROMPT)


async def test_input_items(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    items = [
        {"role": "developer", "content": "one"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "tw"}]},
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [
                {"type": "output_text", "text": "thr", "annotations": [], "logprobs": []},
                {"type": "refusal", "refusal": "ee"},
            ],
        },
        {"role": "user", "content": [{"type": "input_text", "text": t} for t in ("hel", "lo")]},
    ]
    prompt = await prompt_of(client, engine, input=items)
    before = (
        "<|im_start|>system one<|im_end|><|im_start|>user tw<|im_end|><|im_start|>assistant three<|im_end|>"
    )
    assert prompt == ids(before + PROMPT)


async def test_the_same_tokens_as_chat(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    sampling = {"temperature": 0.5, "seed": 3, "min_tokens": 2, "stop_token_ids": [5]}
    await client.post("/v1/chat/completions", json={"model": "tiny", "messages": turns} | sampling)
    await ask(client, input=turns, **sampling)
    await ask(client, instructions="system", input=turns[1:], **sampling)
    chat, *own = engine.requests
    assert [request.prompt_ids for request in own] == [chat.prompt_ids] * 2
    assert [request.params for request in own] == [chat.params] * 2


async def test_an_answer_goes_back_in_as_it_came(
    client: httpx.AsyncClient, engine: FakeEngine, ids: Ids
) -> None:
    output = (await ask(client))["output"]
    items = [{"role": "user", "content": "hello"}, *output, {"role": "user", "content": "hello"}]
    prompt = await prompt_of(client, engine, input=items)
    assert prompt == ids(PROMPT + TEXT + "<|im_end|>" + PROMPT)


@pytest.mark.parametrize("die", [True, False])
async def test_the_engines_faults_have_a_status(
    client: httpx.AsyncClient, engine: FakeEngine, die: bool
) -> None:
    engine.die_after, engine.fail_after = (4, None) if die else (None, 4)
    response = await client.post("/v1/responses", json={"model": "tiny", "input": "hello"})
    assert response.status_code == (503 if die else 500)
    assert response.json()["error"]["code"] == ("engine_unavailable" if die else "request_failed")


async def test_prompt_logprobs(client: httpx.AsyncClient, ids: Ids) -> None:
    answer = await ask(client, prompt_logprobs=1)
    first, *rest = answer["prompt_logprobs"]
    assert first is None and len(rest) == len(ids(PROMPT)) - 1
    assert [next(iter(entry)) for entry in rest] == [str(i) for i in ids(PROMPT)[1:]]
