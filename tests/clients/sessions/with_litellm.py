"""litellm: as a library, provider openai with a base URL."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any, Literal

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no look-up on the network when it is imported

import litellm
from pydantic import BaseModel
from served import (
    ASK_WEATHER,
    BASE_URL,
    CITY_SCHEMA,
    KEY,
    LONG,
    LONG_TOKENS,
    MODEL,
    SPECULATION,
    USER,
    WEATHER,
    Session,
    assert_at_work,
    assert_idle,
    is_city,
    loop,
    raised,
)

litellm.suppress_debug_info = True
session = Session("litellm", "litellm")
SERVED: dict[str, Any] = {"model": f"openai/{MODEL}", "api_base": BASE_URL, "api_key": KEY, "num_retries": 0,
                          "max_retries": 0, "timeout": 120}  # fmt: skip


class Weather(BaseModel):
    city: Literal["Paris", "Rome", "Oslo"]
    sunny: bool


def greedy(**fields: Any) -> Any:
    return litellm.completion(**{**SERVED, "messages": USER, "temperature": 0, "max_tokens": 24, **fields})


def text_of(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


@session.check("plain")
def chat_and_completions_answer() -> None:
    assert greedy().choices[0].message.content
    old = {**SERVED, "model": f"text-completion-openai/{MODEL}", "prompt": "The capital of France is"}
    answer = litellm.text_completion(**old, temperature=0, max_tokens=16)
    assert "Paris" in answer.choices[0].text


@session.check("plain")
def seeds_repeat_and_differ() -> None:
    texts = [greedy(max_tokens=16, temperature=1, seed=seed).choices[0].message.content for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


@session.check("streaming")
def stream_equals_the_answer() -> None:
    chunks = list(greedy(stream=True, stream_options={"include_usage": True}))
    whole = greedy()
    assert text_of(chunks) == whole.choices[0].message.content
    rebuilt = litellm.stream_chunk_builder(chunks)
    assert rebuilt.choices[0].message.content == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


@session.check("streaming")
def async_stream_equals_the_answer() -> None:
    async def text() -> str:
        stream = await litellm.acompletion(**SERVED, messages=USER, temperature=0, max_tokens=24, stream=True)
        return text_of([chunk async for chunk in stream])

    assert loop.run(text()) == greedy().choices[0].message.content


@session.check("usage")
def counts_add_up() -> None:
    usage = greedy(max_tokens=9).usage
    assert usage.completion_tokens == 9 and usage.total_tokens == usage.prompt_tokens + 9
    assert greedy(max_tokens=9, n=2).usage.completion_tokens == 18


@session.check("extra fields")
def speculation_changes_no_text() -> None:
    spoken = greedy(extra_body={"speculation": SPECULATION})
    alone = greedy(extra_body={"speculation": {"drafter": "none"}})
    assert spoken.choices[0].message.content == alone.choices[0].message.content
    assert spoken.speculation["policy"] == "static" and alone.speculation["drafted"] == 0


@session.check("tools")
def required_and_named_calls_and_the_way_back() -> None:
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        answer = greedy(
            messages=ASK_WEATHER,
            tools=[WEATHER],
            tool_choice=choice,
            parallel_tool_calls=False,
            max_tokens=200,
        )
        message = answer.choices[0].message
        (call,) = message.tool_calls
        assert call.function.name == "get_weather" and is_city(json.loads(call.function.arguments))
        assert answer.choices[0].finish_reason == "tool_calls"
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"degrees": 21}'}
    back = greedy(messages=[*ASK_WEATHER, message.model_dump(exclude_none=True), result], tools=[WEATHER])
    assert back.choices[0].message.content


@session.check("tools")
def streamed_calls_equal_the_answers() -> None:
    fields = {"messages": ASK_WEATHER, "tools": [WEATHER], "tool_choice": "required",
              "parallel_tool_calls": False, "max_tokens": 200}  # fmt: skip
    rebuilt = litellm.stream_chunk_builder(list(greedy(**fields, stream=True)))
    (call,) = rebuilt.choices[0].message.tool_calls
    (whole,) = greedy(**fields).choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == (whole.function.name, whole.function.arguments)


@session.check("structured")
def by_model_and_by_schema() -> None:
    answer = greedy(response_format=Weather, max_tokens=200)
    Weather.model_validate_json(answer.choices[0].message.content)
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY_SCHEMA, "strict": True}}
    answer = greedy(response_format=form, max_tokens=200)
    assert is_city(json.loads(answer.choices[0].message.content))


@session.check("errors")
def errors_are_litellms_own() -> None:
    raised(litellm.AuthenticationError, lambda: greedy(api_key="wrong"))
    raised(litellm.NotFoundError, lambda: greedy(model="openai/gpt-9"))
    error = raised(litellm.BadRequestError, lambda: greedy(top_p=3))
    assert error.status_code == 400 and "top_p" in str(error)
    long = [{"role": "user", "content": "word " * 9000}]
    error = raised(litellm.BadRequestError, lambda: greedy(messages=long))
    assert "context" in str(error)


@session.check("cancellation")
def a_closed_stream_stops_the_work() -> None:
    async def leave() -> None:
        stream = await litellm.acompletion(
            **SERVED,
            messages=[{"role": "user", "content": LONG}],
            max_tokens=LONG_TOKENS,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        async for _ in stream:
            break
        await asyncio.to_thread(assert_at_work)
        await stream.completion_stream.close()

    loop.run(leave())
    assert_idle()


@session.check("responses")
def the_responses_api_answers() -> None:
    answer = litellm.responses(**SERVED, input=USER, temperature=0, max_output_tokens=24)
    texts = [part.text for item in answer.output if item.type == "message" for part in item.content]
    assert "".join(texts) == greedy().choices[0].message.content


if __name__ == "__main__":
    session.finish()
