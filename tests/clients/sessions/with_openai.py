"""openai (PyPI): plain and streamed answers, usage, our own fields, errors, cancellation."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
from served import (
    BASE_URL,
    KEY,
    LONG,
    LONG_TOKENS,
    MODEL,
    SPECULATION,
    USER,
    Session,
    assert_at_work,
    assert_idle,
    loop,
    raised,
)

session = Session("openai (PyPI)", "openai")
client = openai.OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0, timeout=120)
chat = client.chat.completions


def greedy(**fields: Any) -> Any:
    return chat.create(**{"model": MODEL, "messages": USER, "temperature": 0, "max_tokens": 24, **fields})


@session.check("plain")
def chat_answers() -> None:
    answer = greedy()
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason in ("stop", "length") and answer.object == "chat.completion"


@session.check("plain")
def completions_take_lists_and_ids() -> None:
    answer = client.completions.create(model=MODEL, prompt=["The sky is", "One, two,"], max_tokens=8, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    ids = client.completions.create(model=MODEL, prompt=[504, 3575, 282], max_tokens=4, temperature=0)
    assert ids.usage is not None and ids.usage.prompt_tokens == 3


@session.check("plain")
def stop_ends_before_the_string() -> None:
    whole = greedy().choices[0].message.content
    stop = whole[len(whole) // 2 :][:3]
    cut = greedy(stop=[stop]).choices[0]
    assert cut.finish_reason == "stop" and cut.message.content == whole[: whole.index(stop)]


@session.check("plain")
def logprobs_are_of_the_tokens() -> None:
    choice = greedy(logprobs=True, top_logprobs=3, max_tokens=12).choices[0]
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens) == choice.message.content
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in tokens)
    assert all(token.token == token.top_logprobs[0].token for token in tokens)


@session.check("plain")
def seeds_repeat_and_differ() -> None:
    texts = [
        greedy(max_tokens=16, temperature=1.0, seed=seed).choices[0].message.content for seed in (7, 7, 8)
    ]
    assert texts[0] == texts[1] != texts[2]


@session.check("plain")
def models_are_listed() -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


@session.check("streaming")
def chat_stream_equals_the_answer() -> None:
    whole = greedy()
    chunks = list(greedy(stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    ends = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert ends == [whole.choices[0].finish_reason]
    assert chunks[-1].choices == [] and all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all("usage" in chunk.model_fields_set for chunk in chunks), "usage: null is missing"


@session.check("streaming")
def completions_stream_equals_the_answer() -> None:
    fields: dict[str, Any] = {"model": MODEL, "prompt": "The sky is", "temperature": 0, "max_tokens": 32}
    whole = client.completions.create(**fields).choices[0].text
    stream = client.completions.create(**fields, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole


@session.check("streaming")
def two_choices_come_by_index() -> None:
    texts, ends = {0: "", 1: ""}, {}
    for chunk in greedy(stream=True, n=2):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert texts[0] == texts[1] != "" and ends.keys() == {0, 1}


@session.check("streaming")
def stream_helper_accumulates() -> None:
    whole = greedy(stop=["."]).choices[0].message.content  # the helper takes a cut answer for an error
    with chat.stream(model=MODEL, messages=USER, temperature=0, max_tokens=24, stop=["."]) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert deltas == final.choices[0].message.content == whole


@session.check("streaming")
def sixteen_streams_at_once() -> None:
    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0) as many:

            async def one() -> str:
                stream = await many.chat.completions.create(
                    model=MODEL, messages=USER, temperature=0, max_tokens=16, stream=True
                )
                return "".join(
                    [choice.delta.content or "" async for chunk in stream for choice in chunk.choices]
                )

            return await asyncio.gather(*(one() for _ in range(16)))

    assert set(loop.run(all_at_once())) == {greedy(max_tokens=16).choices[0].message.content}


@session.check("usage")
def counts_add_up() -> None:
    one, two = greedy(max_tokens=9), greedy(max_tokens=9, n=2)
    for usage, tokens in ((one.usage, 9), (two.usage, 18)):
        assert usage.completion_tokens == tokens
        assert usage.total_tokens == usage.prompt_tokens + tokens
    assert two.usage.prompt_tokens == one.usage.prompt_tokens


@session.check("extra fields")
def speculation_is_a_choice_per_request() -> None:
    answer = greedy(extra_body={"speculation": SPECULATION})
    told = answer.model_extra["speculation"]
    assert told["policy"] == "static" and told["drafted"] >= told["accepted"] >= 0 and told["iterations"]
    plain = greedy(extra_body={"speculation": {"drafter": "none"}})
    assert plain.choices[0].message.content == answer.choices[0].message.content
    assert plain.model_extra["speculation"]["drafted"] == 0


@session.check("extra fields")
def sampling_fields_beyond_openai() -> None:
    fields = {"top_k": 1, "min_tokens": 12, "repetition_penalty": 1.1, "return_token_ids": True}
    answer = greedy(temperature=1.0, max_tokens=12, extra_body=fields)
    assert answer.usage.completion_tokens == 12
    error = raised(openai.BadRequestError, lambda: greedy(extra_body={"speculation": {"policy": "no"}}))
    assert "static" in str(error) and "speculation" in error.param


@session.check("errors")
def wrong_key_is_401() -> None:
    wrong = openai.OpenAI(base_url=BASE_URL, api_key="wrong", max_retries=0)
    error = raised(openai.AuthenticationError, lambda: wrong.models.list())
    assert error.status_code == 401 and error.code


@session.check("errors")
def unknown_model_is_404() -> None:
    error = raised(openai.NotFoundError, lambda: greedy(model="gpt-9"))
    assert error.code == "model_not_found" and error.param == "model"


@session.check("errors")
def bad_fields_are_400_by_name() -> None:
    for name, value in (("temperature", 3), ("top_p", 2), ("max_tokens", -1), ("n", 0)):
        error = raised(openai.BadRequestError, lambda n=name, v=value: greedy(**{n: v}))
        assert error.param == name, (name, error.param)
    error = raised(openai.BadRequestError, lambda: greedy(extra_body={"no_such_field": 1}))
    assert error.param == "no_such_field"
    error = raised(openai.BadRequestError, lambda: greedy(messages=[], stream=True))
    assert error.param == "messages"


@session.check("errors")
def too_long_is_400_and_never_cut() -> None:
    long = [{"role": "user", "content": "word " * 9000}]
    error = raised(openai.BadRequestError, lambda: greedy(messages=long))
    assert error.code == "context_length_exceeded"


@session.check("cancellation")
def a_closed_stream_stops_the_work() -> None:
    long = [{"role": "user", "content": LONG}]
    stream = greedy(messages=long, max_tokens=LONG_TOKENS, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    assert_at_work()
    stream.close()
    assert_idle()


@session.check("cancellation")
def a_timeout_stops_a_plain_answer() -> None:
    impatient = client.with_options(timeout=1.0).chat.completions
    long: list[Any] = [{"role": "user", "content": LONG}]
    fields = {"ignore_eos": True}
    raised(
        openai.APITimeoutError,
        lambda: impatient.create(model=MODEL, messages=long, max_tokens=LONG_TOKENS, extra_body=fields),
    )
    assert_idle()


@session.check("cancellation")
def a_cancelled_task_stops_the_work() -> None:
    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0) as many:
            long: list[Any] = [{"role": "user", "content": LONG}]
            call = many.chat.completions.create(
                model=MODEL, messages=long, max_tokens=LONG_TOKENS, extra_body={"ignore_eos": True}
            )
            task = asyncio.create_task(call)
            await asyncio.to_thread(assert_at_work)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    loop.run(leave())
    assert_idle()


if __name__ == "__main__":
    session.finish()
