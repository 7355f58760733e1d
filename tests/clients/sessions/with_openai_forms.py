"""openai (PyPI): tools and structured output."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
from pydantic import BaseModel
from served import (
    ASK_WEATHER,
    BASE_URL,
    CITY_SCHEMA,
    CLOCK,
    KEY,
    MODEL,
    USER,
    WEATHER,
    Session,
    is_city,
    raised,
)

session = Session("openai (PyPI), forms", "openai")
client = openai.OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0, timeout=120)
chat = client.chat.completions


class Weather(BaseModel):
    city: Literal["Paris", "Rome", "Oslo"]
    sunny: bool
    wind: Literal["calm", "breeze", "storm"]


def greedy(**fields: Any) -> Any:
    return chat.create(**{"model": MODEL, "messages": USER, "temperature": 0, "max_tokens": 24, **fields})


@session.check("tools")
def required_calls_fit_the_schema() -> None:
    answer = greedy(messages=ASK_WEATHER, tools=[WEATHER, CLOCK], tool_choice="required", max_tokens=200)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls
    for call in choice.message.tool_calls:
        assert call.type == "function" and call.id and call.function.name in ("get_weather", "get_time")
        arguments = json.loads(call.function.arguments)
        assert is_city(arguments) or arguments.get("zone") in ("UTC", "CET")
    assert len({call.id for call in choice.message.tool_calls}) == len(choice.message.tool_calls)


def named(name: str) -> dict[str, Any]:
    return {
        "messages": ASK_WEATHER,
        "tools": [WEATHER, CLOCK],
        "tool_choice": {"type": "function", "function": {"name": name}},
        "parallel_tool_calls": False,
        "max_tokens": 200,
    }


@session.check("tools")
def named_choice_and_the_way_back() -> None:
    message = greedy(**named("get_weather")).choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "get_weather" and is_city(json.loads(call.function.arguments))
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"degrees": 21, "sky": "clear"}'}
    back = greedy(messages=[*ASK_WEATHER, message, result], tools=[WEATHER])
    assert back.choices[0].message.content and back.usage.prompt_tokens > 40


@session.check("tools")
def streamed_calls_equal_the_answers() -> None:
    (whole,) = greedy(**named("get_time")).choices[0].message.tool_calls
    name, arguments, ids, ends, content = "", "", set(), [], ""
    for chunk in greedy(**named("get_time"), stream=True):
        for choice in chunk.choices:
            ends += [choice.finish_reason] if choice.finish_reason else []
            content += choice.delta.content or ""
            for delta in choice.delta.tool_calls or []:
                assert delta.index == 0
                ids |= {delta.id} if delta.id else set()
                name += delta.function.name or ""
                arguments += delta.function.arguments or ""
    assert (name, arguments) == (whole.function.name, whole.function.arguments)
    assert len(ids) == 1 and ends == ["tool_calls"] and content == ""


@session.check("tools")
def none_answers_in_text() -> None:
    choice = greedy(messages=ASK_WEATHER, tools=[WEATHER], tool_choice="none").choices[0]
    assert choice.message.content and not choice.message.tool_calls
    assert choice.finish_reason in ("stop", "length")


@session.check("tools")
def the_helper_parses_arguments() -> None:
    class GetWeather(BaseModel):
        city: Literal["Paris", "Rome", "Oslo"]

    answer = chat.parse(
        model=MODEL,
        messages=ASK_WEATHER,
        tools=[openai.pydantic_function_tool(GetWeather)],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=200,
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, GetWeather)


@session.check("structured")
def parse_gives_the_model() -> None:
    for extra in ({}, {"speculation": {"drafter": "none"}}):
        answer = chat.parse(
            model=MODEL, messages=USER, response_format=Weather, temperature=0, extra_body=extra
        )
        choice = answer.choices[0]
        assert isinstance(choice.message.parsed, Weather) and choice.finish_reason == "stop"


@session.check("structured")
def json_schema_streams_the_same() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY_SCHEMA, "strict": True}}
    whole = greedy(response_format=form, max_tokens=100).choices[0].message.content
    stream = greedy(response_format=form, max_tokens=100, stream=True)
    text = "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)
    assert text == whole and is_city(json.loads(text))


@session.check("structured")
def json_object_is_an_object() -> None:
    ask = [{"role": "user", "content": 'Answer with the JSON {"ok": true} and nothing else.'}]
    choice = greedy(messages=ask, response_format={"type": "json_object"}, max_tokens=240).choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    assert choice.message.content.lstrip().startswith("{")


@session.check("structured")
def regex_choice_and_grammar() -> None:
    def answer(**structured: Any) -> str:
        fields = {"structured_outputs": structured}
        return greedy(extra_body=fields, max_tokens=30).choices[0].message.content

    assert answer(choice=["red", "green"]) in ("red", "green")
    date = answer(regex=r"\d{4}-\d{2}-\d{2}")
    assert [len(part) for part in date.split("-")] == [4, 2, 2] and date.replace("-", "").isdigit()
    assert answer(grammar='root ::= "yes" | "no"') in ("yes", "no")


@session.check("structured")
def a_bad_schema_is_named() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    error = raised(openai.BadRequestError, lambda: greedy(response_format=form))
    assert error.param.startswith("response_format")


if __name__ == "__main__":
    session.finish()
