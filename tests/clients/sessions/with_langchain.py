"""langchain-openai: ChatOpenAI and OpenAI."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import openai
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel
from served import (
    BASE_URL,
    KEY,
    LONG,
    LONG_TOKENS,
    MODEL,
    QUESTION,
    SPECULATION,
    Session,
    assert_at_work,
    assert_idle,
    is_city,
    loop,
    raised,
)

session = Session("langchain-openai", "langchain-openai", "langchain-core")


@tool
def get_weather(city: Literal["Paris", "Rome", "Oslo"], unit: Literal["celsius", "fahrenheit"]) -> str:
    """The weather of a city now."""
    return f"21 degrees {unit} in {city}"


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome", "Oslo"]
    sunny: bool


def model(**fields: Any) -> ChatOpenAI:
    usual = {"model": MODEL, "base_url": BASE_URL, "api_key": KEY, "temperature": 0, "max_tokens": 24,
             "max_retries": 0, "timeout": 120}  # fmt: skip
    return ChatOpenAI(**{**usual, **fields})


@session.check("plain")
def chat_and_completions_answer() -> None:
    assert model().invoke([("system", "Be short."), ("user", QUESTION)]).content
    old = OpenAI(model=MODEL, base_url=BASE_URL, api_key=KEY, temperature=0, max_tokens=16, max_retries=0)
    text = old.invoke("The capital of France is")
    assert "Paris" in text and "".join(old.stream("The capital of France is")) == text


@session.check("plain")
def batches_keep_their_order() -> None:
    questions = ["Say red.", "Say green.", "Say blue."]
    assert [answer.content for answer in model().batch(questions)] == [
        model().invoke(question).content for question in questions
    ]


@session.check("plain")
def seeds_repeat_and_differ() -> None:
    texts = [model(temperature=1, seed=seed).invoke(QUESTION).content for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


@session.check("streaming")
def stream_equals_the_answer() -> None:
    whole = model().invoke(QUESTION)
    chunks = list(model(stream_usage=True).stream(QUESTION))
    assert "".join(str(chunk.content) for chunk in chunks) == whole.content
    assert len(chunks) > 3
    total = chunks[0]
    for chunk in chunks[1:]:
        total = total + chunk
    assert total.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]


@session.check("streaming")
def async_stream_equals_the_answer() -> None:
    async def text() -> str:
        return "".join([str(chunk.content) async for chunk in model().astream(QUESTION)])

    assert loop.run(text()) == model().invoke(QUESTION).content


@session.check("usage")
def counts_add_up() -> None:
    usage = model(max_tokens=9).invoke(QUESTION).usage_metadata
    assert usage is not None and usage["output_tokens"] == 9
    assert usage["total_tokens"] == usage["input_tokens"] + 9


@session.check("extra fields")
def speculation_changes_no_text() -> None:
    spoken = model(extra_body={"speculation": SPECULATION}).invoke(QUESTION)
    alone = model(extra_body={"speculation": {"drafter": "none"}}).invoke(QUESTION)
    assert spoken.content == alone.content != ""
    raised(openai.BadRequestError, lambda: model(extra_body={"speculation": {"policy": "?"}}).invoke("x"))


@session.check("tools")
def required_and_named_calls_and_the_way_back() -> None:
    ask = HumanMessage("What is the weather in Rome, in celsius?")
    for choice in ("any", "get_weather"):
        bound = model(max_tokens=200).bind_tools([get_weather], tool_choice=choice, parallel_tool_calls=False)
        answer = bound.invoke([ask])
        (call,) = answer.tool_calls
        assert call["name"] == "get_weather" and is_city(call["args"]) and not answer.invalid_tool_calls
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    assert model().bind_tools([get_weather]).invoke([ask, answer, result]).content


@session.check("tools")
def streamed_calls_equal_the_answers() -> None:
    bound = model(max_tokens=200).bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False)
    total: AIMessageChunk | None = None
    for chunk in bound.stream(QUESTION):
        assert isinstance(chunk, AIMessageChunk)
        total = chunk if total is None else total + chunk
    assert total is not None
    (call,), (whole,) = total.tool_calls, bound.invoke(QUESTION).tool_calls
    assert call["name"] == whole["name"] and call["args"] == whole["args"]


@session.check("structured")
def by_schema_and_by_function() -> None:
    for method in ("json_schema", "function_calling"):
        form = model(max_tokens=200).with_structured_output(Weather, method=method)
        assert isinstance(form.invoke(QUESTION), Weather), method
    loose = model(max_tokens=200).with_structured_output(Weather, method="json_mode", include_raw=True)
    raw = loose.invoke('Answer with the JSON {"ok": true} and nothing else.')["raw"]
    assert raw.content.lstrip().startswith("{")


@session.check("errors")
def errors_are_openais() -> None:
    raised(openai.AuthenticationError, lambda: model(api_key="wrong").invoke("x"))
    error = raised(openai.NotFoundError, lambda: model(model="gpt-9").invoke("x"))
    assert error.code == "model_not_found"
    for call in (lambda m: m.invoke("x"), lambda m: list(m.stream("x"))):
        error = raised(openai.BadRequestError, lambda c=call: c(model(top_p=3)))
        assert error.param == "top_p"


@session.check("cancellation")
def a_left_stream_stops_the_work() -> None:
    long = model(max_tokens=LONG_TOKENS, extra_body={"ignore_eos": True})
    stream = long.stream(LONG)
    next(stream)
    next(stream)
    assert_at_work()
    stream.close()
    assert_idle()


@session.check("cancellation")
def a_cancelled_task_stops_the_work() -> None:
    async def leave() -> None:
        long = model(max_tokens=LONG_TOKENS, extra_body={"ignore_eos": True})
        task = asyncio.create_task(long.ainvoke(LONG))
        await asyncio.to_thread(assert_at_work)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    loop.run(leave())
    assert_idle()


@session.check("responses")
def the_responses_api_answers() -> None:
    through = model(use_responses_api=True)
    assert through.invoke(QUESTION).text == model().invoke(QUESTION).content
    assert "".join(chunk.text for chunk in through.stream(QUESTION)) == model().invoke(QUESTION).content


if __name__ == "__main__":
    session.finish()
