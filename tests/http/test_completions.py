"""POST /v1/completions: shapes, choices, echo, logprobs, usage; streamed and whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, logprob_of
from http_support import events_of, joined
from transformers import PreTrainedTokenizerFast

from engine.types import GenerateRequest
from server.protocol.common import choice_seed

Ids = Callable[[str], list[int]]
TEXT = " world, the stop is here"


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 60} | fields
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def stream(client: httpx.AsyncClient, **fields: Any) -> list[Any]:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 60, "stream": True} | fields
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return events_of(response)


async def test_whole_answer(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    engine.cached_tokens = 1
    answer = await ask(client)
    tokens = len(engine.answer)
    iterations = -(-(tokens - 1) // engine.block)
    accepted = tokens - 1 - iterations
    assert answer["object"] == "text_completion" and answer["model"] == "tiny"
    assert answer["choices"] == [{"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}]
    assert answer["usage"] == {
        "prompt_tokens": len(ids("hello")),
        "completion_tokens": tokens,
        "total_tokens": len(ids("hello")) + tokens,
        "prompt_tokens_details": {"cached_tokens": 1},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": iterations * engine.block - accepted,
        },
    }
    assert answer["speculation"] == {
        "policy": "static",
        "drafter": "ngram",
        "iterations": iterations,
        "drafted": iterations * engine.block,
        "accepted": accepted,
        "mean_sl": engine.block,
        "acceptance_rate": pytest.approx(accepted / (iterations * engine.block)),
        "mean_emitted": pytest.approx((tokens - 1) / iterations),
        "draft_seconds": 0.25 * iterations,
        "verify_seconds": 0.5 * iterations,
    }


async def test_stream_has_the_same_text_and_ends_with_done(client: httpx.AsyncClient) -> None:
    *chunks, done = await stream(client, stream_options={"include_usage": True})
    whole = await ask(client)
    assert done == "[DONE]"
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in chunks}) == 1
    *text, last = chunks
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in text)
    assert "".join(chunk["choices"][0]["text"] for chunk in text) == TEXT
    assert len(text) > 3
    assert [chunk["choices"][0]["finish_reason"] for chunk in text] == [None] * (len(text) - 1) + ["stop"]
    assert text[-1]["speculation"] == whole["speculation"]
    assert not any("speculation" in chunk for chunk in text[:-1])


async def test_stream_without_usage_says_none(client: httpx.AsyncClient) -> None:
    *chunks, done = await stream(client)
    assert done == "[DONE]"
    assert not any("usage" in chunk for chunk in chunks)


async def test_continuous_usage_counts_tokens_not_chunks(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    *chunks, _ = await stream(client, stream_options={"continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] == 1 and counts[-1] == len(engine.answer) > len(chunks)


@pytest.mark.parametrize("form", ["string", "strings", "ids", "lists of ids"])
async def test_four_forms_of_prompt(
    client: httpx.AsyncClient, engine: FakeEngine, ids: Ids, form: str
) -> None:
    one, two = "hello", "one two"
    prompt = {"string": one, "strings": [one, two], "ids": ids(one), "lists of ids": [ids(one), ids(two)]}
    answer = await ask(client, prompt=prompt[form])
    expected = [ids(one)] if form in ("string", "ids") else [ids(one), ids(two)]
    assert [list(request.prompt_ids) for request in engine.requests] == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


async def test_choices_of_several_prompts(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    by_seed = {7: " one", choice_seed(7, 1): " two"}

    def script(request: GenerateRequest) -> list[int]:
        assert request.params.seed is not None
        return ids(by_seed[request.params.seed] + ("" if list(request.prompt_ids) == ids("hello") else "!"))

    engine.script = script
    fields = {"prompt": ["hello", "one two three four"], "n": 2, "seed": 7}
    answer = await ask(client, **fields)
    texts = [" one", " two", " one!", " two!"]
    assert [choice["text"] for choice in answer["choices"]] == texts
    parts = [choice["speculation"] for choice in answer["choices"]]
    assert answer["speculation"]["drafted"] == sum(part["drafted"] for part in parts)
    assert answer["usage"]["prompt_tokens"] == len(ids("hello")) + len(ids("one two three four"))

    *chunks, done = await stream(client, **fields)
    streamed = [""] * 4
    finished: list[int] = []
    for chunk in chunks:
        choice = chunk["choices"][0]
        streamed[choice["index"]] += choice["text"]
        finished += [choice["index"]] if choice["finish_reason"] else []
    assert streamed == texts and sorted(finished) == [0, 1, 2, 3] and done == "[DONE]"


async def test_choices_interleave(client: httpx.AsyncClient) -> None:
    *chunks, _ = await stream(client, n=3)
    order = [chunk["choices"][0]["index"] for chunk in chunks]
    assert order != sorted(order) and set(order) == {0, 1, 2}


def test_seeds_of_choices_differ_and_are_reproducible() -> None:
    seeds = [choice_seed(42, i) for i in range(128)]
    assert seeds[0] == 42 and len(set(seeds)) == 128
    assert seeds == [choice_seed(42, i) for i in range(128)]
    assert choice_seed(43, 1) != seeds[1]


async def test_best_of_takes_the_best_mean_logprob(
    client: httpx.AsyncClient, engine: FakeEngine, ids: Ids
) -> None:
    words = [[token_id] * 3 for token_id in ids("abcdefg")]
    engine.script = lambda request: words[int(request.id.rpartition("-")[2])]
    answer = await ask(client, best_of=7, n=2)
    ranked = sorted(ids("abcdefg"), key=logprob_of, reverse=True)
    expected = [chr(ord("a") + ids("abcdefg").index(token_id)) * 3 for token_id in ranked[:2]]
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 6  # of the answer; the others' tokens are discarded
    assert 'disco_discarded_tokens_total{reason="best_of"} 15.0' in (await client.get("/metrics")).text


async def test_logprobs(client: httpx.AsyncClient, engine: FakeEngine, ids: Ids) -> None:
    engine.answer = ids(" stop é")
    logprobs = (await ask(client, logprobs=2))["choices"][0]["logprobs"]
    assert logprobs["tokens"][-2:] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs["token_logprobs"] == [logprob_of(i) for i in engine.answer]
    assert all(len(top) == 3 for top in logprobs["top_logprobs"])
    for token, value, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == value
    assert "".join(logprobs["tokens"][:-2]) == " stop "
    assert logprobs["text_offset"][0] == 0 and logprobs["text_offset"][-2:] == [6, 6]


async def test_streamed_logprobs_are_those_of_the_whole(client: httpx.AsyncClient) -> None:
    fields = {"logprobs": 1, "stop": ["is h"], "return_token_ids": True, "echo": True}
    whole = (await ask(client, **fields))["choices"][0]
    *chunks, _ = await stream(client, **fields)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["text"] == "hello world, the stop "
    assert joined(choice["token_ids"] for choice in choices) == whole["token_ids"]
    assert choices[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    for key, values in whole["logprobs"].items():
        assert joined(choice["logprobs"][key] for choice in choices) == values


async def test_echo_alone_and_with_no_tokens(client: httpx.AsyncClient, ids: Ids) -> None:
    assert (await ask(client, echo=True))["choices"][0]["text"] == "hello" + TEXT
    answer = await ask(client, echo=True, max_tokens=0)
    assert answer["choices"][0]["text"] == "hello"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    answer = await ask(client, prompt=ids("one two"), echo=True, max_tokens=0)
    assert answer["choices"][0]["text"] == "one two"


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_echo_scores_the_prompt(
    client: httpx.AsyncClient, engine: FakeEngine, ids: Ids, max_tokens: int
) -> None:
    prompt = ids("hello world")
    choice = (await ask(client, prompt=prompt, echo=True, logprobs=1, max_tokens=max_tokens))["choices"][0]
    logprobs = choice["logprobs"]
    everything = prompt + engine.answer[:max_tokens]
    assert logprobs["token_logprobs"] == [None] + [logprob_of(i) for i in everything[1:]]
    assert logprobs["top_logprobs"][0] is None
    assert "".join(logprobs["tokens"]) == choice["text"]
    offsets = logprobs["text_offset"]
    assert [choice["text"][offset : offset + 1] for offset in offsets] == [t[0] for t in logprobs["tokens"]]


async def test_extra_fields_reach_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await ask(
        client, temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, presence_penalty=1, frequency_penalty=-1,
        repetition_penalty=1.2, logit_bias={"5": -100}, seed=3, min_tokens=2, ignore_eos=True,
        stop_token_ids=[9], sampling_method="rejection", priority=-4, cache_salt="s", user="me",
        speculation={"drafter": "none", "policy": "static", "options": {"sl": 2}, "max_sl": 4},
    )  # fmt: skip
    request = engine.requests[0]
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 5, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1, -1, 1.2)
    assert (params.logit_bias, params.seed, params.min_tokens) == ({5: -100.0}, 3, 2)
    assert (params.ignore_eos, params.stop_token_ids, params.sampling_method) == (True, (9,), "rejection")
    assert (request.priority, request.cache_salt) == (-4, "s")
    spec = request.speculation
    assert (spec.drafter, spec.policy, spec.options, spec.max_sl) == ("none", "static", {"sl": 2}, 4)


async def test_null_is_the_default(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await ask(client, temperature=None, n=None, stop=None, logit_bias=None, suffix=None, seed=None)
    assert engine.requests[0].params.temperature == 1.0


async def test_text_continues_the_prompt(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: PreTrainedTokenizerFast, ids: Ids
) -> None:
    euro = ids("€")
    engine.answer = [*euro[1:], *ids(" ok")]
    answer = await ask(client, prompt=[*ids("a"), euro[0]])  # half a character, which the answer completes
    assert answer["choices"][0]["text"] == "€ ok"


@pytest.mark.parametrize("max_tokens", [0, 2])
async def test_offsets_of_an_echoed_text_with_special_tokens_are_its_own(
    client: httpx.AsyncClient, max_tokens: int
) -> None:
    prompt = "a<|im_end|>b c"
    body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "echo": True, "logprobs": 0}
    response = await client.post("/v1/completions", json=body)
    choice = response.json()["choices"][0]
    assert choice["text"].startswith(prompt)
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    for token, offset in zip(tokens, offsets, strict=True):
        assert choice["text"].startswith(token, offset) or offset == len(choice["text"]), (token, offset)
    assert "<|im_end|>" in tokens and offsets[tokens.index("<|im_end|>") + 1] == len("a<|im_end|>")
